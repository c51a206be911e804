"""Where a search is cut: others get in between engine calls, and what has expired costs the engine no more of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from router_service.arrays import F32
from router_service.backends import base, exact
from router_service.backends.base import SearchOptions
from router_service.backends.edge.backend import QUERIES_PER_CALL, EdgeBackend, EdgeCollection
from router_service.backends.edge.engine import EngineShard
from router_service.backends.exact import ExactBackend
from router_service.errors import DeadlineTooShort
from tests.unit.router_service.backends.numbered_entries import OPTIONS, SPEC, numbered_entries

Before = Callable[[F32], object]


@pytest.fixture
def engine_calls(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[Before]]:
    """How many queries each engine call had; what is put into the second list is called before each."""
    search, sizes, before = EngineShard.search, [], []

    def noted(shard: EngineShard, queries: F32, *rest: object) -> object:
        sizes.append(len(queries))
        for each in before:
            each(queries)
        return search(shard, queries, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(EngineShard, "search", noted)
    return sizes, before


class Clock:
    """Stands still but for what tests add."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(base, "time", made)
    return made


def test_two_thousand_tokens_are_cut_here_and_nowhere_else(
    collection: EdgeCollection, engine_calls: tuple[list[int], list[Before]]
) -> None:
    keys = np.resize(numbered_entries(0, 600).keys, (2048, SPEC.dimension))
    found = collection.search(keys, 1, OPTIONS)
    np.testing.assert_array_equal(found.ids[:, 0], np.arange(2048) % 600)
    sizes, _ = engine_calls
    assert sizes == [QUERIES_PER_CALL] * (2048 // QUERIES_PER_CALL)


def test_others_get_in_between_the_calls_of_a_long_search(
    collection: EdgeCollection, engine_calls: tuple[list[int], list[Before]]
) -> None:
    sizes, before = engine_calls
    begun = threading.Event()

    def wait_for_the_other(queries: F32) -> None:
        if not begun.is_set():
            begun.set()
            while not collection._served._engine._waiting:
                time.sleep(0.001)

    before.append(wait_for_the_other)
    keys = np.resize(numbered_entries(0, 600).keys, (2048, SPEC.dimension))
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(collection.search, keys, 1, OPTIONS)
        assert begun.wait(30)
        collection.search(keys[:1], 1, OPTIONS)
        long.result(60)
    assert sizes[:3] == [QUERIES_PER_CALL, 1, QUERIES_PER_CALL]


def test_writes_rest_for_as_long_as_a_search_goes_on(
    collection: EdgeCollection, engine_calls: tuple[list[int], list[Before]], clock: Clock
) -> None:
    _, before = engine_calls
    seen = []

    def half_a_minute_later(queries: F32) -> None:
        seen.append(collection.pacing.being_searched)
        clock.now += 30

    before.append(half_a_minute_later)
    collection.search(numbered_entries(0, 200).keys, 1, OPTIONS)
    assert seen == [True] * 4


def test_a_search_that_expires_goes_no_further(
    collection: EdgeCollection, engine_calls: tuple[list[int], list[Before]], clock: Clock
) -> None:
    sizes, before = engine_calls

    def one_second_later(queries: F32) -> None:
        clock.now += 1

    before.append(one_second_later)
    with pytest.raises(DeadlineTooShort):
        collection.search(numbered_entries(0, 600).keys, 1, SearchOptions(deadline=clock.now + 1.5))
    assert sizes == [QUERIES_PER_CALL] * 2


def test_a_search_that_expires_while_it_waits_costs_the_engine_nothing(
    collection: EdgeCollection, engine_calls: tuple[list[int], list[Before]], clock: Clock
) -> None:
    sizes, _ = engine_calls
    deadline = SearchOptions(deadline=clock.now + 1)
    with ThreadPoolExecutor(1) as pool:
        with collection._served.engine_call():
            late = pool.submit(collection.search, numbered_entries(0, 1).keys, 1, deadline)
            while not collection._served._engine._waiting:
                time.sleep(0.001)
            clock.now += 2
        with pytest.raises(DeadlineTooShort):
            late.result(30)
    assert not sizes


@pytest.mark.parametrize("backend", ["edge", "exact"])
def test_a_search_that_has_expired_is_refused(
    edge: EdgeBackend, clock: Clock, backend: str
) -> None:
    made = (edge if backend == "edge" else ExactBackend()).create("layer", SPEC)
    made.upsert(numbered_entries(0, 10))
    keys = numbered_entries(0, 10).keys
    assert made.search(keys, 1, SearchOptions(deadline=clock.now + 1)).ids[3, 0] == 3
    with pytest.raises(DeadlineTooShort):
        made.search(keys, 1, SearchOptions(deadline=clock.now))


def test_brute_force_stops_between_blocks(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = ExactBackend().create("layer", SPEC)
    collection.upsert(numbered_entries(0, 50))
    monkeypatch.setattr(exact, "_BLOCK_ELEMENTS", 50 * SPEC.dimension * 10)  # 10 queries
    distances, blocks = exact._distances, []

    def one_second_later(queries: F32, *rest: object) -> object:
        clock.now += 1
        blocks.append(len(queries))
        return distances(queries, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(exact, "_distances", one_second_later)
    with pytest.raises(DeadlineTooShort):
        collection.search(numbered_entries(0, 50).keys, 1, SearchOptions(deadline=clock.now + 2.5))
    assert blocks == [10] * 3

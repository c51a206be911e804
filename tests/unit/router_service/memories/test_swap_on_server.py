"""A lookup that is on its way to a Qdrant server while its memory is replaced is of one memory, never of both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from router_service.arrays import ExampleRef
from router_service.memories import swap
from router_service.memories.layer import RouteQuery
from router_service.memories.memory import RoutingMemory
from router_service.memories.store import MemoryStore
from router_service.memories.swap import replace_memory
from router_service.operations import Operations
from router_service.settings import QdrantSettings
from router_service.storage import opened_store
from tests.qdrant_standin import QdrantStandIn
from tests.unit.router_service.numbered_memory import MODEL, SETTINGS, fill, numbered_entries

OLD, NEW = 300, 40
ARRIVES_S = 60.0


@pytest.fixture
def server(fast_dir: Path) -> Iterator[QdrantStandIn]:
    with QdrantStandIn(fast_dir / "qdrant") as running:
        yield running


@pytest.fixture
def store(server: QdrantStandIn) -> Iterator[MemoryStore]:
    """`bible`, and `rebuilt`, to take its place; they are read in different ways."""
    with opened_store(server.url, QdrantSettings(timeout_s=60.0)) as opened:
        fill(opened.create("bible", MODEL, SETTINGS), 0, OLD)
        fill(opened.create("rebuilt", MODEL, replace(SETTINGS, neighbours=3)), 0, NEW)
        yield opened


@contextmanager
def at_the_door(server: QdrantStandIn, method: str, work: Callable[[], Any]) -> Iterator[Any]:
    """Inside, `work` waits for one call that has arrived: the server looks up what its name leads to afterwards.

    What is yielded lets the call in, and returns what work returns.
    """
    arrived, let_in = threading.Event(), threading.Event()
    before = server.faults.before

    def wait(path: str, context: Any) -> None:
        if path.endswith(f"Points/{method}") and not arrived.is_set():
            arrived.set()
            assert let_in.wait(ARRIVES_S)
        before(path, context)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(server.faults, "before", wait)
        done: Future[Any] = pool.submit(work)

        def end() -> Any:
            let_in.set()
            return done.result(ARRIVES_S)

        try:
            assert arrived.wait(ARRIVES_S)
            yield end
        finally:
            let_in.set()


def while_replaced(
    server: QdrantStandIn, store: MemoryStore, method: str, work: Callable[[], Any]
) -> Any:
    """What work returns when `rebuilt` takes the place of `bible` while a call of this method is at the door."""
    found = []
    with pytest.MonkeyPatch.context() as patch, at_the_door(server, method, work) as let_in:
        # The new one serves, and the entries of the old one are there for those who had begun.
        clock = SimpleNamespace(sleep=lambda _: found.append(let_in()), time_ns=lambda: 0)
        patch.setattr(swap, "time", clock)
        replace_memory(store, Operations(), "bible", "rebuilt")
    return found[0]


@pytest.mark.parametrize("tokens", [3, 150])
def test_a_lookup(server: QdrantStandIn, store: MemoryStore, tokens: int) -> None:
    """Of 150 tokens a server is asked in three calls; one of them waits."""
    memory, random = store.get("bible"), np.random.default_rng(5)
    version = memory.version
    inputs = random.normal(size=(tokens, MODEL.hidden_size)).astype(np.float32)
    query = RouteQuery(inputs, random.normal(size=(tokens, 4)).astype(np.float32))
    expected = memory.route(0, MODEL.digest(), query)
    found = while_replaced(
        server, store, "QueryBatch", lambda: memory.route(0, MODEL.digest(), query)
    )
    np.testing.assert_array_equal(found.neighbours.ids, expected.neighbours.ids)
    np.testing.assert_array_equal(found.neighbours.values, expected.neighbours.values)
    np.testing.assert_array_equal(found.blended, expected.blended)
    np.testing.assert_array_equal(found.lambdas, expected.lambdas)
    assert memory.version == version < store.get("bible").version


def test_where_its_neighbours_came_from(server: QdrantStandIn, store: MemoryStore) -> None:
    """They are of the memory that answered, which has entries that the new one has not."""
    memory: RoutingMemory = store.get("bible")
    ids = numbered_entries(0, OLD).ids[-3:]
    origins = while_replaced(server, store, "Get", lambda: memory.layer(0).provenance_of(ids))
    expected = numbered_entries(0, OLD).provenance[-3:]
    assert {i: (p.source, p.example) for i, p in origins.items()} == {
        int(i): (p.source, p.example) for i, p in zip(ids, expected, strict=True)
    }


def test_one_of_the_memory_whose_name_goes(server: QdrantStandIn, store: MemoryStore) -> None:
    """A lookup of `rebuilt` that had begun is answered, although nothing has that name any more."""
    memory = store.get("rebuilt")
    inputs = numbered_entries(0, NEW).keys[:3]
    query = RouteQuery(inputs, np.zeros((3, 4), np.float32), exclude=[ExampleRef("s", "e0")])
    expected = memory.route(0, MODEL.digest(), query)
    found = while_replaced(
        server, store, "QueryBatch", lambda: memory.route(0, MODEL.digest(), query)
    )
    np.testing.assert_array_equal(found.neighbours.ids, expected.neighbours.ids)

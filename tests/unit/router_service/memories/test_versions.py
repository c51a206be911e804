"""An answer says of which version it is: whose entries and settings made it, and no other's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router_service.arrays import Entries, Provenance
from router_service.backends.edge.backend import QUERIES_PER_CALL, EdgeBackend
from router_service.backends.exact import ExactBackend
from router_service.memories.layer import RouteAnswer, RouteQuery
from router_service.memories.memory import RoutingMemory
from router_service.memories.store import MemoryStore
from tests.unit.router_service.numbered_memory import MODEL, SETTINGS

WRITES = 150


@pytest.fixture(params=["exact", "edge"])
def store(request: pytest.FixtureRequest, fast_dir: Path) -> Iterator[MemoryStore]:
    edge = request.param == "edge"
    data = fast_dir / "data" if edge else None
    backend = EdgeBackend(fast_dir / "data", min_free_bytes=0) if edge else ExactBackend()
    made = MemoryStore(backend, data)
    made.open_all()
    yield made
    made.close()
    backend.close()


@pytest.fixture
def memory(store: MemoryStore) -> RoutingMemory:
    return store.create("bible", MODEL, replace(SETTINGS, neighbours=1))


def nearer(number: int) -> Entries:
    """An entry nearer to the origin than all with smaller numbers."""
    keys = np.full((1, MODEL.hidden_size), 10 / (number + 1), np.float32)
    return Entries(
        np.array([number], np.uint64),
        keys,
        np.full((1, MODEL.num_experts), number, np.float32),
        [Provenance()],
    )


def write(memory: RoutingMemory, number: int, layer: int = 0) -> None:
    memory.upsert(layer, MODEL.digest(), nearer(number))


def ask(memory: RoutingMemory, tokens: int = 1) -> RouteAnswer:
    inputs = np.zeros((tokens, MODEL.hidden_size), np.float32)
    logits = np.zeros((tokens, MODEL.num_experts), np.float32)
    return memory.route(0, MODEL.digest(), RouteQuery(inputs, logits))


@pytest.mark.parametrize("tokens", [1, 2 * QUERIES_PER_CALL + 1])
def test_entries_and_version_are_of_one_moment(memory: RoutingMemory, tokens: int) -> None:
    """While another thread writes: the newest entry that an answer has is that of its version."""
    first, done = memory.version, threading.Event()

    def write_all() -> None:
        for number in range(WRITES):
            write(memory, number)
        done.set()

    seen: list[tuple[int, set[int]]] = []
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(write_all)
        while not done.is_set() and not written.done():
            answer = ask(memory, tokens)
            seen.append((answer.version, set(answer.neighbours.ids.ravel().tolist())))
        written.result()
    seen.append((ask(memory).version, {WRITES - 1}))
    assert seen[-1][0] == first + WRITES
    assert [ids for version, ids in seen if version > first] == [
        {version - first - 1} for version, ids in seen if version > first
    ]


def test_every_change_is_a_version(store: MemoryStore, memory: RoutingMemory) -> None:
    """Also those of other layers; what changes nothing is none."""
    changes: list[Callable[[], Any]] = [
        lambda: write(memory, 1),
        lambda: write(memory, 2, layer=1),
        lambda: store.change_settings("bible", {"neighbours": 2}),
        lambda: memory.delete(0, np.array([1, 5], np.uint64)),
    ]
    for change in changes:
        before = ask(memory).version
        change()
        assert ask(memory).version == memory.version == before + 1
    before = memory.version
    memory.delete(0, np.array([1, 5], np.uint64))
    assert ask(memory).version == memory.version == before


def test_a_layer_that_is_not_read_has_the_version_of_its_settings(
    store: MemoryStore, memory: RoutingMemory
) -> None:
    write(memory, 1)
    store.change_settings("bible", {"layers": (1,)})
    assert ask(memory).version == memory.version


def test_settings_that_change_during_a_lookup(
    store: MemoryStore, memory: RoutingMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version and lambda are those of the one settings or those of the others."""
    write(memory, 1)
    collection: Any = memory.layer(0).collection
    search, changed = type(collection).search, []

    def meanwhile(*arguments: Any) -> Any:
        if not changed:
            changed.append(store.change_settings("bible", {"gamma": (0.001, 0.2)}))
        return search(*arguments)

    before = ask(memory)
    monkeypatch.setattr(type(collection), "search", meanwhile)
    during = ask(memory)
    monkeypatch.undo()
    after = ask(memory)
    assert (during.version, during.lambdas) == (after.version, after.lambdas)
    assert (during.version, during.lambdas) != (before.version, before.lambdas)


def test_a_write_between_two_engine_calls_of_a_lookup(
    fast_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens of a lookup have the same entries; the next write waits for it."""
    backend = EdgeBackend(fast_dir / "data", min_free_bytes=0)
    store = MemoryStore(backend, fast_dir / "data")
    memory = store.create("bible", MODEL, replace(SETTINGS, neighbours=1))
    write(memory, 0)
    collection: Any = memory.layer(0).collection
    searched, calls = collection.pacing.searched, 0
    with ThreadPoolExecutor(1) as pool:

        def between() -> None:
            nonlocal calls
            calls += 1
            if calls == 2:  # the second engine call of three
                pool.submit(write, memory, 1).result()
            if calls == 3:  # the first of the next attempt
                pool.submit(write, memory, 2)
            searched()

        monkeypatch.setattr(collection.pacing, "searched", between)
        answer = ask(memory, 3 * QUERIES_PER_CALL)
    assert calls == 2 + 3
    assert set(answer.neighbours.ids.ravel().tolist()) == {1}
    assert answer.version == memory.version - 1
    store.close()
    backend.close()

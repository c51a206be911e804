"""A first write to a layer while the memory gets other collections: whoever comes last, its name leads to what it has.

On the stand-in alone: calls are held up between one step and the next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from qdrant_client import grpc as q

from router_service.backends.qdrant_server.options import ServerOptions
from router_service.backends.qdrant_server.records import Records
from router_service.errors import BackendUnavailable
from router_service.memories import server_catalogue
from router_service.memories.store import MemoryStore
from router_service.memories.swap import replace_memory
from router_service.operations import Operations
from router_service.snapshots import server as server_snapshots
from router_service.snapshots import server_book
from router_service.snapshots.server import ServerSnapshotStore
from tests.qdrant_standin import QdrantStandIn
from tests.unit.router_service.numbered_memory import MODEL, SETTINGS, counts, numbered_entries
from tests.unit.router_service.snapshots.server_memories import MONDAY, Service, opened, quiet


@pytest.fixture
def server(fast_dir: Path) -> Iterator[QdrantStandIn]:
    with QdrantStandIn(fast_dir / "qdrant") as running:
        yield running


@pytest.fixture
def service(server: QdrantStandIn, fast_dir: Path) -> Iterator[Service]:
    """With a memory `bible`, entries in its first layer, none in its second, and a snapshot of that."""
    with opened(ServerOptions(server.url), fast_dir / "snapshots") as (store, snapshots):
        store.create("bible", MODEL, SETTINGS)
        write(store, 0, 0, 20)
        list(snapshots.create("bible", "monday", quiet))
        yield store, snapshots


@pytest.fixture
def other(server: QdrantStandIn, service: Service, fast_dir: Path) -> Iterator[MemoryStore]:
    """Of another service, which looks at nothing by itself."""
    with opened(ServerOptions(server.url), fast_dir / "others") as (store, _):
        yield store


def write(store: MemoryStore, layer: int, start: int, stop: int) -> None:
    entries = numbered_entries(start, stop, layer)
    store.asked("bible", lambda memory: memory.upsert(layer, MODEL.digest(), entries))


def collections_of(server: QdrantStandIn) -> list[str]:
    """Those of layers, by their own names."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        found = q.CollectionsStub(channel).List(q.ListCollectionsRequest()).collections
    return sorted(each.name for each in found if "~~" in each.name)


def restore(snapshots: ServerSnapshotStore) -> None:
    list(snapshots.restore(MONDAY, "bible", True, quiet))


def assert_writes_go_on(
    server: QdrantStandIn, stores: Sequence[MemoryStore], expected: list[int]
) -> None:
    """Of every service, to the collections that the record names; and there are no others."""
    for number, store in enumerate(stores):
        write(store, 1, 100 + 10 * number, 110 + 10 * number)
    expected[1] += 10 * len(stores)
    for store in stores:
        assert counts(store.get("bible")) == expected
        assert collections_of(server) == sorted(store.get("bible").record.collections)


@contextmanager
def first_write_held_up(store: MemoryStore) -> Iterator[None]:
    """One that is about to take the layer's name; it goes on at the end, and is made then."""
    backend: Any = store._backend
    change, arrived, go = backend._change_aliases, threading.Event(), threading.Event()

    def held_up(actions: Any) -> None:
        if threading.current_thread() is not threading.main_thread() and not go.is_set():
            arrived.set()
            go.wait()
        change(actions)

    backend._change_aliases = held_up
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(write, store, 1, 0, 5)
        written.add_done_callback(lambda _: arrived.set())
        try:
            arrived.wait()
            yield
        finally:
            go.set()
    backend._change_aliases = change
    written.result()


def test_the_memory_is_restored_meanwhile(
    server: QdrantStandIn, service: Service, other: MemoryStore
) -> None:
    store, snapshots = service
    with first_write_held_up(other):
        restore(snapshots)
    assert_writes_go_on(server, (store, other), [20, 5])


def test_the_memory_is_replaced_by_a_restored_one_meanwhile(
    server: QdrantStandIn, service: Service, other: MemoryStore
) -> None:
    store, snapshots = service
    list(snapshots.restore(MONDAY, "rebuilt", False, quiet))
    with first_write_held_up(other):
        replace_memory(store, Operations(), "bible", "rebuilt", retire_after_s=0)
    assert_writes_go_on(server, (store, other), [20, 5])


def before_the_record(snapshots: ServerSnapshotStore, act: Callable[[], None]) -> None:
    """Acts when the names lead to what is restored, and the record does not say so yet."""
    backend = snapshots.backend
    publish = backend.publish

    def then_act(collections: dict[str, str]) -> list[str]:
        found = publish(collections)
        backend.publish = publish  # type: ignore[method-assign]
        act()
        return found

    backend.publish = then_act  # type: ignore[method-assign]


def test_a_first_write_before_the_restored_record(
    server: QdrantStandIn, service: Service, other: MemoryStore
) -> None:
    """It takes the name; it is lost, as any write during a restore, and the name is taken back."""
    store, snapshots = service
    before_the_record(snapshots, lambda: write(other, 1, 0, 5))
    restore(snapshots)
    assert_writes_go_on(server, (store, other), [20, 0])


class Killed(BaseException):
    """Stands for the end of the process."""


def test_killed_before_the_name_is_taken_back(
    server: QdrantStandIn,
    service: Service,
    other: MemoryStore,
    fast_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the committed record names stays, whatever the names lead to."""
    _, snapshots = service

    def killed(_: float) -> None:
        raise Killed

    before_the_record(snapshots, lambda: write(other, 1, 0, 5))
    with monkeypatch.context() as patch:
        time = server_snapshots.time
        clock = SimpleNamespace(sleep=killed, time_ns=time.time_ns, monotonic=time.monotonic)
        patch.setattr(server_snapshots, "time", clock)
        with pytest.raises(Killed):
            restore(snapshots)
    monkeypatch.setattr(server_book, "PATIENCE_MS", -1)
    with opened(ServerOptions(server.url), fast_dir / "later") as (late, sweeping):
        sweeping.sweep()
        assert_writes_go_on(server, (late, other), [20, 0])


def drop(server: QdrantStandIn, name: str) -> None:
    """By somebody else, without a word to the services."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        q.CollectionsStub(channel).Delete(q.DeleteCollection(collection_name=name))


def notes(store: MemoryStore) -> list[str]:
    backend: Any = store._backend
    return sorted(each["collection"] for each in backend.made.all())


def test_what_was_lost_leaves_no_note(
    server: QdrantStandIn, service: Service, fast_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the memory is restored over it, and when a deletion that was cut short is finished."""
    store, snapshots = service
    drop(server, store.get("bible").record.collections[0])
    restore(snapshots)
    assert notes(store) == []
    store.create("other", MODEL, SETTINGS)
    memory = store.get("other")
    memory.upsert(0, MODEL.digest(), numbered_entries(0, 5))
    [made] = notes(store)
    assert made == memory.record.collections[0]
    server.faults.fail(grpc.StatusCode.UNAVAILABLE, method="Collections/Delete")
    with pytest.raises(BackendUnavailable):
        store.delete("other")
    server.faults.lift()
    drop(server, made)
    monkeypatch.setattr(server_catalogue, "_PATIENCE_MS", -1)
    with opened(ServerOptions(server.url), fast_dir / "later") as (late, _):
        assert notes(late) == []
        assert late.names() == ["bible"]


def test_half_done_changes_of_a_restore_are_mended(
    server: QdrantStandIn, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the memory's record, and of the restore's own."""
    store, snapshots = service
    records: list[Records] = []
    put = Records._put

    def fail_once(self: Records, key: str, payload: Any, *, new: bool = False) -> None:
        if self.name not in {each.name for each in records}:
            records.append(self)
            raise BackendUnavailable("half done")
        put(self, key, payload, new=new)

    monkeypatch.setattr(Records, "_put", fail_once)
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="half done"):
            restore(snapshots)
    monkeypatch.undo()
    assert {each.name for each in records} == {"knnmoe~memories", "knnmoe~snapshots"}
    snapshots.sweep()
    store.refresh()
    assert not any(each._torn for each in records)

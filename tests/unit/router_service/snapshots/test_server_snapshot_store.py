"""Snapshots through a Qdrant server, on the stand-in and on a real one: what is restored answers bit for bit alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from qdrant_client import grpc as q

from router_service.backends.base import Compression, Quantization
from router_service.backends.qdrant_server.backend import ServerBackend
from router_service.backends.qdrant_server.connection import Connection
from router_service.backends.qdrant_server.options import ServerOptions
from router_service.errors import (
    BackendMisconfigured,
    Busy,
    Cancelled,
    MemoryExists,
    SnapshotNotFound,
)
from router_service.memories.server_catalogue import ServerCatalogue
from router_service.memories.store import MemoryStore
from router_service.snapshots import server_book
from router_service.snapshots.base import SnapshotRef
from router_service.snapshots.server import ServerSnapshotStore
from tests.engines import SERVERS, clean_server, url_of
from tests.unit.router_service.numbered_memory import (
    MODEL,
    SETTINGS,
    answers,
    assert_same_answers,
    counts,
    fill,
    numbered_entries,
)

MONDAY = SnapshotRef("bible", "monday")


@pytest.fixture(params=SERVERS)
def options(request: pytest.FixtureRequest) -> Iterator[ServerOptions]:
    with clean_server(url_of(request.param, request)) as found:
        yield found


@contextmanager
def opened(options: ServerOptions) -> Iterator[tuple[MemoryStore, ServerSnapshotStore]]:
    """The memories and snapshots of a service."""
    connection = Connection(options)
    backend = ServerBackend(connection)
    store = MemoryStore(backend, None, shared=ServerCatalogue(backend))
    store.open_all()
    yield store, ServerSnapshotStore(store, backend)
    store.close()
    backend.close()


@pytest.fixture
def service(options: ServerOptions) -> Iterator[tuple[MemoryStore, ServerSnapshotStore]]:
    """With a memory `bible` of 100 entries in each layer; nothing is left on the server."""
    with opened(options) as (store, snapshot_store):
        fill(store.create("bible", MODEL, SETTINGS), 0, 100)
        yield store, snapshot_store
        for info in snapshot_store.list(""):
            snapshot_store.delete(info.memory, info.name)


def quiet(stage: str, done: int, total: int) -> None:
    """A Report."""


def test_what_is_restored_answers_alike(service: tuple[MemoryStore, ServerSnapshotStore]) -> None:
    store, snapshot_store = service
    memory = store.get("bible")
    memory.layers[1].optimize(Compression(Quantization.INT8))
    before = answers(memory)
    [made] = snapshot_store.create("bible", "monday", quiet)
    assert (made.entries, made.remark, made.problem) == (200, "", "")
    assert list(snapshot_store.verify(MONDAY, quiet)) == snapshot_store.list("bible") == [made]
    [copy] = snapshot_store.restore(MONDAY, "copy", False, quiet)
    assert_same_answers(answers(copy), before)
    assert copy.layers[1].info().compression == memory.layers[1].info().compression
    fill(memory, 100, 130)
    memory.layers[0].hits.add(memory.layers[0].hits.counts())
    version = memory.version
    with pytest.raises(MemoryExists):
        list(snapshot_store.restore(MONDAY, "bible", False, quiet))
    [restored] = snapshot_store.restore(MONDAY, "bible", True, quiet)
    assert restored is store.get("bible")
    assert_same_answers(answers(restored), before)
    assert restored.version > version
    fill(restored, 100, 110)
    assert counts(restored) == [110, 110]


def test_services_share_snapshots(
    service: tuple[MemoryStore, ServerSnapshotStore], options: ServerOptions
) -> None:
    store, snapshot_store = service
    before = answers(store.get("bible"))
    [made] = snapshot_store.create("bible", "monday", quiet)
    with opened(options) as (others, other):
        assert other.list("") == [made]
        fill(store.get("bible"), 100, 120)
        list(other.restore(MONDAY, "bible", True, quiet))
        store.refresh()
        for each in (store, others):
            assert_same_answers(answers(each.get("bible")), before)
        assert store.get("bible").record == others.get("bible").record
        other.delete("bible", "monday")
    with pytest.raises(SnapshotNotFound, match="'monday' not found"):
        list(snapshot_store.verify(MONDAY, quiet))


def test_writes_go_on_and_are_told(service: tuple[MemoryStore, ServerSnapshotStore]) -> None:
    store, snapshot_store = service
    memory = store.get("bible")

    def write(stage: str, done: int, total: int) -> None:
        if (stage, done, total) == ("layers", 1, 2):
            memory.upsert(1, MODEL.digest(), numbered_entries(100, 101, 1))

    [made] = snapshot_store.create("bible", "monday", write)
    assert "entries came or went while layers 1 were copied" in made.remark
    [copy] = snapshot_store.restore(MONDAY, "copy", False, quiet)
    assert copy.layers[0].info().entries == 100
    assert copy.layers[1].info().entries in (100, 101)


def test_a_cancelled_snapshot_leaves_nothing(
    service: tuple[MemoryStore, ServerSnapshotStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, snapshot_store = service

    def cancel(stage: str, done: int, total: int) -> None:
        if done == 1:
            raise Cancelled("a client asked for it")

    with pytest.raises(Cancelled):
        list(snapshot_store.create("bible", "monday", cancel))
    assert snapshot_store.list("") == []
    [made] = snapshot_store.create("bible", "monday", quiet)
    monkeypatch.setattr(server_book, "PATIENCE_MS", -1)
    snapshot_store.sweep()  # the server may have finished what was cancelled
    assert snapshot_store.list("") == list(snapshot_store.verify(MONDAY, quiet)) == [made]


def test_a_cancelled_restore_changes_nothing(
    service: tuple[MemoryStore, ServerSnapshotStore],
) -> None:
    store, snapshot_store = service
    list(snapshot_store.create("bible", "monday", quiet))
    fill(store.get("bible"), 100, 120)

    def cancel(stage: str, done: int, total: int) -> None:
        if done and stage == "restore layer 1":
            raise Cancelled("a client asked for it")

    def restore_too(stage: str, done: int, total: int) -> None:
        list(snapshot_store.restore(MONDAY, "bible", True, quiet))

    with pytest.raises(Cancelled):
        list(snapshot_store.restore(MONDAY, "bible", True, cancel))
    with pytest.raises(Busy, match="'bible' is being restored already"):
        list(snapshot_store.restore(MONDAY, "bible", True, restore_too))
    assert counts(store.get("bible")) == [120, 120]


def test_a_memory_whose_collection_is_lost(
    service: tuple[MemoryStore, ServerSnapshotStore], options: ServerOptions
) -> None:
    """It is set aside at the next start; a snapshot takes its place."""
    store, snapshot_store = service
    before = answers(store.get("bible"))
    list(snapshot_store.create("bible", "monday", quiet))
    connection = Connection(options)
    reply = connection.call("collections", "List", q.ListCollectionsRequest(), 30.0)
    [lost] = [each.name for each in reply.collections if "bible~layer-001" in each.name]
    connection.call("collections", "Delete", q.DeleteCollection(collection_name=lost), 30.0)
    connection.close()
    with opened(options) as (store, other):
        assert list(store.broken) == ["bible"]
        [restored] = other.restore(MONDAY, "bible", True, quiet)
        assert_same_answers(answers(restored), before)
        assert not store.broken


def test_records_of_a_newer_service(
    service: tuple[MemoryStore, ServerSnapshotStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They say so, and hold nothing up."""
    _, snapshot_store = service
    monkeypatch.setattr(server_book, "FORMAT", 2)
    list(snapshot_store.create("bible", "monday", quiet))
    monkeypatch.undo()
    [info] = snapshot_store.list("bible")
    assert "format 2, this version reads 1" in info.problem
    snapshot_store.sweep()
    monkeypatch.setattr(server_book, "FORMAT", 2)
    snapshot_store.delete("bible", "monday")


def test_a_node_that_holds_a_part(standin_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cluster: what its snapshot would lack is named, with what to do instead."""

    def two_nodes(*_: Any) -> Any:
        local = q.LocalShardInfo(shard_id=0, state=q.ReplicaState.Active)
        remote = q.RemoteShardInfo(shard_id=1, peer_id=2, state=q.ReplicaState.Active)
        return q.CollectionClusterInfoResponse(
            peer_id=1, shard_count=2, local_shards=[local], remote_shards=[remote]
        )

    with clean_server(standin_url) as options, opened(options) as (store, snapshot_store):
        fill(store.create("bible", MODEL, SETTINGS), 0, 20)
        monkeypatch.setattr(Connection, "call", _answering(Connection.call, two_nodes))
        with pytest.raises(BackendMisconfigured) as refused:
            list(snapshot_store.create("bible", "monday", quiet))
        assert snapshot_store.list("") == []
    assert "peer 1" in str(refused.value)
    assert "shards [1]" in str(refused.value)
    assert "router-admin migrate --to DIR" in str(refused.value)


def _answering(call: Any, answer: Any) -> Any:
    """Connection.call, but for what the server says about shards."""

    def answered(self: Connection, service: str, method: str, *rest: Any, **more: Any) -> Any:
        if method == "CollectionClusterInfo":
            return answer()
        return call(self, service, method, *rest, **more)

    return answered

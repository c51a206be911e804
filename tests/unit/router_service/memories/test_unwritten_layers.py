"""Layers of a new memory on a Qdrant server: their collections come with their first entries, whoever writes them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from qdrant_client import grpc as q

from router_service.backends.base import Compression, Quantization, SearchOptions
from router_service.backends.qdrant_server import unwritten
from router_service.backends.qdrant_server.backend import ServerBackend
from router_service.backends.qdrant_server.unwritten import UnwrittenCollection
from router_service.errors import (
    BackendUnavailable,
    CollectionClosed,
    CorruptMemory,
    MemoryExists,
    StorageError,
)
from router_service.memories.store import MemoryStore
from router_service.memories.swap import replace_memory
from router_service.operations import Operations
from router_service.settings import QdrantSettings
from router_service.storage import opened_store
from tests.qdrant_standin import QdrantStandIn
from tests.unit.router_service.numbered_memory import (
    MODEL,
    SETTINGS,
    answers,
    counts,
    fill,
    numbered_entries,
)

RECORDS = {"knnmoe~memories", "knnmoe~layers"}


@pytest.fixture
def server(fast_dir: Path) -> Iterator[QdrantStandIn]:
    with QdrantStandIn(fast_dir / "qdrant") as running:
        yield running


@pytest.fixture
def store(server: QdrantStandIn) -> Iterator[MemoryStore]:
    with opened_store(server.url, QdrantSettings(timeout_s=60.0)) as opened:
        yield opened


@pytest.fixture
def other(server: QdrantStandIn, store: MemoryStore) -> Iterator[MemoryStore]:
    """Of another service."""
    with opened_store(server.url, QdrantSettings(timeout_s=60.0)) as opened:
        yield opened


def write(store: MemoryStore, layer: int, start: int, stop: int, name: str = "bible") -> None:
    entries = numbered_entries(start, stop, layer)
    store.asked(name, lambda memory: memory.upsert(layer, MODEL.digest(), entries))


def layers_of(server: QdrantStandIn) -> list[str]:
    """Names of collections, without what makes them their own."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        found = q.CollectionsStub(channel).List(q.ListCollectionsRequest()).collections
    return sorted(each.name.split("~~")[0] for each in found if each.name not in RECORDS)


def drop(server: QdrantStandIn, part: str) -> None:
    """By somebody else, without a word to the services."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = q.CollectionsStub(channel)
        for each in stub.List(q.ListCollectionsRequest()).collections:
            if part in each.name:
                stub.Delete(q.DeleteCollection(collection_name=each.name))


def test_a_new_memory_is_a_record_and_empty(
    server: QdrantStandIn, store: MemoryStore, other: MemoryStore
) -> None:
    changes = dict(server.faults.calls)
    memory = store.create("bible", MODEL, SETTINGS)
    made = {m: server.faults.calls[m] - changes.get(m, 0) for m in ("Create", "Upsert")}
    assert made == {"Create": 0, "Upsert": 1}
    assert layers_of(server) == []
    for each in (memory, other.get("bible")):
        assert counts(each) == [0, 0]
        for queries in (1, 40, 200):
            assert not any(answer.lambdas.any() for answer in answers(each, queries))
        assert each.delete(0, np.arange(3, dtype=np.uint64)) == 0
        assert len(each.layer(1).collection.scroll(None, 10)) == 0
        assert each.layer(0).provenance_of(np.arange(3, dtype=np.uint64)) == {}
        each.layer(0).optimize()
    assert layers_of(server) == []
    store.delete("bible")
    assert store.names() == []


def test_what_one_service_writes_first_the_other_sees_at_once(
    server: QdrantStandIn, store: MemoryStore, other: MemoryStore
) -> None:
    store.create("bible", MODEL, SETTINGS)
    assert counts(other.get("bible")) == [0, 0]
    write(store, 1, 0, 30)
    assert layers_of(server) == ["knnmoe~bible~layer-001"]
    assert counts(other.get("bible")) == [0, 30]
    for queries in (1, 40, 200):
        assert answers(other.get("bible"), queries)[1].lambdas.any()
    write(other, 1, 30, 40)
    write(other, 0, 0, 5)
    assert counts(store.get("bible")) == [5, 40]


def test_two_services_write_first_at_once(store: MemoryStore, other: MemoryStore) -> None:
    store.create("bible", MODEL, SETTINGS)
    other.get("bible")
    with ThreadPoolExecutor(4) as pool:
        parts = [(each, n) for n, each in enumerate((store, other, store, other))]
        writes = [pool.submit(write, each, 0, 10 * n, 10 * n + 10) for each, n in parts]
    assert [each.exception() for each in writes] == [None] * 4
    assert counts(store.get("bible")) == counts(other.get("bible")) == [40, 0]


def test_two_services_make_a_memory_of_one_name(store: MemoryStore, other: MemoryStore) -> None:
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(each.create, "bible", MODEL, SETTINGS) for each in (store, other)]
    errors = [each.exception() for each in made]
    assert sum(error is None for error in errors) == 1
    assert sum(isinstance(error, MemoryExists) for error in errors) == 1
    write(store, 0, 0, 3)
    write(other, 0, 3, 5)
    assert counts(store.get("bible")) == counts(other.get("bible")) == [5, 0]


def test_a_compression_stays_though_there_is_no_entry_yet(store: MemoryStore) -> None:
    memory = store.create("bible", MODEL, SETTINGS)
    memory.layer(0).optimize(Compression(Quantization.INT8))
    write(store, 0, 0, 10)
    assert memory.layer(0).info().compression == Compression(Quantization.INT8)


@pytest.mark.parametrize("method", ["Create", "CreateFieldIndex", "UpdateAliases", "Upsert"])
def test_a_first_write_that_was_cut_short(
    server: QdrantStandIn, store: MemoryStore, other: MemoryStore, method: str
) -> None:
    store.create("bible", MODEL, SETTINGS)
    server.faults.fail(grpc.StatusCode.INTERNAL, method=method)
    with pytest.raises(StorageError, match="injected"):
        write(store, 1, 0, 30)
    server.faults.lift()
    assert counts(store.get("bible")) == counts(other.get("bible")) == [0, 0]
    assert other.get("bible").delete(1, np.arange(3, dtype=np.uint64)) == 0
    write(other, 1, 0, 30)
    write(store, 1, 30, 40)
    assert counts(store.get("bible")) == counts(other.get("bible")) == [0, 40]


def test_a_layer_that_is_lost_is_damage_and_not_empty(
    server: QdrantStandIn, store: MemoryStore, other: MemoryStore
) -> None:
    store.create("bible", MODEL, SETTINGS)
    store.create("empty", MODEL, SETTINGS)
    assert counts(other.get("bible")) == [0, 0]
    write(store, 1, 0, 30)
    drop(server, "layer-001")
    for each in (store, other):
        with pytest.raises(CollectionClosed):
            answers(each.get("bible"))
    with opened_store(server.url, QdrantSettings()) as again:
        assert again.names() == ["empty"]
        with pytest.raises(CorruptMemory, match="has no collection 'knnmoe~bible~layer-001"):
            again.get("bible")


@pytest.mark.parametrize(("ours", "theirs"), [([0], [1]), ([0, 1], []), ([], [0, 1]), ([], [])])
def test_replaced_while_layers_are_not_made(
    server: QdrantStandIn,
    store: MemoryStore,
    other: MemoryStore,
    ours: list[int],
    theirs: list[int],
) -> None:
    store.create("bible", MODEL, SETTINGS)
    store.create("rebuilt", MODEL, replace(SETTINGS, neighbours=3))
    for layer in ours:
        write(store, layer, 0, 20)
    for layer in theirs:
        write(store, layer, 0, 30, "rebuilt")
    other.refresh()
    stale = other.get("bible")
    replace_memory(store, Operations(), "bible", "rebuilt", retire_after_s=0)
    expected = [30 if layer in theirs else 0 for layer in range(2)]
    assert counts(store.get("bible")) == expected
    assert layers_of(server) == [f"knnmoe~rebuilt~layer-{layer:03d}" for layer in theirs]
    with pytest.raises(CollectionClosed):
        fill(stale, 0, 1)
    for layer in range(2):
        write(other, layer, 100, 101)
        write(store, layer, 101, 102)
    assert counts(store.get("bible")) == counts(other.get("bible")) == [n + 2 for n in expected]
    store.delete("bible")
    assert layers_of(server) == []


def test_a_lookup_keeps_its_deadline_while_a_layer_is_not_known_yet(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node that is asked knows that the layer was made, and does not have it: no call is given more time."""
    collection = store.create("bible", MODEL, SETTINGS).layer(1).collection
    assert isinstance(collection, UnwrittenCollection)
    backend = store._backend
    assert isinstance(backend, ServerBackend)
    backend.made.write(collection.name, {"collection": collection.name})
    given: list[float] = []
    call = backend.connection.call

    def noted(service: str, method: str, request: Any, timeout_s: float) -> Any:
        given.append(timeout_s)
        return call(service, method, request, timeout_s)

    monkeypatch.setattr(backend.connection, "call", noted)
    monkeypatch.setattr(unwritten, "_LEARNS_S", math.inf)
    keys, deadline_s = np.ones((1, MODEL.hidden_size), np.float32), 1.5
    options = SearchOptions(deadline=time.monotonic() + deadline_s)
    with pytest.raises(BackendUnavailable, match="did not answer within"):
        collection.search(keys, 3, options)
    assert len(given) > 1
    assert given == sorted(given, reverse=True)
    assert max(given) <= deadline_s

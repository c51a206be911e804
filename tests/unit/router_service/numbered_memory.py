"""A small memory whose entries follow from their ids, and questions to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from router_service.arrays import Entries, Provenance
from router_service.backends.edge.backend import EdgeBackend
from router_service.fingerprint import ModelFingerprint
from router_service.memories.layer import RouteAnswer, RouteQuery
from router_service.memories.memory import RoutingMemory
from router_service.memories.settings import MemorySettings
from router_service.memories.store import MemoryStore

MODEL = ModelFingerprint("tiny", 2, 8, 4, 2, "hash-of-routers")
OTHER_MODEL = dataclasses.replace(MODEL, router_hash="hash-of-other-routers")
SETTINGS = MemorySettings(neighbours=5, gamma=(0.1, 0.2))


def numbered_entries(start: int, stop: int, layer: int = 0) -> Entries:
    ids = np.arange(start, stop, dtype=np.uint64)
    random = np.random.default_rng(layer)
    keys = random.normal(size=(stop, MODEL.hidden_size)).astype(np.float32)
    values = np.stack([ids, ids * 2, ids % 7, ids % 3], axis=1).astype(np.float32)
    return Entries(ids, keys[start:], values, [Provenance("s", f"e{i // 10}") for i in ids])


def fill(memory: RoutingMemory, start: int, stop: int) -> None:
    for layer in range(MODEL.num_layers):
        memory.upsert(layer, MODEL.digest(), numbered_entries(start, stop, layer))


@contextmanager
def open_store(data: Path, **options: int) -> Iterator[MemoryStore]:
    """The store of a service on `data`, as after a start; `options` of EdgeBackend."""
    backend = EdgeBackend(data, min_free_bytes=0, **options)
    store = MemoryStore(backend, data)
    try:
        store.open_all()
        yield store
    finally:
        store.close()
        backend.close()


def answers(memory: RoutingMemory, queries: int = 40) -> list[RouteAnswer]:
    """What every layer says to the same questions."""
    random = np.random.default_rng(99)
    found = []
    for layer in range(MODEL.num_layers):
        inputs = random.normal(size=(queries, MODEL.hidden_size)).astype(np.float32)
        logits = random.normal(size=(queries, MODEL.num_experts)).astype(np.float32)
        found.append(memory.route(layer, MODEL.digest(), RouteQuery(inputs, logits)))
    return found


def assert_same_answers(got: list[RouteAnswer], expected: list[RouteAnswer]) -> None:
    """Bit by bit."""
    for one, other in zip(got, expected, strict=True):
        assert (one.lambdas > 0).any()
        np.testing.assert_array_equal(one.blended, other.blended)
        np.testing.assert_array_equal(one.lambdas, other.lambdas)
        np.testing.assert_array_equal(one.neighbours.ids, other.neighbours.ids)
        np.testing.assert_array_equal(one.neighbours.distances, other.neighbours.distances)
        np.testing.assert_array_equal(one.neighbours.values, other.neighbours.values)


def counts(memory: RoutingMemory) -> list[int]:
    return [layer.info().entries for layer in memory.layers]

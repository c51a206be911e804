"""A memory of two layers in RAM, and what tests write into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from router_service.arrays import Entries, Provenance
from router_service.backends.exact import ExactBackend
from router_service.fingerprint import ModelFingerprint
from router_service.memories.memory import RoutingMemory
from router_service.memories.settings import MemorySettings
from router_service.memories.store import MemoryStore

MODEL = ModelFingerprint("tiny", 2, 4, 3, 2, "ab")


def entries_of(versions: dict[int, int]) -> Entries:
    """One entry per id, that follows from the id and a version."""
    ids = sorted(versions)
    seeds = [np.random.default_rng((number, versions[number])) for number in ids]
    return Entries(
        np.array(ids, np.uint64),
        np.array([seed.normal(size=4) for seed in seeds], np.float32).reshape(-1, 4),
        np.array([seed.normal(size=3) for seed in seeds], np.float32).reshape(-1, 3),
        [Provenance("text", f"é{number}", number % 7, 1, 0.5, 1_000) for number in ids],
    )


def memory_of(*layers: dict[int, int]) -> RoutingMemory:
    """A memory with these versions of entries by id, layer by layer."""
    memory = MemoryStore(ExactBackend(), None).create("m", MODEL, MemorySettings())
    for number, versions in enumerate(layers):
        write(memory, versions, number)
    return memory


def write(memory: RoutingMemory, versions: dict[int, int], layer: int = 0) -> None:
    """Upserts versions of entries."""
    if versions:
        memory.upsert(layer, MODEL.digest(), entries_of(versions))


def erase(memory: RoutingMemory, *ids: int, layer: int = 0) -> None:
    """Deletes entries."""
    memory.delete(layer, np.array(ids, np.uint64))


def ids_of(memory: RoutingMemory, layer: int = 0) -> list[int]:
    """Every id of a layer."""
    ids: list[int] = memory.layer(layer).collection.scroll(None, 10_000).ids.tolist()
    return ids


@contextmanager
def no_progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A Progress that nobody watches."""
    yield lambda done: None

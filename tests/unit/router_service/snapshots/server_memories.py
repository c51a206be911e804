"""Memories on a server and their snapshots, as tests of several rooms open and compare them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from router_service.arrays import Entries
from router_service.backends.base import pages
from router_service.backends.qdrant_server.backend import ServerBackend
from router_service.backends.qdrant_server.connection import Connection
from router_service.backends.qdrant_server.options import ServerOptions
from router_service.memories.memory import RoutingMemory
from router_service.memories.server_catalogue import ServerCatalogue
from router_service.memories.store import MemoryStore
from router_service.snapshots.base import SnapshotRef
from router_service.snapshots.server import ServerSnapshotStore
from tests.unit.router_service.numbered_memory import MODEL

MONDAY = SnapshotRef("bible", "monday")
Service = tuple[MemoryStore, ServerSnapshotStore]


@contextmanager
def opened(options: ServerOptions, directory: Path) -> Iterator[Service]:
    """The memories and snapshots of a service."""
    connection = Connection(options)
    backend = ServerBackend(connection)
    store = MemoryStore(backend, None, shared=ServerCatalogue(backend))
    store.open_all()
    yield store, ServerSnapshotStore(store, backend, directory, 0, directory / "packs")
    store.close()
    backend.close()


def quiet(stage: str, done: int, total: int) -> None:
    """A Report."""


def at(stage: str, act: Callable[[], object], times: int = 1) -> Callable[[str, int, int], None]:
    """A Report that acts when it hears of a stage for the first `times` times."""
    left, before = [times], [""]

    def report(now: str, done: int, total: int) -> None:
        begins, before[0] = now != before[0], now
        if now.startswith(stage) and begins and left[0]:
            left[0] -= 1
            act()

    return report


def stored(memory: RoutingMemory, layer: int) -> Entries:
    """All entries of a layer."""
    found = list(pages(memory.layers[layer].collection, 64, with_keys=True))
    return Entries.concat(found, MODEL.hidden_size, memory.record.value_width)


def assert_same_entries(one: RoutingMemory, other: RoutingMemory) -> None:
    """To the last bit."""
    for layer in range(MODEL.num_layers):
        ours, theirs = stored(one, layer), stored(other, layer)
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        assert ours.keys.tobytes() == theirs.keys.tobytes()
        assert ours.values.tobytes() == theirs.values.tobytes()
        assert list(ours.provenance) == list(theirs.provenance)

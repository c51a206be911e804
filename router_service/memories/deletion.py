"""Removing named entries: by id, or by where they came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from router_service.arrays import U64, Bool, Entries
from router_service.backends.base import pages
from router_service.memories.layer import LayerMemory
from router_service.memories.memory import RoutingMemory

# Entries read at a time.
PAGE_ENTRIES = 1024
# Entries deleted at a time: writes of the same layer wait for one batch.
BATCH_IDS = 256


@dataclass(frozen=True, slots=True)
class EntryFilter:
    """Entries of a source, or of one example of it."""

    source: str
    example: str | None = None

    def matches(self, page: Entries) -> Bool:
        """Which entries [n] it names."""
        found = (
            origin.source == self.source and self.example in (None, origin.example)
            for origin in page.provenance
        )
        return np.fromiter(found, np.bool_, len(page))


@dataclass(frozen=True, slots=True)
class LayerDeletion:
    """What went of a layer that had `entries`."""

    layer: int
    deleted: int
    entries: int


def delete_entries(
    memory: RoutingMemory,
    layers: Sequence[LayerMemory],
    what: U64 | EntryFilter,
    *,
    fsync: bool = False,
    dry_run: bool = False,
) -> list[LayerDeletion]:
    """Removes entries of these layers, or with `dry_run` counts them. Entries written meanwhile stay.

    On return they stay away after SIGKILL (fsync: after loss of power). Raises StorageError.
    """
    return [_of_layer(memory, layer, what, fsync, dry_run) for layer in layers]


def _of_layer(
    memory: RoutingMemory, layer: LayerMemory, what: U64 | EntryFilter, fsync: bool, dry_run: bool
) -> LayerDeletion:
    entries = layer.info().entries
    with layer.gate.watched() as watch:
        ids = _ids_of(layer, what) if isinstance(what, EntryFilter) else np.unique(what)
        if dry_run:
            return LayerDeletion(layer.layer, layer.count_of(ids), entries)
        deleted = 0
        for batch in batches(ids):
            deleted += watch.delete(batch, deleter(memory, layer))[0]
    if deleted and fsync:
        layer.collection.flush()
    return LayerDeletion(layer.layer, deleted, entries)


def deleter(memory: RoutingMemory, layer: LayerMemory) -> Callable[[U64], int]:
    """Deletes entries of one layer and says how many were there."""
    return lambda ids: memory.delete(layer.layer, ids)


def batches(ids: U64) -> list[U64]:
    """Ids [n] in parts that are deleted at a time."""
    return [ids[start : start + BATCH_IDS] for start in range(0, len(ids), BATCH_IDS)]


def _ids_of(layer: LayerMemory, wanted: EntryFilter) -> U64:
    read = pages(layer.collection, PAGE_ENTRIES, with_keys=False)
    found = [page.ids[wanted.matches(page)] for page in read]
    return np.concatenate([np.empty(0, np.uint64), *found])

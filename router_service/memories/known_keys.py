"""Whether searches find what a layer holds: a sample of its own keys is looked up before the layer is handed over.

On a file system that does not keep what an engine maps into memory (FUSE, as in rootless containers), a layer can have
the right number of entries and find none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from router_service.arrays import Entries
from router_service.backends.base import CollectionReader, SearchOptions
from router_service.errors import KeysNotFound, StorageError
from router_service.memories.layer import LayerMemory
from router_service.memories.settings import MemorySettings

SAMPLE = 32
_NEIGHBOURS = 8
# Of a key's squared length: the most that rounding puts between it and itself.
_TOLERANCE = 1e-5
# An index may miss some keys, though searches by codes and graphs missed none of their own (docs/recall.md).
_MOST_MISSED = 0.5
# Ids are hashes below 2^63.
_MIDDLE = 1 << 62
_TOGETHER = 8


def require_found(
    collection: CollectionReader,
    what: str,
    *,
    sample: int = SAMPLE,
    options: SearchOptions | None = None,
) -> None:
    """Looks up to `sample` of a layer's own keys up; an entry at no distance must be found, whichever it is.

    `what`: of which layer, for the error. Raises KeysNotFound when a search by `options` finds less than half of them,
    or an exact one not all; else StorageError. Entries that are written or deleted meanwhile do not count.
    """
    options = options or SearchOptions()
    entries = _sample(collection, sample)
    missed = _still_there(collection, _missed(collection, entries, options))
    exact = replace(options, exact=True)
    lost = _still_there(collection, _missed(collection, missed, exact))
    if len(lost):
        raise _not_found(what, len(lost), len(entries), "a search of all entries")
    if len(missed) > _MOST_MISSED * len(entries):
        raise _not_found(what, len(missed), len(entries), "a search by its index")


def require_all_found(memory: str, layers: Sequence[LayerMemory], settings: MemorySettings) -> None:
    """require_found() of each layer as the memory is read. Raises the first error."""
    for error in failures(memory, layers, settings):
        raise error


def failures(
    memory: str, layers: Sequence[LayerMemory], settings: MemorySettings
) -> list[StorageError]:
    """What require_found() raises for these layers, several of which are asked at a time."""
    options = settings.search(_NEIGHBOURS)

    def check(layer: LayerMemory) -> StorageError | None:
        try:
            require_found(
                layer.collection, f"layer {layer.layer} of memory {memory!r}", options=options
            )
        except StorageError as error:
            return error
        return None

    with ThreadPoolExecutor(_TOGETHER, thread_name_prefix="known-keys") as pool:
        return [error for error in pool.map(check, layers) if error is not None]


def _sample(collection: CollectionReader, size: int) -> Entries:
    """Of the lower and of the upper half of all ids; from the lowest on where there are no such."""
    half = (size + 1) // 2
    upper = collection.scroll(_MIDDLE, half)
    lower = collection.scroll(None, size - len(upper))
    both = Entries.concat([lower, upper])
    return both.take(np.unique(both.ids, return_index=True)[1])


def _missed(collection: CollectionReader, entries: Entries, options: SearchOptions) -> Entries:
    """Those whose key is at a distance from all that a search for it finds."""
    if not len(entries):
        return entries
    found = collection.search(entries.keys, _NEIGHBOURS, options).distances.min(axis=1)
    squares = np.einsum("nd,nd->n", entries.keys, entries.keys, dtype=np.float64)
    return entries.take(np.flatnonzero(~(found <= _TOLERANCE * squares)))


def _still_there(collection: CollectionReader, entries: Entries) -> Entries:
    """Those that are what they were when they were read."""
    same = []
    for row, number in enumerate(entries.ids.tolist()):
        now = collection.scroll(number - 1 if number else None, 1)
        if now.ids.tolist() == [number] and np.array_equal(now.keys[0], entries.keys[row]):
            same.append(row)
    return entries.take(np.array(same, np.intp))


def _not_found(what: str, missed: int, asked: int, by: str) -> KeysNotFound:
    return KeysNotFound(
        f"{what}: {by} does not find {missed} of {asked} keys that are stored there, so that lookups would abstain for "
        "ever; this happens where the file system under the storage (the service's data directory, or the Qdrant "
        "server's storage) does not keep memory-mapped files: FUSE, as in rootless containers, or a network file "
        "system; put the storage on a volume of ext4 or xfs, and do this again"
    )

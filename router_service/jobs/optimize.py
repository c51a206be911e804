"""Building the indexes of a memory's layers, as an operation, and measuring what they find."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from router_service.arrays import NO_ID
from router_service.backends.base import Compression, Report, SearchOptions
from router_service.jobs.measure import SAME_DISTANCE
from router_service.memories.layer import LayerMemory
from router_service.memories.memory import RoutingMemory, sample_entries
from router_service.memories.store import MemoryStore

# Neighbours that a measurement of recall asks for.
RECALL_AT = 32
# Keys that it asks about: as many as compare that many numbers, some 2 s.
_FEWEST_QUERIES, _MOST_QUERIES, _NUMBERS = 16, 64, 1 << 33


@dataclass(frozen=True, slots=True)
class Indexed:
    """A layer that was indexed, the seconds that it took, and what searches find since: see recall_of()."""

    layer: int
    elapsed_s: float
    recall: float | None


def optimized(
    memory: RoutingMemory,
    layers: Sequence[LayerMemory],
    compression: Compression | None,
    report: Report,
    oversampling: float = 0.0,
) -> Iterator[Indexed]:
    """Optimizes layer after layer. Raises what `report` raises.

    `compression`: None keeps each layer's own. `oversampling`: to measure recall with; 0: the memory's.
    """
    for layer in layers:
        started = time.monotonic()

        def of_layer(stage: str, done: int, total: int, number: int = layer.layer) -> None:
            report(f"layer {number}: {stage}", done, total)

        of_layer("begin", 0, 0)
        layer.optimize(compression, of_layer)
        elapsed_s, settings = time.monotonic() - started, memory.record.settings
        options = settings.search(RECALL_AT)
        if oversampling:
            options = replace(options, oversampling=oversampling)
        yield Indexed(layer.layer, elapsed_s, recall_of(layer, options, of_layer))


def recall_of(layer: LayerMemory, options: SearchOptions, report: Report) -> float | None:
    """Share of the RECALL_AT nearest that searches find, over a sample of the layer's own keys, each without itself.

    None when the layer has no index. Looks at every entry for each key, one key at a time.
    """
    info = layer.info()
    if not info.indexed_entries:
        return None
    sample = sample_entries(layer, _MOST_QUERIES)
    numbers = max(1, info.entries * sample.keys.shape[1])
    sample = sample.slice(0, max(_FEWEST_QUERIES, min(_MOST_QUERIES, _NUMBERS // numbers)))
    found = wanted = 0
    for done, (number, key) in enumerate(zip(sample.ids, sample.keys, strict=True)):
        report("measure recall", done, len(sample))
        exact, indexed = (
            layer.collection.search(key[None], RECALL_AT + 1, each)
            for each in (replace(options, exact=True), options)
        )
        others = (exact.ids[0] != number) & (exact.ids[0] != NO_ID)
        nearest = np.flatnonzero(others)[:RECALL_AT]
        wanted += len(nearest)
        # Ties may come in any order, so distances are compared
        if len(nearest):
            farthest = exact.distances[0, nearest[-1]] * (1 + SAME_DISTANCE)
            near = (indexed.ids[0] != number) & (indexed.distances[0] <= farthest)
            found += min(len(nearest), int(np.count_nonzero(near)))
    return found / wanted if wanted else None


def quantized(
    store: MemoryStore,
    memory: RoutingMemory,
    layers: Sequence[LayerMemory],
    compression: Compression,
    oversampling: float,
    report: Report,
) -> Iterator[Indexed]:
    """Yields like optimized(). `oversampling` 0: as many candidates as the layers need afterwards.

    Meanwhile at least as many are rescored as before and as are needed, so no answer is worse than before or after.
    What ends it leaves as many as the layers need as they are, and no fewer than before.
    """
    before = memory.record.settings.oversampling
    wanted = oversampling or compression.oversampling
    _set(store, memory, max(wanted, before))
    try:
        yield from optimized(memory, layers, compression, report, wanted)
    except BaseException:
        _set(store, memory, max(before, _needed(memory)))  # some layers may be done
        raise
    _set(store, memory, oversampling or _needed(memory))


def _needed(memory: RoutingMemory) -> float:
    """Times K candidates that the layers need as they are."""
    return max(layer.info().compression.oversampling for layer in memory.layers)


def _set(store: MemoryStore, memory: RoutingMemory, oversampling: float) -> None:
    if oversampling != memory.record.settings.oversampling:
        store.change_settings(memory.record.name, {"oversampling": oversampling}, memory)

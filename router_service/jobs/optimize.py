"""Building the indexes of a memory's layers, as an operation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from router_service.backends.base import Compression, Report
from router_service.memories.layer import LayerMemory
from router_service.memories.memory import RoutingMemory
from router_service.memories.store import MemoryStore


def optimized(
    layers: Sequence[LayerMemory], compression: Compression | None, report: Report
) -> Iterator[tuple[int, float]]:
    """Optimizes layer after layer; yields the number of each and the seconds it took. Raises what `report` raises.

    `compression`: None keeps each layer's own.
    """
    for layer in layers:
        started = time.monotonic()

        def of_layer(stage: str, done: int, total: int, number: int = layer.layer) -> None:
            report(f"layer {number}: {stage}", done, total)

        of_layer("begin", 0, 0)
        layer.optimize(compression, of_layer)
        yield layer.layer, time.monotonic() - started


def quantized(
    store: MemoryStore,
    memory: RoutingMemory,
    layers: Sequence[LayerMemory],
    compression: Compression,
    oversampling: float,
    report: Report,
) -> Iterator[tuple[int, float]]:
    """Yields like optimized(). `oversampling` 0: as many candidates as the layers need afterwards.

    Meanwhile at least as many are rescored as before and as are needed, so no answer is worse than before or after.
    What fails before the first layer is done leaves the setting as it was.
    """
    before, finished = memory.record.settings.oversampling, 0
    _set(store, memory, max(oversampling or compression.oversampling, before))
    try:
        for finished, done in enumerate(optimized(layers, compression, report), 1):  # noqa: B007
            yield done
    except BaseException:
        if not finished:
            _set(store, memory, before)
        raise
    needed = max(layer.info().compression.oversampling for layer in memory.layers)
    _set(store, memory, oversampling or needed)


def _set(store: MemoryStore, memory: RoutingMemory, oversampling: float) -> None:
    if oversampling != memory.record.settings.oversampling:
        store.change_settings(memory.record.name, {"oversampling": oversampling})

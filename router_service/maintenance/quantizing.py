"""Changing the search keys of a memory's layers, as an operation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from router_service.backends.base import Compression, Report
from router_service.layer_memory import LayerMemory
from router_service.maintenance.optimizing import optimized
from router_service.memory_store import MemoryStore
from router_service.routing_memory import RoutingMemory


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

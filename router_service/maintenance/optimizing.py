"""Building the indexes of a memory's layers, as an operation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from router_service.backends.base import Compression, Quantization, Report
from router_service.layer_memory import LayerMemory


def optimized(
    layers: Sequence[LayerMemory],
    compression: Compression | Quantization | None,
    report: Report,
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

"""The target's indexes, with the compression that the source's search keys have."""

from __future__ import annotations

from dataclasses import dataclass

from router_service.backends.base import Compression
from router_service.migration.moving import Progress
from router_service.migration.sides import LayerState, Side
from router_service.migration.walk import Advance


@dataclass(frozen=True, slots=True)
class LayerIndex:
    """What became of one layer's search keys. `refused`: why the target cannot have those of the source, or empty."""

    layer: int
    source: Compression
    target: Compression
    optimized: bool
    refused: str = ""


def bring_indexes(
    source: Side, target: Side, layers: int, progress: Progress, *, optimize: bool
) -> list[LayerIndex]:
    """Optimizes the target's layers where the source has an index or compression that they lack.

    Without `optimize` only says what they have. What `progress` raises as it advances ends it.
    """
    with progress("optimizing", layers) as advance:
        done = []
        for layer in range(layers):
            wanted = source.state(layer)
            done.append(_brought(wanted, target, layer, advance, optimize=optimize))
            advance(1)
        return done


def _brought(
    wanted: LayerState, target: Side, layer: int, advance: Advance, *, optimize: bool
) -> LayerIndex:
    have, refused = target.state(layer), ""
    optimized = optimize and _lacks(have, wanted)
    if optimized:
        refused = target.optimize(layer, wanted.compression, lambda *_: advance(0))
        have = target.state(layer)
    return LayerIndex(
        layer, wanted.compression, have.compression, optimized and not refused, refused
    )


def _lacks(have: LayerState, wanted: LayerState) -> bool:
    if have.compression != wanted.compression:
        return True
    return bool(wanted.indexed_entries) and have.indexed_entries < have.entries

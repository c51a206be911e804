"""Copying entries from one endpoint to another: what differs is written until nothing does, then both are summed up."""

from router_service.transfer.checksums import EntrySum, checksum
from router_service.transfer.moving import (
    LayerCounts,
    LayerIndex,
    LayerSums,
    Migration,
    Outcome,
    bring_indexes,
)
from router_service.transfer.sides import LayerState, Place, Side, Untouched
from router_service.transfer.store_place import StorePlace, StoreSide

__all__ = [
    "EntrySum",
    "LayerCounts",
    "LayerIndex",
    "LayerState",
    "LayerSums",
    "Migration",
    "Outcome",
    "Place",
    "Side",
    "StorePlace",
    "StoreSide",
    "Untouched",
    "bring_indexes",
    "checksum",
]

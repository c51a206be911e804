"""Moving memories from one place to another: what differs is written until nothing does, then both are summed up."""

from router_service.migration.checksums import EntrySum, checksum
from router_service.migration.indexing import LayerIndex, bring_indexes
from router_service.migration.moving import LayerCounts, LayerSums, Migration, Outcome
from router_service.migration.sides import LayerState, Place, Side
from router_service.migration.store_place import StorePlace, StoreSide
from router_service.migration.untouched import Untouched

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

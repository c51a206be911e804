"""The layers of a stored memory: what their collections are called and hold, and how they are closed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from router_service.backends.base import CollectionSpec
from router_service.errors import StorageError
from router_service.layer_memory import LayerMemory
from router_service.routing_memory import MemoryRecord

log = logging.getLogger(__name__)


def collection_name(home: str, layer: int) -> str:
    """Of a layer; `home` as in restored_files.home_of()."""
    return f"{home}/layer-{layer:03d}"


def collection_names(record: MemoryRecord, home: str = "") -> list[str]:
    """Of all layers, in their order; where no home is given they are under the memory's own name."""
    numbers = range(record.fingerprint.num_layers)
    return [collection_name(home or record.name, number) for number in numbers]


def spec_of(record: MemoryRecord) -> CollectionSpec:
    """What the collections of a memory hold."""
    return CollectionSpec(
        record.fingerprint.hidden_size, record.settings.similarity.metric, record.value_width
    )


def are_read_alike(one: MemoryRecord, other: MemoryRecord) -> bool:
    """Whether open collections can stay as they are when the record of their memory becomes another."""
    return one.fingerprint == other.fingerprint and spec_of(one) == spec_of(other)


def forget_hits(layers: Sequence[LayerMemory]) -> None:
    """Counts from 0: the layers hold other entries now."""
    for layer in layers:
        layer.hits.forget(layer.hits.counts().ids)


def close_all(layers: Sequence[LayerMemory]) -> list[StorageError]:
    """Closes every layer's collection; those that fail, and are returned, do not keep the others open."""
    failures = []
    for layer in layers:
        try:
            layer.hits.save()
            layer.collection.close()
        except StorageError as error:
            log.exception("closing layer %d failed", layer.layer)
            failures.append(error)
    return failures

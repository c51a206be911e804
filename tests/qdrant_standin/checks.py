"""Limits of requests, checked before anything else, with the texts of the real server."""

from __future__ import annotations

from typing import Any

from router_service.backends.qdrant_server.wire import q as pb
from tests.qdrant_standin.errors import invalid, unimplemented, validation

_LONGEST_NAME = 255
_UNSAFE_IN_NEW_NAMES = '<>:"/\\|?*\0\x1f'
_UNSAFE_IN_NAMES = "/\0"


def collection_name(name: str, *, new: bool = False) -> None:
    """Raises ApiError when no collection can have this name."""
    if not 1 <= len(name) <= _LONGEST_NAME:
        text = f'value "{name}" invalid, must be from 1 to {_LONGEST_NAME} characters'
        raise validation("collection_name", text)
    for character in _UNSAFE_IN_NEW_NAMES if new else _UNSAFE_IN_NAMES:
        if character in name:
            text = f'collection name cannot contain "{character}" char'
            raise validation("collection_name", text)


def at_least(request: Any, field: str, least: float, most: float | None = None) -> None:
    """Raises ApiError when an optional number is given and outside its limits."""
    if not request.HasField(field):
        return
    value = getattr(request, field)
    if most is None and value < least:
        raise validation(field, f"value {value} invalid, must be {least} or larger")
    if most is not None and not least <= value <= most:
        raise validation(field, f"value {value} invalid, must be from {least} to {most}")


def strict_update(info: pb.CollectionInfo, condition: pb.Filter) -> None:
    """Raises ApiError when strict mode wants indexes of what a write filters by, and one is missing."""
    strict = info.config.strict_mode_config
    if not strict.HasField("unindexed_filtering_update") or strict.unindexed_filtering_update:
        return
    for each in (*condition.must, *condition.should, *condition.must_not):
        kind = each.WhichOneof("condition_one_of")
        if kind == "filter":
            strict_update(info, each.filter)
        elif kind in ("field", "is_empty", "is_null"):
            key = getattr(each, kind).key
            if key not in info.payload_schema:
                raise invalid(
                    f'Bad request: Index required but not found for "{key}" of one of the following types: '
                    "[integer]. Help: Create an index for this key or use a different filter."
                )


def create_collection(request: pb.CreateCollection) -> None:
    """Raises ApiError when a request to create a collection is outside the limits."""
    collection_name(request.collection_name, new=True)
    for field in ("shard_number", "replication_factor", "write_consistency_factor"):
        at_least(request, field, 1)
    _settings(request)
    for name, params in vector_params(request.vectors_config).items():
        if not 1 <= params.size <= 65536:
            text = f"value {params.size} invalid, must be from 1 to 65536"
            raise validation(f"vectors_config.{name or 'config'}.size", text)
        if params.distance == pb.UnknownDistance:
            raise validation(f"vectors_config.{name or 'config'}", "unknown distance")
        if params.HasField("multivector_config"):
            raise unimplemented("multi vectors")
    if request.HasField("sparse_vectors_config"):
        raise unimplemented("sparse vectors")
    if request.sharding_method == pb.Custom:
        raise unimplemented("custom sharding")


def update_collection(request: pb.UpdateCollection) -> None:
    """Raises ApiError when a request to change a collection is outside the limits."""
    collection_name(request.collection_name)
    at_least(request, "timeout", 1)
    for field in ("replication_factor", "write_consistency_factor"):
        at_least(request.params, field, 1)
    _settings(request)
    if request.HasField("sparse_vectors_config"):
        raise unimplemented("sparse vectors")


def _settings(request: Any) -> None:
    at_least(request.hnsw_config, "ef_construct", 4)
    at_least(request.optimizers_config, "deleted_threshold", 0.0, 1.0)
    at_least(request.optimizers_config, "vacuum_min_vector_number", 100)
    at_least(request.optimizers_config, "max_segment_size", 1)
    at_least(request.quantization_config.scalar, "quantile", 0.5, 1.0)


def vector_params(config: pb.VectorsConfig) -> dict[str, pb.VectorParams]:
    """The vectors of a collection by name; the unnamed one is ""."""
    match config.WhichOneof("config"):
        case "params":
            return {"": config.params}
        case "params_map":
            return dict(config.params_map.map)
    return {}


def query(request: Any) -> None:
    """Raises ApiError when a query or a prefetch is outside the limits."""
    at_least(request, "limit", 1)
    at_least(request.params, "hnsw_ef", 1)
    at_least(request.params.quantization, "oversampling", 1.0)
    for prefetch in request.prefetch:
        query(prefetch)

"""What a collection is: the server's defaults, changes to them, and the engine's form of both."""

from __future__ import annotations

from typing import Any

import qdrant_edge as qe

from router_service.backends.qdrant_server.wire import q as pb
from tests.qdrant_standin.checks import vector_params
from tests.qdrant_standin.errors import bad_input

# A collection without vectors has this one in the engine, which wants one at least.
PLACEHOLDER = "no-vectors"
_DISTANCES = {
    pb.Cosine: qe.Distance.Cosine,
    pb.Euclid: qe.Distance.Euclid,
    pb.Dot: qe.Distance.Dot,
    pb.Manhattan: qe.Distance.Manhattan,
}
_MEMORIES = {pb.Cold: qe.Memory.Cold, pb.Cached: qe.Memory.Cached, pb.Pinned: qe.Memory.Pinned}


# Settings that a request to create a collection has itself, and a configuration in its `params`.
_PARAMS = (
    "shard_number",
    "replication_factor",
    "write_consistency_factor",
    "on_disk_payload",
    "payload",
    "vectors_config",
)


def new_config(
    request: pb.CreateCollection, indexing_threshold_kb: int, peers: int = 1
) -> pb.CollectionConfig:
    """The configuration of a collection as a server without settings of its own completes it."""
    config = _defaults(indexing_threshold_kb)
    config.params.shard_number = peers
    for field, value in request.ListFields():
        if field.name in _PARAMS:
            _assign(config.params, field.name, value)
        elif field.name in ("quantization_config", "strict_mode_config"):
            _assign(config, field.name, value)
    config.hnsw_config.MergeFrom(request.hnsw_config)
    config.optimizer_config.MergeFrom(request.optimizers_config)
    config.wal_config.MergeFrom(request.wal_config)
    for name, value in request.metadata.items():
        config.metadata[name].CopyFrom(value)
    return config


def _defaults(indexing_threshold_kb: int) -> pb.CollectionConfig:
    auto = pb.MaxOptimizationThreads(setting=pb.MaxOptimizationThreads.Auto)
    return pb.CollectionConfig(
        params=pb.CollectionParams(
            shard_number=1, replication_factor=1, write_consistency_factor=1, on_disk_payload=True
        ),
        hnsw_config=pb.HnswConfigDiff(
            m=16, ef_construct=100, full_scan_threshold=10_000, max_indexing_threads=0
        ),
        optimizer_config=pb.OptimizersConfigDiff(
            deleted_threshold=0.2,
            vacuum_min_vector_number=1000,
            default_segment_number=0,
            indexing_threshold=indexing_threshold_kb,
            flush_interval_sec=5,
            max_optimization_threads=auto,
        ),
        wal_config=pb.WalConfigDiff(wal_capacity_mb=32, wal_segments_ahead=0, wal_retain_closed=1),
    )


def changed(config: pb.CollectionConfig, request: pb.UpdateCollection) -> pb.CollectionConfig:
    """The configuration after an update; what the request leaves out stays."""
    result = pb.CollectionConfig()
    result.CopyFrom(config)
    result.optimizer_config.MergeFrom(request.optimizers_config)
    result.hnsw_config.MergeFrom(request.hnsw_config)
    if request.HasField("strict_mode_config"):
        result.strict_mode_config.MergeFrom(request.strict_mode_config)
    for field, value in request.params.ListFields():
        _assign(result.params, field.name, value)
    _change_vectors(result.params.vectors_config, request.vectors_config)
    if request.HasField("quantization_config"):
        _change_quantization(result, request.quantization_config)
    for name, value in request.metadata.items():
        result.metadata[name].CopyFrom(value)
    return result


def _assign(message: Any, field: str, value: Any) -> None:
    if hasattr(value, "CopyFrom"):
        getattr(message, field).CopyFrom(value)
    else:
        setattr(message, field, value)


def _change_vectors(config: pb.VectorsConfig, diff: pb.VectorsConfigDiff) -> None:
    kind = diff.WhichOneof("config")
    diffs = {"": diff.params} if kind == "params" else dict(diff.params_map.map)
    if kind is None:
        return
    stored = vector_params(config)
    for name, change in diffs.items():
        if name not in stored:
            raise bad_input(f"Not existing vector name error: {name}")
        _change_vector(stored[name], change)


def _change_vector(params: pb.VectorParams, diff: pb.VectorParamsDiff) -> None:
    for field, value in diff.ListFields():
        if field.name == "hnsw_config":
            params.hnsw_config.MergeFrom(value)
        elif field.name == "quantization_config":
            _change_quantization(params, value)
        else:
            _assign(params, field.name, value)


def _change_quantization(message: Any, diff: pb.QuantizationConfigDiff) -> None:
    kind = diff.WhichOneof("quantization")
    message.ClearField("quantization_config")
    if kind not in (None, "disabled"):
        getattr(message.quantization_config, kind).CopyFrom(getattr(diff, kind))


def engine_config(config: pb.CollectionConfig) -> Any:
    """The engine's form."""
    vectors = {
        name: _vector(params, config.hnsw_config)
        for name, params in vector_params(config.params.vectors_config).items()
    }
    return qe.EdgeConfig(
        vectors=vectors or {PLACEHOLDER: qe.EdgeVectorParams(1, qe.Distance.Dot)},
        on_disk_payload=config.params.on_disk_payload,
        hnsw_config=_graph(config.hnsw_config),
        quantization_config=_quantization(config),
        optimizers=_optimizers(config.optimizer_config),
        max_search_threads=1,
    )


def _vector(params: pb.VectorParams, graph: pb.HnswConfigDiff) -> Any:
    own = pb.HnswConfigDiff()
    own.CopyFrom(graph)
    own.MergeFrom(params.hnsw_config)
    kinds = {name.lower(): kind for name, kind in vars(qe.VectorStorageDatatype).items()}
    datatype = pb.Datatype.Name(params.datatype).lower()
    return qe.EdgeVectorParams(
        params.size,
        _DISTANCES[params.distance],
        on_disk=_optional(params, "on_disk"),
        datatype=kinds.get(datatype),
        quantization_config=_quantization(params),
        hnsw_config=_graph(own) if params.HasField("hnsw_config") else None,
        memory=_memory(params),
    )


def _graph(graph: pb.HnswConfigDiff) -> Any:
    return qe.HnswIndexConfig(
        graph.m,
        graph.ef_construct,
        graph.full_scan_threshold,
        graph.max_indexing_threads,
        on_disk=_optional(graph, "on_disk"),
        payload_m=_optional(graph, "payload_m"),
        inline_storage=_optional(graph, "inline_storage"),
        memory=_memory(graph),
    )


def _optimizers(optimizers: pb.OptimizersConfigDiff) -> Any:
    return qe.EdgeOptimizersConfig(
        deleted_threshold=optimizers.deleted_threshold,
        vacuum_min_vector_number=optimizers.vacuum_min_vector_number,
        default_segment_number=optimizers.default_segment_number,
        max_segment_size=_optional(optimizers, "max_segment_size"),
        indexing_threshold=optimizers.indexing_threshold,
        prevent_unoptimized=_optional(optimizers, "prevent_unoptimized"),
    )


def _quantization(message: Any) -> Any:
    """The quantization of a collection or a vector, None without one."""
    if not message.HasField("quantization_config"):
        return None
    kind = message.quantization_config.WhichOneof("quantization")
    given = getattr(message.quantization_config, kind)
    placed = {"always_ram": _optional(given, "always_ram"), "memory": _memory(given)}
    match kind:
        case "scalar":
            quantile = _optional(given, "quantile")
            return qe.ScalarQuantizationConfig(qe.ScalarType.Int8, quantile, **placed)
        case "product":
            ratio = getattr(qe.CompressionRatio, f"X{4 << given.compression}")
            return qe.ProductQuantizationConfig(ratio, **placed)
        case "binary":
            return qe.BinaryQuantizationConfig(**placed, **_binary(given))
    bits = pb.TurboQuantBitSize.Name(given.bits) if given.HasField("bits") else None
    size = getattr(qe.TurboQuantBitSize, bits) if bits else None
    return qe.TurboQuantQuantizationConfig(bits=size, **placed)


def _binary(given: pb.BinaryQuantization) -> dict[str, Any]:
    stored, asked = qe.BinaryQuantizationEncoding, qe.BinaryQuantizationQueryEncoding
    options: dict[str, Any] = {}
    if given.HasField("encoding"):
        name = pb.BinaryQuantizationEncoding.Name(given.encoding)
        options["encoding"] = getattr(stored, name)
    if given.HasField("query_encoding"):
        name = pb.BinaryQuantizationQueryEncoding.Setting.Name(given.query_encoding.setting)
        options["query_encoding"] = getattr(asked, name)
    return options


def _memory(message: Any) -> Any:
    return _MEMORIES.get(message.memory) if message.HasField("memory") else None


def _optional(message: Any, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None

from knnmoe.v1 import operations_pb2 as _operations_pb2
from knnmoe.v1 import routing_pb2 as _routing_pb2
from knnmoe.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Durability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DURABILITY_UNSPECIFIED: _ClassVar[Durability]
    DURABILITY_PROCESS: _ClassVar[Durability]
    DURABILITY_FSYNC: _ClassVar[Durability]
DURABILITY_UNSPECIFIED: Durability
DURABILITY_PROCESS: Durability
DURABILITY_FSYNC: Durability

class CreateMemoryRequest(_message.Message):
    __slots__ = ("name", "fingerprint", "settings")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: _types_pb2.ModelFingerprint
    settings: _types_pb2.MemorySettings
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[_Union[_types_pb2.ModelFingerprint, _Mapping]] = ..., settings: _Optional[_Union[_types_pb2.MemorySettings, _Mapping]] = ...) -> None: ...

class CreateMemoryResponse(_message.Message):
    __slots__ = ("memory",)
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    memory: _routing_pb2.MemoryDescription
    def __init__(self, memory: _Optional[_Union[_routing_pb2.MemoryDescription, _Mapping]] = ...) -> None: ...

class ListMemoriesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListMemoriesResponse(_message.Message):
    __slots__ = ("memories",)
    MEMORIES_FIELD_NUMBER: _ClassVar[int]
    memories: _containers.RepeatedCompositeFieldContainer[_routing_pb2.MemoryDescription]
    def __init__(self, memories: _Optional[_Iterable[_Union[_routing_pb2.MemoryDescription, _Mapping]]] = ...) -> None: ...

class DescribeMemoryRequest(_message.Message):
    __slots__ = ("memory",)
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    memory: str
    def __init__(self, memory: _Optional[str] = ...) -> None: ...

class DescribeMemoryResponse(_message.Message):
    __slots__ = ("memory",)
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    memory: _routing_pb2.MemoryDescription
    def __init__(self, memory: _Optional[_Union[_routing_pb2.MemoryDescription, _Mapping]] = ...) -> None: ...

class DeleteMemoryRequest(_message.Message):
    __slots__ = ("memory",)
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    memory: str
    def __init__(self, memory: _Optional[str] = ...) -> None: ...

class DeleteMemoryResponse(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: int
    def __init__(self, entries: _Optional[int] = ...) -> None: ...

class ReplaceMemoryRequest(_message.Message):
    __slots__ = ("memory", "by")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    memory: str
    by: str
    def __init__(self, memory: _Optional[str] = ..., by: _Optional[str] = ...) -> None: ...

class ReplaceMemoryResponse(_message.Message):
    __slots__ = ("memory", "removed")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    memory: _routing_pb2.MemoryDescription
    removed: int
    def __init__(self, memory: _Optional[_Union[_routing_pb2.MemoryDescription, _Mapping]] = ..., removed: _Optional[int] = ...) -> None: ...

class UpdateSettingsRequest(_message.Message):
    __slots__ = ("memory", "settings")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    memory: str
    settings: _types_pb2.MemorySettings
    def __init__(self, memory: _Optional[str] = ..., settings: _Optional[_Union[_types_pb2.MemorySettings, _Mapping]] = ...) -> None: ...

class UpdateSettingsResponse(_message.Message):
    __slots__ = ("memory",)
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    memory: _routing_pb2.MemoryDescription
    def __init__(self, memory: _Optional[_Union[_routing_pb2.MemoryDescription, _Mapping]] = ...) -> None: ...

class Entries(_message.Message):
    __slots__ = ("ids", "keys", "assignments", "logit_deltas", "logits", "provenance")
    IDS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENTS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_DELTAS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    ids: _types_pb2.Tensor
    keys: _types_pb2.Tensor
    assignments: _types_pb2.SparseAssignment
    logit_deltas: _types_pb2.Tensor
    logits: _types_pb2.Tensor
    provenance: _containers.RepeatedCompositeFieldContainer[_types_pb2.Provenance]
    def __init__(self, ids: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., keys: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., assignments: _Optional[_Union[_types_pb2.SparseAssignment, _Mapping]] = ..., logit_deltas: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., logits: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., provenance: _Optional[_Iterable[_Union[_types_pb2.Provenance, _Mapping]]] = ...) -> None: ...

class UpsertRequest(_message.Message):
    __slots__ = ("memory", "layer", "entries", "durability", "request_id", "model_digest")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    memory: str
    layer: int
    entries: Entries
    durability: Durability
    request_id: int
    model_digest: str
    def __init__(self, memory: _Optional[str] = ..., layer: _Optional[int] = ..., entries: _Optional[_Union[Entries, _Mapping]] = ..., durability: _Optional[_Union[Durability, str]] = ..., request_id: _Optional[int] = ..., model_digest: _Optional[str] = ...) -> None: ...

class UpsertResponse(_message.Message):
    __slots__ = ("request_id", "upserted")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    UPSERTED_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    upserted: int
    def __init__(self, request_id: _Optional[int] = ..., upserted: _Optional[int] = ...) -> None: ...

class CountRequest(_message.Message):
    __slots__ = ("memory", "layer", "ids")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    memory: str
    layer: int
    ids: _types_pb2.Tensor
    def __init__(self, memory: _Optional[str] = ..., layer: _Optional[int] = ..., ids: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ...) -> None: ...

class CountResponse(_message.Message):
    __slots__ = ("layers", "total")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[_routing_pb2.LayerDescription]
    total: int
    def __init__(self, layers: _Optional[_Iterable[_Union[_routing_pb2.LayerDescription, _Mapping]]] = ..., total: _Optional[int] = ...) -> None: ...

class ExportRequest(_message.Message):
    __slots__ = ("memory", "layer", "batch_size", "without_keys", "sample")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_KEYS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    memory: str
    layer: int
    batch_size: int
    without_keys: bool
    sample: int
    def __init__(self, memory: _Optional[str] = ..., layer: _Optional[int] = ..., batch_size: _Optional[int] = ..., without_keys: _Optional[bool] = ..., sample: _Optional[int] = ...) -> None: ...

class ExportResponse(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: Entries
    def __init__(self, entries: _Optional[_Union[Entries, _Mapping]] = ...) -> None: ...

class CalibrateRequest(_message.Message):
    __slots__ = ("memory", "lambda0", "quantile", "inputs", "sample", "dry_run")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    LAMBDA0_FIELD_NUMBER: _ClassVar[int]
    QUANTILE_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    memory: str
    lambda0: float
    quantile: float
    inputs: _containers.RepeatedCompositeFieldContainer[LayerInputs]
    sample: int
    dry_run: bool
    def __init__(self, memory: _Optional[str] = ..., lambda0: _Optional[float] = ..., quantile: _Optional[float] = ..., inputs: _Optional[_Iterable[_Union[LayerInputs, _Mapping]]] = ..., sample: _Optional[int] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class LayerInputs(_message.Message):
    __slots__ = ("layer", "router_inputs")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ROUTER_INPUTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    router_inputs: _types_pb2.Tensor
    def __init__(self, layer: _Optional[int] = ..., router_inputs: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ...) -> None: ...

class CalibrateResponse(_message.Message):
    __slots__ = ("layers", "memory")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerCalibration]
    memory: _routing_pb2.MemoryDescription
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerCalibration, _Mapping]]] = ..., memory: _Optional[_Union[_routing_pb2.MemoryDescription, _Mapping]] = ...) -> None: ...

class CalibrateWatchedRequest(_message.Message):
    __slots__ = ("memory", "lambda0", "quantile", "inputs", "sample", "dry_run")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    LAMBDA0_FIELD_NUMBER: _ClassVar[int]
    QUANTILE_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    memory: str
    lambda0: float
    quantile: float
    inputs: _containers.RepeatedCompositeFieldContainer[LayerInputs]
    sample: int
    dry_run: bool
    def __init__(self, memory: _Optional[str] = ..., lambda0: _Optional[float] = ..., quantile: _Optional[float] = ..., inputs: _Optional[_Iterable[_Union[LayerInputs, _Mapping]]] = ..., sample: _Optional[int] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class CalibrateWatchedResponse(_message.Message):
    __slots__ = ("operation", "calibration")
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    operation: _operations_pb2.Operation
    calibration: CalibrateResponse
    def __init__(self, operation: _Optional[_Union[_operations_pb2.Operation, _Mapping]] = ..., calibration: _Optional[_Union[CalibrateResponse, _Mapping]] = ...) -> None: ...

class LayerCalibration(_message.Message):
    __slots__ = ("layer", "squared_distance", "gamma", "queries", "copies", "typical_squared_distance")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SQUARED_DISTANCE_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    TYPICAL_SQUARED_DISTANCE_FIELD_NUMBER: _ClassVar[int]
    layer: int
    squared_distance: float
    gamma: float
    queries: int
    copies: int
    typical_squared_distance: float
    def __init__(self, layer: _Optional[int] = ..., squared_distance: _Optional[float] = ..., gamma: _Optional[float] = ..., queries: _Optional[int] = ..., copies: _Optional[int] = ..., typical_squared_distance: _Optional[float] = ...) -> None: ...

class OptimizeRequest(_message.Message):
    __slots__ = ("memory", "layers", "quantization", "recall")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    RECALL_FIELD_NUMBER: _ClassVar[int]
    memory: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    quantization: str
    recall: float
    def __init__(self, memory: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ..., quantization: _Optional[str] = ..., recall: _Optional[float] = ...) -> None: ...

class SearchChoice(_message.Message):
    __slots__ = ("hnsw_ef", "oversampling", "neighbours", "layers")
    HNSW_EF_FIELD_NUMBER: _ClassVar[int]
    OVERSAMPLING_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    hnsw_ef: int
    oversampling: float
    neighbours: int
    layers: _containers.RepeatedCompositeFieldContainer[LayerSearch]
    def __init__(self, hnsw_ef: _Optional[int] = ..., oversampling: _Optional[float] = ..., neighbours: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[LayerSearch, _Mapping]]] = ...) -> None: ...

class LayerSearch(_message.Message):
    __slots__ = ("layer", "queries", "recall_at_1", "recall_at_k", "ms_per_lookup", "exact", "segments")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    RECALL_AT_1_FIELD_NUMBER: _ClassVar[int]
    RECALL_AT_K_FIELD_NUMBER: _ClassVar[int]
    MS_PER_LOOKUP_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    queries: int
    recall_at_1: float
    recall_at_k: float
    ms_per_lookup: float
    exact: bool
    segments: int
    def __init__(self, layer: _Optional[int] = ..., queries: _Optional[int] = ..., recall_at_1: _Optional[float] = ..., recall_at_k: _Optional[float] = ..., ms_per_lookup: _Optional[float] = ..., exact: _Optional[bool] = ..., segments: _Optional[int] = ...) -> None: ...

class OptimizeResponse(_message.Message):
    __slots__ = ("layer", "elapsed_s", "operation", "recall", "search")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    RECALL_FIELD_NUMBER: _ClassVar[int]
    SEARCH_FIELD_NUMBER: _ClassVar[int]
    layer: _routing_pb2.LayerDescription
    elapsed_s: float
    operation: _operations_pb2.Operation
    recall: float
    search: SearchChoice
    def __init__(self, layer: _Optional[_Union[_routing_pb2.LayerDescription, _Mapping]] = ..., elapsed_s: _Optional[float] = ..., operation: _Optional[_Union[_operations_pb2.Operation, _Mapping]] = ..., recall: _Optional[float] = ..., search: _Optional[_Union[SearchChoice, _Mapping]] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ("memory",)
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    memory: str
    def __init__(self, memory: _Optional[str] = ...) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("memories", "uptime_s", "resident_bytes", "service_version", "in_flight", "refused_lookups", "duration_bounds_s", "replicas")
    class RefusedLookupsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    MEMORIES_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SERVICE_VERSION_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    REFUSED_LOOKUPS_FIELD_NUMBER: _ClassVar[int]
    DURATION_BOUNDS_S_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    memories: _containers.RepeatedCompositeFieldContainer[MemoryStats]
    uptime_s: int
    resident_bytes: int
    service_version: str
    in_flight: int
    refused_lookups: _containers.ScalarMap[str, int]
    duration_bounds_s: _containers.RepeatedScalarFieldContainer[float]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaStats]
    def __init__(self, memories: _Optional[_Iterable[_Union[MemoryStats, _Mapping]]] = ..., uptime_s: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., service_version: _Optional[str] = ..., in_flight: _Optional[int] = ..., refused_lookups: _Optional[_Mapping[str, int]] = ..., duration_bounds_s: _Optional[_Iterable[float]] = ..., replicas: _Optional[_Iterable[_Union[ReplicaStats, _Mapping]]] = ...) -> None: ...

class ReplicaStats(_message.Message):
    __slots__ = ("memory", "version", "memory_version", "connected_s")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMORY_VERSION_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_S_FIELD_NUMBER: _ClassVar[int]
    memory: str
    version: int
    memory_version: int
    connected_s: int
    def __init__(self, memory: _Optional[str] = ..., version: _Optional[int] = ..., memory_version: _Optional[int] = ..., connected_s: _Optional[int] = ...) -> None: ...

class MemoryStats(_message.Message):
    __slots__ = ("memory", "layers", "stages")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    memory: str
    layers: _containers.RepeatedCompositeFieldContainer[LayerStats]
    stages: _containers.RepeatedCompositeFieldContainer[StageDurations]
    def __init__(self, memory: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[LayerStats, _Mapping]]] = ..., stages: _Optional[_Iterable[_Union[StageDurations, _Mapping]]] = ...) -> None: ...

class StageDurations(_message.Message):
    __slots__ = ("stage", "counts", "sum_s")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    SUM_S_FIELD_NUMBER: _ClassVar[int]
    stage: str
    counts: _containers.RepeatedScalarFieldContainer[int]
    sum_s: float
    def __init__(self, stage: _Optional[str] = ..., counts: _Optional[_Iterable[int]] = ..., sum_s: _Optional[float] = ...) -> None: ...

class LayerStats(_message.Message):
    __slots__ = ("layer", "entries", "disk_bytes", "route_requests", "tokens", "tokens_abstained", "mean_lambda", "mean_search_ms", "hits", "entries_never_hit", "disk_bytes_unknown", "lambda_counts", "abstained_empty", "abstained_too_far", "abstained_layer_off", "replica_requests", "replica_tokens", "replica_abstained")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROUTE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_ABSTAINED_FIELD_NUMBER: _ClassVar[int]
    MEAN_LAMBDA_FIELD_NUMBER: _ClassVar[int]
    MEAN_SEARCH_MS_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_NEVER_HIT_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    LAMBDA_COUNTS_FIELD_NUMBER: _ClassVar[int]
    ABSTAINED_EMPTY_FIELD_NUMBER: _ClassVar[int]
    ABSTAINED_TOO_FAR_FIELD_NUMBER: _ClassVar[int]
    ABSTAINED_LAYER_OFF_FIELD_NUMBER: _ClassVar[int]
    REPLICA_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    REPLICA_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ABSTAINED_FIELD_NUMBER: _ClassVar[int]
    layer: int
    entries: int
    disk_bytes: int
    route_requests: int
    tokens: int
    tokens_abstained: int
    mean_lambda: float
    mean_search_ms: float
    hits: int
    entries_never_hit: int
    disk_bytes_unknown: bool
    lambda_counts: _containers.RepeatedScalarFieldContainer[int]
    abstained_empty: int
    abstained_too_far: int
    abstained_layer_off: int
    replica_requests: int
    replica_tokens: int
    replica_abstained: int
    def __init__(self, layer: _Optional[int] = ..., entries: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., route_requests: _Optional[int] = ..., tokens: _Optional[int] = ..., tokens_abstained: _Optional[int] = ..., mean_lambda: _Optional[float] = ..., mean_search_ms: _Optional[float] = ..., hits: _Optional[int] = ..., entries_never_hit: _Optional[int] = ..., disk_bytes_unknown: _Optional[bool] = ..., lambda_counts: _Optional[_Iterable[int]] = ..., abstained_empty: _Optional[int] = ..., abstained_too_far: _Optional[int] = ..., abstained_layer_off: _Optional[int] = ..., replica_requests: _Optional[int] = ..., replica_tokens: _Optional[int] = ..., replica_abstained: _Optional[int] = ...) -> None: ...

class ExplainEntryRequest(_message.Message):
    __slots__ = ("memory", "layer", "id", "neighbours")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    memory: str
    layer: int
    id: int
    neighbours: int
    def __init__(self, memory: _Optional[str] = ..., layer: _Optional[int] = ..., id: _Optional[int] = ..., neighbours: _Optional[int] = ...) -> None: ...

class ExplainEntryResponse(_message.Message):
    __slots__ = ("provenance", "token", "neighbours")
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    provenance: _types_pb2.Provenance
    token: LookedUpToken
    neighbours: int
    def __init__(self, provenance: _Optional[_Union[_types_pb2.Provenance, _Mapping]] = ..., token: _Optional[_Union[LookedUpToken, _Mapping]] = ..., neighbours: _Optional[int] = ...) -> None: ...

class RecentLookupsRequest(_message.Message):
    __slots__ = ("memory", "layer")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    memory: str
    layer: int
    def __init__(self, memory: _Optional[str] = ..., layer: _Optional[int] = ...) -> None: ...

class RecentLookupsResponse(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[LookedUpToken]
    def __init__(self, tokens: _Optional[_Iterable[_Union[LookedUpToken, _Mapping]]] = ...) -> None: ...

class LookedUpToken(_message.Message):
    __slots__ = ("at_unix_ms", "tokens", "abstained", "cases")
    AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAMBDA_FIELD_NUMBER: _ClassVar[int]
    ABSTAINED_FIELD_NUMBER: _ClassVar[int]
    CASES_FIELD_NUMBER: _ClassVar[int]
    at_unix_ms: int
    tokens: int
    abstained: _routing_pb2.AbstainReason
    cases: _containers.RepeatedCompositeFieldContainer[Case]
    def __init__(self, at_unix_ms: _Optional[int] = ..., tokens: _Optional[int] = ..., abstained: _Optional[_Union[_routing_pb2.AbstainReason, str]] = ..., cases: _Optional[_Iterable[_Union[Case, _Mapping]]] = ..., **kwargs) -> None: ...

class Case(_message.Message):
    __slots__ = ("id", "squared_distance", "similarity", "provenance", "experts", "weights")
    ID_FIELD_NUMBER: _ClassVar[int]
    SQUARED_DISTANCE_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    id: int
    squared_distance: float
    similarity: float
    provenance: _types_pb2.Provenance
    experts: _containers.RepeatedScalarFieldContainer[int]
    weights: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, id: _Optional[int] = ..., squared_distance: _Optional[float] = ..., similarity: _Optional[float] = ..., provenance: _Optional[_Union[_types_pb2.Provenance, _Mapping]] = ..., experts: _Optional[_Iterable[int]] = ..., weights: _Optional[_Iterable[float]] = ...) -> None: ...

class ListSourcesRequest(_message.Message):
    __slots__ = ("memory", "layers")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    memory: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, memory: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ...) -> None: ...

class ListSourcesResponse(_message.Message):
    __slots__ = ("operation", "page")
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    PAGE_FIELD_NUMBER: _ClassVar[int]
    operation: _operations_pb2.Operation
    page: SourcePage
    def __init__(self, operation: _Optional[_Union[_operations_pb2.Operation, _Mapping]] = ..., page: _Optional[_Union[SourcePage, _Mapping]] = ...) -> None: ...

class SourcePage(_message.Message):
    __slots__ = ("sources", "unlisted_entries")
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    UNLISTED_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    sources: _containers.RepeatedCompositeFieldContainer[SourceDescription]
    unlisted_entries: int
    def __init__(self, sources: _Optional[_Iterable[_Union[SourceDescription, _Mapping]]] = ..., unlisted_entries: _Optional[int] = ...) -> None: ...

class SourceDescription(_message.Message):
    __slots__ = ("source", "entries", "examples", "first_unix_ms", "last_unix_ms", "hits")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    FIRST_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    LAST_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    source: str
    entries: int
    examples: int
    first_unix_ms: int
    last_unix_ms: int
    hits: int
    def __init__(self, source: _Optional[str] = ..., entries: _Optional[int] = ..., examples: _Optional[int] = ..., first_unix_ms: _Optional[int] = ..., last_unix_ms: _Optional[int] = ..., hits: _Optional[int] = ...) -> None: ...

from knnmoe.v1 import routing_pb2 as _routing_pb2
from knnmoe.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplicateRequest(_message.Message):
    __slots__ = ("memory", "fingerprint", "layers", "key_dtype", "after", "held", "heartbeat_ms")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KEY_DTYPE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_MS_FIELD_NUMBER: _ClassVar[int]
    memory: str
    fingerprint: _types_pb2.ModelFingerprint
    layers: _containers.RepeatedScalarFieldContainer[int]
    key_dtype: _types_pb2.Dtype
    after: ReplicaPosition
    held: _containers.RepeatedCompositeFieldContainer[HeldEntries]
    heartbeat_ms: int
    def __init__(self, memory: _Optional[str] = ..., fingerprint: _Optional[_Union[_types_pb2.ModelFingerprint, _Mapping]] = ..., layers: _Optional[_Iterable[int]] = ..., key_dtype: _Optional[_Union[_types_pb2.Dtype, str]] = ..., after: _Optional[_Union[ReplicaPosition, _Mapping]] = ..., held: _Optional[_Iterable[_Union[HeldEntries, _Mapping]]] = ..., heartbeat_ms: _Optional[int] = ...) -> None: ...

class ReplicaPosition(_message.Message):
    __slots__ = ("epoch", "version")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    epoch: str
    version: int
    def __init__(self, epoch: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class HeldEntries(_message.Message):
    __slots__ = ("layer", "ids", "digests")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    ids: _types_pb2.Tensor
    digests: _types_pb2.Tensor
    def __init__(self, layer: _Optional[int] = ..., ids: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., digests: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ReplicateResponse(_message.Message):
    __slots__ = ("start", "upserted", "deleted", "settings", "synced")
    START_FIELD_NUMBER: _ClassVar[int]
    UPSERTED_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    SYNCED_FIELD_NUMBER: _ClassVar[int]
    start: ReplicaStart
    upserted: ReplicaEntries
    deleted: ReplicaDeletion
    settings: _types_pb2.MemorySettings
    synced: ReplicaSynced
    def __init__(self, start: _Optional[_Union[ReplicaStart, _Mapping]] = ..., upserted: _Optional[_Union[ReplicaEntries, _Mapping]] = ..., deleted: _Optional[_Union[ReplicaDeletion, _Mapping]] = ..., settings: _Optional[_Union[_types_pb2.MemorySettings, _Mapping]] = ..., synced: _Optional[_Union[ReplicaSynced, _Mapping]] = ...) -> None: ...

class ReplicaStart(_message.Message):
    __slots__ = ("memory", "service_version", "entries", "foreign_writes_after_ms")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    SERVICE_VERSION_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    FOREIGN_WRITES_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    memory: _routing_pb2.MemoryDescription
    service_version: str
    entries: int
    foreign_writes_after_ms: int
    def __init__(self, memory: _Optional[_Union[_routing_pb2.MemoryDescription, _Mapping]] = ..., service_version: _Optional[str] = ..., entries: _Optional[int] = ..., foreign_writes_after_ms: _Optional[int] = ...) -> None: ...

class ReplicaEntries(_message.Message):
    __slots__ = ("layer", "ids", "keys", "scales", "assignments", "logit_deltas", "logits", "digests", "examples", "example_numbers")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENTS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_DELTAS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_NUMBERS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    ids: _types_pb2.Tensor
    keys: _types_pb2.Tensor
    scales: _types_pb2.Tensor
    assignments: _types_pb2.SparseAssignment
    logit_deltas: _types_pb2.Tensor
    logits: _types_pb2.Tensor
    digests: _types_pb2.Tensor
    examples: _containers.RepeatedCompositeFieldContainer[_routing_pb2.ExampleRef]
    example_numbers: _types_pb2.Tensor
    def __init__(self, layer: _Optional[int] = ..., ids: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., keys: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., scales: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., assignments: _Optional[_Union[_types_pb2.SparseAssignment, _Mapping]] = ..., logit_deltas: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., logits: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., digests: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., examples: _Optional[_Iterable[_Union[_routing_pb2.ExampleRef, _Mapping]]] = ..., example_numbers: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ReplicaDeletion(_message.Message):
    __slots__ = ("layer", "ids")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    ids: _types_pb2.Tensor
    def __init__(self, layer: _Optional[int] = ..., ids: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ReplicaSynced(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: ReplicaPosition
    def __init__(self, position: _Optional[_Union[ReplicaPosition, _Mapping]] = ...) -> None: ...

class ReportHitsRequest(_message.Message):
    __slots__ = ("memory", "model_digest", "layers", "client", "number")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    memory: str
    model_digest: str
    layers: _containers.RepeatedCompositeFieldContainer[LayerHits]
    client: str
    number: int
    def __init__(self, memory: _Optional[str] = ..., model_digest: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[LayerHits, _Mapping]]] = ..., client: _Optional[str] = ..., number: _Optional[int] = ...) -> None: ...

class LayerHits(_message.Message):
    __slots__ = ("layer", "ids", "hits", "lookups", "tokens", "tokens_abstained", "lambda_sum")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    LOOKUPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_ABSTAINED_FIELD_NUMBER: _ClassVar[int]
    LAMBDA_SUM_FIELD_NUMBER: _ClassVar[int]
    layer: int
    ids: _types_pb2.Tensor
    hits: _types_pb2.Tensor
    lookups: int
    tokens: int
    tokens_abstained: int
    lambda_sum: float
    def __init__(self, layer: _Optional[int] = ..., ids: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., hits: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., lookups: _Optional[int] = ..., tokens: _Optional[int] = ..., tokens_abstained: _Optional[int] = ..., lambda_sum: _Optional[float] = ...) -> None: ...

class ReportHitsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

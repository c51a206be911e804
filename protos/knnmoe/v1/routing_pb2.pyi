from knnmoe.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AbstainReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ABSTAIN_REASON_UNSPECIFIED: _ClassVar[AbstainReason]
    ABSTAIN_REASON_EMPTY: _ClassVar[AbstainReason]
    ABSTAIN_REASON_TOO_FAR: _ClassVar[AbstainReason]
    ABSTAIN_REASON_LAYER_OFF: _ClassVar[AbstainReason]
ABSTAIN_REASON_UNSPECIFIED: AbstainReason
ABSTAIN_REASON_EMPTY: AbstainReason
ABSTAIN_REASON_TOO_FAR: AbstainReason
ABSTAIN_REASON_LAYER_OFF: AbstainReason

class DescribeRequest(_message.Message):
    __slots__ = ("memory", "fingerprint")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    memory: str
    fingerprint: _types_pb2.ModelFingerprint
    def __init__(self, memory: _Optional[str] = ..., fingerprint: _Optional[_Union[_types_pb2.ModelFingerprint, _Mapping]] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("memory", "service_version")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    SERVICE_VERSION_FIELD_NUMBER: _ClassVar[int]
    memory: MemoryDescription
    service_version: str
    def __init__(self, memory: _Optional[_Union[MemoryDescription, _Mapping]] = ..., service_version: _Optional[str] = ...) -> None: ...

class MemoryDescription(_message.Message):
    __slots__ = ("name", "fingerprint", "model_digest", "settings", "layers", "created_unix_ms", "version", "epoch")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: _types_pb2.ModelFingerprint
    model_digest: str
    settings: _types_pb2.MemorySettings
    layers: _containers.RepeatedCompositeFieldContainer[LayerDescription]
    created_unix_ms: int
    version: int
    epoch: str
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[_Union[_types_pb2.ModelFingerprint, _Mapping]] = ..., model_digest: _Optional[str] = ..., settings: _Optional[_Union[_types_pb2.MemorySettings, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[LayerDescription, _Mapping]]] = ..., created_unix_ms: _Optional[int] = ..., version: _Optional[int] = ..., epoch: _Optional[str] = ...) -> None: ...

class LayerDescription(_message.Message):
    __slots__ = ("layer", "entries", "indexed_entries", "quantization")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    INDEXED_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    layer: int
    entries: int
    indexed_entries: int
    quantization: str
    def __init__(self, layer: _Optional[int] = ..., entries: _Optional[int] = ..., indexed_entries: _Optional[int] = ..., quantization: _Optional[str] = ...) -> None: ...

class RouteRequest(_message.Message):
    __slots__ = ("memory", "layer", "model_digest", "router_inputs", "assignment", "router_logits", "neighbours", "with_neighbours", "exclude", "request_id", "timeout_us", "traceparent")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROUTER_INPUTS_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    ROUTER_LOGITS_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    WITH_NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_US_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    memory: str
    layer: int
    model_digest: str
    router_inputs: _types_pb2.Tensor
    assignment: _types_pb2.SparseAssignment
    router_logits: _types_pb2.Tensor
    neighbours: int
    with_neighbours: bool
    exclude: _containers.RepeatedCompositeFieldContainer[ExampleRef]
    request_id: int
    timeout_us: int
    traceparent: str
    def __init__(self, memory: _Optional[str] = ..., layer: _Optional[int] = ..., model_digest: _Optional[str] = ..., router_inputs: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., assignment: _Optional[_Union[_types_pb2.SparseAssignment, _Mapping]] = ..., router_logits: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., neighbours: _Optional[int] = ..., with_neighbours: _Optional[bool] = ..., exclude: _Optional[_Iterable[_Union[ExampleRef, _Mapping]]] = ..., request_id: _Optional[int] = ..., timeout_us: _Optional[int] = ..., traceparent: _Optional[str] = ...) -> None: ...

class ExampleRef(_message.Message):
    __slots__ = ("source", "example")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_FIELD_NUMBER: _ClassVar[int]
    source: str
    example: str
    def __init__(self, source: _Optional[str] = ..., example: _Optional[str] = ...) -> None: ...

class RouteResponse(_message.Message):
    __slots__ = ("request_id", "assignment", "router_logits", "lambdas", "abstained", "neighbours", "times", "memory_version")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    ROUTER_LOGITS_FIELD_NUMBER: _ClassVar[int]
    LAMBDAS_FIELD_NUMBER: _ClassVar[int]
    ABSTAINED_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_VERSION_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    assignment: _types_pb2.SparseAssignment
    router_logits: _types_pb2.Tensor
    lambdas: _types_pb2.Tensor
    abstained: _types_pb2.Tensor
    neighbours: Neighbours
    times: StageTimes
    memory_version: int
    def __init__(self, request_id: _Optional[int] = ..., assignment: _Optional[_Union[_types_pb2.SparseAssignment, _Mapping]] = ..., router_logits: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., lambdas: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., abstained: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., neighbours: _Optional[_Union[Neighbours, _Mapping]] = ..., times: _Optional[_Union[StageTimes, _Mapping]] = ..., memory_version: _Optional[int] = ...) -> None: ...

class Neighbours(_message.Message):
    __slots__ = ("ids", "squared_distances", "similarities", "provenance")
    class ProvenanceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: _types_pb2.Provenance
        def __init__(self, key: _Optional[int] = ..., value: _Optional[_Union[_types_pb2.Provenance, _Mapping]] = ...) -> None: ...
    IDS_FIELD_NUMBER: _ClassVar[int]
    SQUARED_DISTANCES_FIELD_NUMBER: _ClassVar[int]
    SIMILARITIES_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    ids: _types_pb2.Tensor
    squared_distances: _types_pb2.Tensor
    similarities: _types_pb2.Tensor
    provenance: _containers.MessageMap[int, _types_pb2.Provenance]
    def __init__(self, ids: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., squared_distances: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., similarities: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., provenance: _Optional[_Mapping[int, _types_pb2.Provenance]] = ...) -> None: ...

class StageTimes(_message.Message):
    __slots__ = ("decode_ns", "search_ns", "blend_ns", "encode_ns")
    DECODE_NS_FIELD_NUMBER: _ClassVar[int]
    SEARCH_NS_FIELD_NUMBER: _ClassVar[int]
    BLEND_NS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_NS_FIELD_NUMBER: _ClassVar[int]
    decode_ns: int
    search_ns: int
    blend_ns: int
    encode_ns: int
    def __init__(self, decode_ns: _Optional[int] = ..., search_ns: _Optional[int] = ..., blend_ns: _Optional[int] = ..., encode_ns: _Optional[int] = ...) -> None: ...

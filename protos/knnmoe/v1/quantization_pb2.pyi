from knnmoe.v1 import memory_admin_pb2 as _memory_admin_pb2
from knnmoe.v1 import operations_pb2 as _operations_pb2
from knnmoe.v1 import routing_pb2 as _routing_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class QuantizeRequest(_message.Message):
    __slots__ = ("memory", "layers", "compression", "oversampling")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    OVERSAMPLING_FIELD_NUMBER: _ClassVar[int]
    memory: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    compression: str
    oversampling: float
    def __init__(self, memory: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ..., compression: _Optional[str] = ..., oversampling: _Optional[float] = ...) -> None: ...

class QuantizeResponse(_message.Message):
    __slots__ = ("layer", "elapsed_s", "operation", "recall")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    RECALL_FIELD_NUMBER: _ClassVar[int]
    layer: _routing_pb2.LayerDescription
    elapsed_s: float
    operation: _operations_pb2.Operation
    recall: float
    def __init__(self, layer: _Optional[_Union[_routing_pb2.LayerDescription, _Mapping]] = ..., elapsed_s: _Optional[float] = ..., operation: _Optional[_Union[_operations_pb2.Operation, _Mapping]] = ..., recall: _Optional[float] = ...) -> None: ...

class MeasureQuantizationRequest(_message.Message):
    __slots__ = ("memory", "layers", "compressions", "sample", "inputs", "oversampling")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSIONS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OVERSAMPLING_FIELD_NUMBER: _ClassVar[int]
    memory: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    compressions: _containers.RepeatedScalarFieldContainer[str]
    sample: int
    inputs: _containers.RepeatedCompositeFieldContainer[_memory_admin_pb2.LayerInputs]
    oversampling: float
    def __init__(self, memory: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ..., compressions: _Optional[_Iterable[str]] = ..., sample: _Optional[int] = ..., inputs: _Optional[_Iterable[_Union[_memory_admin_pb2.LayerInputs, _Mapping]]] = ..., oversampling: _Optional[float] = ...) -> None: ...

class MeasureQuantizationResponse(_message.Message):
    __slots__ = ("measurement", "operation")
    MEASUREMENT_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    measurement: CompressionMeasurement
    operation: _operations_pb2.Operation
    def __init__(self, measurement: _Optional[_Union[CompressionMeasurement, _Mapping]] = ..., operation: _Optional[_Union[_operations_pb2.Operation, _Mapping]] = ...) -> None: ...

class CompressionMeasurement(_message.Message):
    __slots__ = ("layer", "compression", "oversampling", "entries", "queries", "ram_bytes_per_key", "disk_bytes_per_key", "recall_at_1", "lambda_error_mean", "lambda_error_max", "blend_error_mean", "blend_error_max", "ms_per_query", "build_s")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    OVERSAMPLING_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    RAM_BYTES_PER_KEY_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_PER_KEY_FIELD_NUMBER: _ClassVar[int]
    RECALL_AT_1_FIELD_NUMBER: _ClassVar[int]
    LAMBDA_ERROR_MEAN_FIELD_NUMBER: _ClassVar[int]
    LAMBDA_ERROR_MAX_FIELD_NUMBER: _ClassVar[int]
    BLEND_ERROR_MEAN_FIELD_NUMBER: _ClassVar[int]
    BLEND_ERROR_MAX_FIELD_NUMBER: _ClassVar[int]
    MS_PER_QUERY_FIELD_NUMBER: _ClassVar[int]
    BUILD_S_FIELD_NUMBER: _ClassVar[int]
    layer: int
    compression: str
    oversampling: float
    entries: int
    queries: int
    ram_bytes_per_key: float
    disk_bytes_per_key: float
    recall_at_1: float
    lambda_error_mean: float
    lambda_error_max: float
    blend_error_mean: float
    blend_error_max: float
    ms_per_query: float
    build_s: float
    def __init__(self, layer: _Optional[int] = ..., compression: _Optional[str] = ..., oversampling: _Optional[float] = ..., entries: _Optional[int] = ..., queries: _Optional[int] = ..., ram_bytes_per_key: _Optional[float] = ..., disk_bytes_per_key: _Optional[float] = ..., recall_at_1: _Optional[float] = ..., lambda_error_mean: _Optional[float] = ..., lambda_error_max: _Optional[float] = ..., blend_error_mean: _Optional[float] = ..., blend_error_max: _Optional[float] = ..., ms_per_query: _Optional[float] = ..., build_s: _Optional[float] = ...) -> None: ...

from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_F32: _ClassVar[Dtype]
    DTYPE_F16: _ClassVar[Dtype]
    DTYPE_BF16: _ClassVar[Dtype]
    DTYPE_I32: _ClassVar[Dtype]
    DTYPE_U64: _ClassVar[Dtype]
    DTYPE_U8: _ClassVar[Dtype]
    DTYPE_I8: _ClassVar[Dtype]

class MemoryKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MEMORY_KIND_UNSPECIFIED: _ClassVar[MemoryKind]
    MEMORY_KIND_ASSIGNMENT: _ClassVar[MemoryKind]
    MEMORY_KIND_LOGIT_DELTA: _ClassVar[MemoryKind]
    MEMORY_KIND_LOGITS: _ClassVar[MemoryKind]

class Similarity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SIMILARITY_UNSPECIFIED: _ClassVar[Similarity]
    SIMILARITY_RBF: _ClassVar[Similarity]
    SIMILARITY_COSINE: _ClassVar[Similarity]

class Support(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SUPPORT_UNSPECIFIED: _ClassVar[Support]
    SUPPORT_UNION: _ClassVar[Support]
    SUPPORT_TOP_K: _ClassVar[Support]
DTYPE_UNSPECIFIED: Dtype
DTYPE_F32: Dtype
DTYPE_F16: Dtype
DTYPE_BF16: Dtype
DTYPE_I32: Dtype
DTYPE_U64: Dtype
DTYPE_U8: Dtype
DTYPE_I8: Dtype
MEMORY_KIND_UNSPECIFIED: MemoryKind
MEMORY_KIND_ASSIGNMENT: MemoryKind
MEMORY_KIND_LOGIT_DELTA: MemoryKind
MEMORY_KIND_LOGITS: MemoryKind
SIMILARITY_UNSPECIFIED: Similarity
SIMILARITY_RBF: Similarity
SIMILARITY_COSINE: Similarity
SUPPORT_UNSPECIFIED: Support
SUPPORT_UNION: Support
SUPPORT_TOP_K: Support

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: Dtype
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[_Union[Dtype, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class SparseAssignment(_message.Message):
    __slots__ = ("experts", "weights")
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    experts: Tensor
    weights: Tensor
    def __init__(self, experts: _Optional[_Union[Tensor, _Mapping]] = ..., weights: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class ModelFingerprint(_message.Message):
    __slots__ = ("architecture", "num_layers", "hidden_size", "num_experts", "top_k", "router_hash")
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    ROUTER_HASH_FIELD_NUMBER: _ClassVar[int]
    architecture: str
    num_layers: int
    hidden_size: int
    num_experts: int
    top_k: int
    router_hash: str
    def __init__(self, architecture: _Optional[str] = ..., num_layers: _Optional[int] = ..., hidden_size: _Optional[int] = ..., num_experts: _Optional[int] = ..., top_k: _Optional[int] = ..., router_hash: _Optional[str] = ...) -> None: ...

class MemorySettings(_message.Message):
    __slots__ = ("preset", "kind", "similarity", "neighbours", "gamma", "step_size", "null_weight", "min_lambda", "support", "layers", "hnsw_ef", "oversampling", "search_recall", "exact_layers", "rounds", "round_nll")
    PRESET_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    STEP_SIZE_FIELD_NUMBER: _ClassVar[int]
    NULL_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    MIN_LAMBDA_FIELD_NUMBER: _ClassVar[int]
    SUPPORT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HNSW_EF_FIELD_NUMBER: _ClassVar[int]
    OVERSAMPLING_FIELD_NUMBER: _ClassVar[int]
    SEARCH_RECALL_FIELD_NUMBER: _ClassVar[int]
    EXACT_LAYERS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    ROUND_NLL_FIELD_NUMBER: _ClassVar[int]
    preset: str
    kind: MemoryKind
    similarity: Similarity
    neighbours: int
    gamma: _containers.RepeatedScalarFieldContainer[float]
    step_size: _containers.RepeatedScalarFieldContainer[float]
    null_weight: float
    min_lambda: float
    support: Support
    layers: _containers.RepeatedScalarFieldContainer[int]
    hnsw_ef: int
    oversampling: float
    search_recall: float
    exact_layers: _containers.RepeatedScalarFieldContainer[int]
    rounds: int
    round_nll: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, preset: _Optional[str] = ..., kind: _Optional[_Union[MemoryKind, str]] = ..., similarity: _Optional[_Union[Similarity, str]] = ..., neighbours: _Optional[int] = ..., gamma: _Optional[_Iterable[float]] = ..., step_size: _Optional[_Iterable[float]] = ..., null_weight: _Optional[float] = ..., min_lambda: _Optional[float] = ..., support: _Optional[_Union[Support, str]] = ..., layers: _Optional[_Iterable[int]] = ..., hnsw_ef: _Optional[int] = ..., oversampling: _Optional[float] = ..., search_recall: _Optional[float] = ..., exact_layers: _Optional[_Iterable[int]] = ..., rounds: _Optional[int] = ..., round_nll: _Optional[_Iterable[float]] = ...) -> None: ...

class Provenance(_message.Message):
    __slots__ = ("source", "example", "position", "token", "gain", "created_unix_ms", "snippet", "token_start", "token_end")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    GAIN_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    SNIPPET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_END_FIELD_NUMBER: _ClassVar[int]
    source: str
    example: str
    position: int
    token: int
    gain: float
    created_unix_ms: int
    snippet: str
    token_start: int
    token_end: int
    def __init__(self, source: _Optional[str] = ..., example: _Optional[str] = ..., position: _Optional[int] = ..., token: _Optional[int] = ..., gain: _Optional[float] = ..., created_unix_ms: _Optional[int] = ..., snippet: _Optional[str] = ..., token_start: _Optional[int] = ..., token_end: _Optional[int] = ...) -> None: ...

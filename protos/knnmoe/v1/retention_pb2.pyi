from knnmoe.v1 import memory_admin_pb2 as _memory_admin_pb2
from knnmoe.v1 import operations_pb2 as _operations_pb2
from knnmoe.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PruneRanking(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRUNE_RANKING_UNSPECIFIED: _ClassVar[PruneRanking]
    PRUNE_RANKING_AGE: _ClassVar[PruneRanking]
    PRUNE_RANKING_USE: _ClassVar[PruneRanking]
    PRUNE_RANKING_GAIN: _ClassVar[PruneRanking]
    PRUNE_RANKING_STRENGTH: _ClassVar[PruneRanking]
    PRUNE_RANKING_DISAGREEMENT: _ClassVar[PruneRanking]
    PRUNE_RANKING_COVERAGE: _ClassVar[PruneRanking]
    PRUNE_RANKING_RANDOM: _ClassVar[PruneRanking]
PRUNE_RANKING_UNSPECIFIED: PruneRanking
PRUNE_RANKING_AGE: PruneRanking
PRUNE_RANKING_USE: PruneRanking
PRUNE_RANKING_GAIN: PruneRanking
PRUNE_RANKING_STRENGTH: PruneRanking
PRUNE_RANKING_DISAGREEMENT: PruneRanking
PRUNE_RANKING_COVERAGE: PruneRanking
PRUNE_RANKING_RANDOM: PruneRanking

class EntryFilter(_message.Message):
    __slots__ = ("source", "example")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_FIELD_NUMBER: _ClassVar[int]
    source: str
    example: str
    def __init__(self, source: _Optional[str] = ..., example: _Optional[str] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("memory", "layer", "ids", "filter", "durability", "dry_run")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    memory: str
    layer: int
    ids: _types_pb2.Tensor
    filter: EntryFilter
    durability: _memory_admin_pb2.Durability
    dry_run: bool
    def __init__(self, memory: _Optional[str] = ..., layer: _Optional[int] = ..., ids: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., filter: _Optional[_Union[EntryFilter, _Mapping]] = ..., durability: _Optional[_Union[_memory_admin_pb2.Durability, str]] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ("layers", "deleted")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerDeletion]
    deleted: int
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerDeletion, _Mapping]]] = ..., deleted: _Optional[int] = ...) -> None: ...

class LayerDeletion(_message.Message):
    __slots__ = ("layer", "deleted", "entries")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    deleted: int
    entries: int
    def __init__(self, layer: _Optional[int] = ..., deleted: _Optional[int] = ..., entries: _Optional[int] = ...) -> None: ...

class PrunePlan(_message.Message):
    __slots__ = ("forget", "older_than_unix_ms", "unused_below", "spare_newer_than_unix_ms", "gain_below", "strength_below", "agreement_below", "near_duplicate_similarity", "near_duplicate_agreement", "max_entries", "max_share", "by", "keep_at_least", "seed")
    FORGET_FIELD_NUMBER: _ClassVar[int]
    OLDER_THAN_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    UNUSED_BELOW_FIELD_NUMBER: _ClassVar[int]
    SPARE_NEWER_THAN_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    GAIN_BELOW_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_BELOW_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_BELOW_FIELD_NUMBER: _ClassVar[int]
    NEAR_DUPLICATE_SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    NEAR_DUPLICATE_AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    MAX_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    MAX_SHARE_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    KEEP_AT_LEAST_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    forget: _containers.RepeatedCompositeFieldContainer[EntryFilter]
    older_than_unix_ms: int
    unused_below: int
    spare_newer_than_unix_ms: int
    gain_below: float
    strength_below: float
    agreement_below: float
    near_duplicate_similarity: float
    near_duplicate_agreement: float
    max_entries: int
    max_share: float
    by: PruneRanking
    keep_at_least: int
    seed: int
    def __init__(self, forget: _Optional[_Iterable[_Union[EntryFilter, _Mapping]]] = ..., older_than_unix_ms: _Optional[int] = ..., unused_below: _Optional[int] = ..., spare_newer_than_unix_ms: _Optional[int] = ..., gain_below: _Optional[float] = ..., strength_below: _Optional[float] = ..., agreement_below: _Optional[float] = ..., near_duplicate_similarity: _Optional[float] = ..., near_duplicate_agreement: _Optional[float] = ..., max_entries: _Optional[int] = ..., max_share: _Optional[float] = ..., by: _Optional[_Union[PruneRanking, str]] = ..., keep_at_least: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class PruneRequest(_message.Message):
    __slots__ = ("memory", "layers", "plan", "dry_run")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    memory: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    plan: PrunePlan
    dry_run: bool
    def __init__(self, memory: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ..., plan: _Optional[_Union[PrunePlan, _Mapping]] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class PruneResponse(_message.Message):
    __slots__ = ("operation", "layer")
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    operation: _operations_pb2.Operation
    layer: LayerPruning
    def __init__(self, operation: _Optional[_Union[_operations_pb2.Operation, _Mapping]] = ..., layer: _Optional[_Union[LayerPruning, _Mapping]] = ...) -> None: ...

class LayerPruning(_message.Message):
    __slots__ = ("layer", "entries", "dropped", "kept", "rescued", "bytes_estimate", "reasons", "expected_effect", "incomplete_searches", "deleted", "spared", "elapsed_s")
    class ReasonsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class ExpectedEffectEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    RESCUED_FIELD_NUMBER: _ClassVar[int]
    BYTES_ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_EFFECT_FIELD_NUMBER: _ClassVar[int]
    INCOMPLETE_SEARCHES_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    SPARED_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    layer: int
    entries: int
    dropped: int
    kept: int
    rescued: int
    bytes_estimate: int
    reasons: _containers.ScalarMap[str, int]
    expected_effect: _containers.ScalarMap[str, float]
    incomplete_searches: int
    deleted: int
    spared: int
    elapsed_s: float
    def __init__(self, layer: _Optional[int] = ..., entries: _Optional[int] = ..., dropped: _Optional[int] = ..., kept: _Optional[int] = ..., rescued: _Optional[int] = ..., bytes_estimate: _Optional[int] = ..., reasons: _Optional[_Mapping[str, int]] = ..., expected_effect: _Optional[_Mapping[str, float]] = ..., incomplete_searches: _Optional[int] = ..., deleted: _Optional[int] = ..., spared: _Optional[int] = ..., elapsed_s: _Optional[float] = ...) -> None: ...

"""Messages to domain objects and back. Checks what a message says about itself; the memory checks the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
from knnmoe import tensors
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import routing_pb2 as routing_pb
from knnmoe.v1 import types_pb2 as types_pb

from router_service import __version__
from router_service.arrays import F32, U64, AnyArray, Assignment, Entries, ExampleRef, Provenance
from router_service.backends.base import stays
from router_service.blending import Support
from router_service.errors import InvalidField, InvalidTensor
from router_service.fingerprint import ModelFingerprint
from router_service.memories.layer import RouteAnswer, RouteQuery
from router_service.memories.memory import RoutingMemory
from router_service.memories.settings import Kind, MemorySettings, Similarity, preset

M = TypeVar("M")

# The settings that are enums on the wire.
_ENUMS: dict[str, dict[Any, Any]] = {
    "kind": {
        types_pb.MEMORY_KIND_ASSIGNMENT: Kind.ASSIGNMENT,
        types_pb.MEMORY_KIND_LOGIT_DELTA: Kind.LOGIT_DELTA,
        types_pb.MEMORY_KIND_LOGITS: Kind.LOGITS,
    },
    "similarity": {
        types_pb.SIMILARITY_RBF: Similarity.RBF,
        types_pb.SIMILARITY_COSINE: Similarity.COSINE,
    },
    "support": {types_pb.SUPPORT_UNION: Support.UNION, types_pb.SUPPORT_TOP_K: Support.TOP_K},
}
_LISTS = ("gamma", "step_size", "layers", "exact_layers", "round_nll")
_F16_MAX = float(np.finfo(np.float16).max)


def decode_tensor(field: str, tensor: types_pb.Tensor, dtypes: Collection[int]) -> AnyArray:
    """The array of a tensor. Raises InvalidTensor when it contradicts itself or has none of `dtypes`."""
    if tensor.dtype not in dtypes:
        allowed = ", ".join(tensors.dtype_name(d) for d in sorted(dtypes))
        raise InvalidTensor(field, f"dtype {tensors.dtype_name(tensor.dtype)}", f"dtype {allowed}")
    try:
        return tensors.to_array(tensor)
    except tensors.TensorError as error:
        got, _, wanted = str(error).partition(", expected ")
        raise InvalidTensor(field, got, wanted) from error


def decode_floats(field: str, tensor: types_pb.Tensor) -> F32:
    """A float tensor as f32 (a view when it is f32 on the wire)."""
    return decode_tensor(field, tensor, tensors.FLOATS).astype(np.float32, copy=False)


def decode_ids(field: str, tensor: types_pb.Tensor) -> U64:
    """Entry ids u64 [n]."""
    ids = decode_tensor(field, tensor, [types_pb.DTYPE_U64])
    if ids.ndim != 1:
        raise InvalidTensor(field, f"shape {list(ids.shape)}", "shape [n]")
    return ids


def decode_assignment(field: str, message: types_pb.SparseAssignment) -> Assignment:
    """Experts i32 [T, k] and weights [T, k]; raises InvalidTensor when they are no matrices or the shapes differ."""
    experts = decode_tensor(f"{field}.experts", message.experts, [types_pb.DTYPE_I32])
    weights = decode_floats(f"{field}.weights", message.weights)
    if experts.ndim != 2:
        raise InvalidTensor(f"{field}.experts", f"shape {list(experts.shape)}", "2 dimension(s)")
    if experts.shape != weights.shape:
        raise InvalidTensor(
            f"{field}.weights",
            f"shape {list(weights.shape)}",
            f"shape {list(experts.shape)} (as experts)",
        )
    return Assignment(experts, weights)


def decode_query(
    request: routing_pb.RouteRequest,
    deadline: float | None = None,
    left: Callable[[], bool] = stays,
) -> RouteQuery:
    """What a RouteRequest asks, with what else a RouteQuery has."""
    own: Assignment | F32
    if request.WhichOneof("own") == "assignment":
        own = decode_assignment("assignment", request.assignment)
    elif request.WhichOneof("own") == "router_logits":
        own = decode_floats("router_logits", request.router_logits)
    else:
        raise InvalidField(
            "own", "nothing", "assignment or router_logits, as the memory's kind needs"
        )
    return RouteQuery(
        decode_floats("router_inputs", request.router_inputs),
        own,
        request.neighbours if request.HasField("neighbours") else None,
        [ExampleRef(e.source, e.example) for e in request.exclude],
        deadline,
        left,
    )


def encode_answer(
    request: routing_pb.RouteRequest, answer: RouteAnswer
) -> routing_pb.RouteResponse:
    """The response to a RouteRequest; logits and weights in the dtype of the request."""
    response = routing_pb.RouteResponse(
        request_id=request.request_id, memory_version=answer.version
    )
    tensors.pack(response.lambdas, answer.lambdas)
    tensors.pack(response.abstained, answer.abstained)
    response.times.search_ns, response.times.blend_ns = answer.search_ns, answer.blend_ns
    if isinstance(answer.blended, Assignment):
        tensors.pack(response.assignment.experts, answer.blended.experts)
        dtype = request.assignment.weights.dtype
        _pack_as(response.assignment.weights, answer.blended.weights, dtype)
    elif answer.blended is not None:
        _pack_as(response.router_logits, answer.blended, request.router_logits.dtype)
    return response


def encode_neighbours(
    answer: RouteAnswer, provenance: dict[int, Provenance]
) -> routing_pb.Neighbours:
    """The neighbours of an answer."""
    return routing_pb.Neighbours(
        ids=tensors.to_tensor(answer.neighbours.ids),
        squared_distances=tensors.to_tensor(answer.neighbours.distances),
        similarities=tensors.to_tensor(answer.similarities),
        provenance={entry: encode_provenance(p) for entry, p in provenance.items()},
    )


def _pack_as(message: types_pb.Tensor, array: F32, dtype: int) -> None:
    # Logits beyond f16 saturate: an infinity would poison a softmax
    if dtype == types_pb.DTYPE_F16:
        tensors.pack(message, np.clip(array, -_F16_MAX, _F16_MAX).astype(np.float16))
    else:
        tensors.pack(message, array, bf16=dtype == types_pb.DTYPE_BF16)


def decode_entries(message: admin_pb.Entries, kind: Kind) -> Entries:
    """Entries with their values as rows: logits or logit deltas, or experts followed by weights."""
    ids = decode_ids("entries.ids", message.ids)
    keys = decode_floats("entries.keys", message.keys)
    values = _decode_values(message, kind)
    origins: Sequence[Provenance] = [decode_provenance(p) for p in message.provenance]
    return Entries(ids, keys, values, origins or [Provenance()] * len(ids))


def _decode_values(message: admin_pb.Entries, kind: Kind) -> F32:
    wanted, got = kind.plural, message.WhichOneof("values")
    if got != wanted:
        raise InvalidField(
            "entries.values", got or "nothing", f"{wanted} (the memory holds {wanted})"
        )
    if kind.blends_logits:
        return decode_floats(f"entries.{wanted}", getattr(message, wanted))
    assignment = decode_assignment("entries.assignments", message.assignments)
    return np.concatenate([assignment.experts.astype(np.float32), assignment.weights], axis=-1)


def encode_entries(entries: Entries, kind: Kind) -> admin_pb.Entries:
    """Inverse of decode_entries."""
    return admin_pb.Entries(
        ids=tensors.to_tensor(entries.ids),
        keys=tensors.to_tensor(entries.keys),
        provenance=[encode_provenance(p) for p in entries.provenance],
        **encode_values(entries.values, kind),
    )


def encode_values(values: F32, kind: Kind) -> dict[str, Any]:
    """Value rows [n, W] as the field of a message with entries that the kind of the memory needs."""
    if kind.blends_logits:
        return {kind.plural: tensors.to_tensor(values)}
    half = values.shape[1] // 2
    experts = tensors.to_tensor(values[:, :half].astype(np.int32))
    weights = tensors.to_tensor(values[:, half:])
    return {"assignments": types_pb.SparseAssignment(experts=experts, weights=weights)}


def decode_provenance(message: types_pb.Provenance) -> Provenance:
    """Where an entry came from; `gain` in nats, the time in milliseconds since the epoch."""
    return Provenance(*_fields_of(Provenance)(message))


def encode_provenance(origin: Provenance) -> types_pb.Provenance:
    """Inverse of decode_provenance."""
    return filled(types_pb.Provenance, origin)


def decode_fingerprint(message: types_pb.ModelFingerprint) -> ModelFingerprint:
    """The identity of a model; whether it makes sense, the memory checks."""
    return ModelFingerprint(*_fields_of(ModelFingerprint)(message))


def encode_fingerprint(fingerprint: ModelFingerprint) -> types_pb.ModelFingerprint:
    """Inverse of decode_fingerprint."""
    return filled(types_pb.ModelFingerprint, fingerprint)


@cache
def _fields_of(kind: type) -> Callable[[object], tuple[Any, ...]]:
    """Reads what a dataclass needs, in its order, off an object with attributes of the same names."""
    return attrgetter(*(field.name for field in fields(kind)))


def filled(message: Callable[..., M], source: object, **others: Any) -> M:
    """A message: each field from `others`, else from the attribute of `source` of the same name."""
    given = {name: getattr(source, name) for name in _names_of(message) if name not in others}
    return message(**given, **others)


@cache
def _names_of(message: Any) -> tuple[str, ...]:
    return tuple(field.name for field in message.DESCRIPTOR.fields)


def decode_fsync(durability: int) -> bool:
    """Whether to flush before the acknowledgement; a durability that this version does not know is refused."""
    if durability not in admin_pb.Durability.values():
        raise InvalidField("durability", durability, ", ".join(admin_pb.Durability.keys()[1:]))
    return durability == admin_pb.DURABILITY_FSYNC


def decode_changes(message: types_pb.MemorySettings) -> dict[str, Any]:
    """The settings that a message sets. Raises InvalidField on an enum number that means nothing."""
    changes: dict[str, Any] = {
        name: tuple(getattr(message, name)) for name in _LISTS if len(getattr(message, name))
    }
    for descriptor, value in message.ListFields():
        name = descriptor.name
        if name in _ENUMS:
            if value not in _ENUMS[name]:
                raise InvalidField(
                    f"settings.{name}", value, "one of " + ", ".join(_ENUMS[name].values())
                )
            changes[name] = _ENUMS[name][value]
        elif name not in _LISTS:
            changes[name] = value
    return changes


def decode_settings(message: types_pb.MemorySettings) -> MemorySettings:
    """The preset's settings with what the message sets."""
    base = preset(message.preset or "recommended")
    changes = decode_changes(message) | {"preset": base.preset}
    return MemorySettings(**{**base.fields(), **changes})


def encode_settings(settings: MemorySettings) -> types_pb.MemorySettings:
    """Inverse of decode_settings: every field set, but `rounds` where there were none, as in earlier versions."""
    wire = {name: {v: k for k, v in table.items()} for name, table in _ENUMS.items()}
    values: dict[str, Any] = {
        name: wire[name][v] if name in wire else v for name, v in settings.fields().items()
    }
    values["rounds"] = values["rounds"] or None
    return types_pb.MemorySettings(**values)


def encode_memory(memory: RoutingMemory) -> routing_pb.MemoryDescription:
    """Identity, settings and counts of a memory."""
    record = memory.record
    return routing_pb.MemoryDescription(
        name=record.name,
        fingerprint=encode_fingerprint(record.fingerprint),
        model_digest=record.fingerprint.digest(),
        settings=encode_settings(record.settings),
        layers=[encode_layer(memory, number) for number in range(len(memory.layers))],
        created_unix_ms=record.created_unix_ms,
        version=memory.version,
        epoch=memory.changes.epoch,
    )


def encode_layer(memory: RoutingMemory, number: int) -> routing_pb.LayerDescription:
    """Counts of one layer."""
    info = memory.layer(number).info()
    return routing_pb.LayerDescription(
        layer=number,
        entries=info.entries,
        indexed_entries=info.indexed_entries,
        quantization=info.compression.label,
    )


def encode_described(memory: RoutingMemory) -> routing_pb.DescribeResponse:
    """A memory and the version of the service."""
    return routing_pb.DescribeResponse(memory=encode_memory(memory), service_version=__version__)

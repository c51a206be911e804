"""Ids, payloads, vectors and selectors: messages into what the engine takes, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

import numpy as np
import qdrant_edge as qe

from router_service.backends.qdrant_server.wire import q as pb
from tests.qdrant_standin.errors import invalid, unimplemented

DEFAULT_VECTOR = ""


def point_id(message: pb.PointId) -> int | UUID:
    """An id as the engine has it."""
    match message.WhichOneof("point_id_options"):
        case "num":
            return message.num
        case "uuid":
            return _uuid(message.uuid)
    raise invalid("No ID options provided")


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise invalid(f"Unable to parse UUID: {text}") from None


def point_ids(messages: Iterable[pb.PointId]) -> list[int | UUID]:
    """Ids as the engine has them."""
    return list(map(point_id, messages))


def id_message(value: Any) -> pb.PointId:
    """An id of the engine on the wire."""
    return pb.PointId(num=value) if isinstance(value, int) else pb.PointId(uuid=str(value))


def payload(fields: Mapping[str, pb.Value]) -> dict[str, Any]:
    """A payload as JSON-like Python values."""
    return {name: _value(value) for name, value in fields.items()}


def _value(message: pb.Value) -> Any:
    match message.WhichOneof("kind"):
        case "struct_value":
            return payload(message.struct_value.fields)
        case "list_value":
            return [_value(value) for value in message.list_value.values]
        case "double_value" if not math.isfinite(message.double_value):
            raise invalid("cannot convert to json number")
        case None | "null_value":
            return None
        case kind:
            return getattr(message, kind)


def payload_message(fields: Mapping[str, Any] | None) -> dict[str, pb.Value]:
    """A payload of the engine on the wire."""
    return {name: _value_message(value) for name, value in (fields or {}).items()}


def _value_message(value: Any) -> pb.Value:
    match value:
        case None:
            return pb.Value(null_value=pb.NULL_VALUE)
        case bool():
            return pb.Value(bool_value=value)
        case int():
            return pb.Value(integer_value=value)
        case float():
            return pb.Value(double_value=value)
        case str():
            return pb.Value(string_value=value)
        case dict():
            return pb.Value(struct_value=pb.Struct(fields=payload_message(value)))
    return pb.Value(list_value=pb.ListValue(values=map(_value_message, value)))


def floats(data: Any) -> Any:
    """A row of f32 as a memoryview: the engine takes any sequence, and makes no list of this one."""
    row: Any = np.fromiter(data, np.float32, len(data))
    return memoryview(row)


def dense(message: pb.Vector) -> Any:
    """A dense vector in the form of 1.16 and later (`dense`) or the old one (`data`)."""
    kind = message.WhichOneof("vector")
    if kind not in (None, "dense") or message.HasField("indices"):
        raise unimplemented(f"{kind or 'sparse'} vectors")
    if message.HasField("vectors_count"):
        raise unimplemented("multi vectors")
    return floats(message.dense.data if kind else message.data)


def vectors(message: pb.Vectors) -> dict[str, Any]:
    """The vectors of a point by name; the unnamed one is ""."""
    match message.WhichOneof("vectors_options"):
        case "vector":
            return {DEFAULT_VECTOR: dense(message.vector)}
        case "vectors":
            return {name: dense(vector) for name, vector in message.vectors.vectors.items()}
    raise invalid("No Vector Provided")


def vectors_message(found: Any) -> pb.VectorsOutput | None:
    """The vectors of a point on the wire, in the form of 1.16 and later."""
    if found is None:
        return None
    if not isinstance(found, dict):
        return pb.VectorsOutput(vector=_vector_message(found))
    named = {name: _vector_message(vector) for name, vector in found.items()}
    return pb.VectorsOutput(vectors=pb.NamedVectorsOutput(vectors=named))


def _vector_message(vector: Any) -> pb.VectorOutput:
    return pb.VectorOutput(dense=pb.DenseVector(data=vector))


def with_payload(message: pb.WithPayloadSelector) -> Any:
    """What of the payloads to return."""
    match message.WhichOneof("selector_options"):
        case "enable":
            return message.enable
        case "include":
            return list(message.include.fields)
        case "exclude":
            return qe.PayloadSelector.Exclude(list(message.exclude.fields))
    raise invalid("No PayloadSelector")


def with_vectors(message: pb.WithVectorsSelector) -> bool | list[str]:
    """Which vectors to return."""
    if message.WhichOneof("selector_options") == "include":
        return list(message.include.names)
    return message.enable

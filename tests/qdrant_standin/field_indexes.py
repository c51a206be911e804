"""Indexes of payload fields: messages into what the engine takes, and back."""

from __future__ import annotations

from typing import Any

import qdrant_edge as qe

from router_service.backends.qdrant_server.wire import q as pb
from tests.qdrant_standin.errors import invalid, unimplemented

_TYPES = ("Keyword", "Integer", "Float", "Geo", "Text", "Bool", "Datetime", "Uuid")
_PARAMETERIZED = {
    "Keyword": qe.KeywordIndexParams,
    "Integer": qe.IntegerIndexParams,
    "Float": qe.FloatIndexParams,
    "Bool": qe.BoolIndexParams,
    "Datetime": qe.DatetimeIndexParams,
    "Uuid": qe.UuidIndexParams,
}
_MEMORIES = {pb.Cold: qe.Memory.Cold, pb.Cached: qe.Memory.Cached, pb.Pinned: qe.Memory.Pinned}


def index_schema(request: pb.CreateFieldIndexCollection) -> Any:
    """The index that a request asks for."""
    if not request.HasField("field_type") or request.field_type not in range(len(_TYPES)):
        raise invalid("cannot convert field_type")
    kind = _TYPES[request.field_type]
    params = request.field_index_params.WhichOneof("index_params")
    if params is None:
        return getattr(qe.PayloadSchemaType, kind)
    if params != f"{kind.lower()}_index_params":
        text = f"field_type ({kind}) and field_index_params do not match"
        raise invalid(text)
    if kind not in _PARAMETERIZED:
        raise unimplemented(f"{kind} index with parameters")
    return _PARAMETERIZED[kind](**_options(getattr(request.field_index_params, params)))


def _options(params: Any) -> dict[str, Any]:
    options = {field.name: value for field, value in params.ListFields()}
    if "prefix" in options:
        options["prefix"] = True
    if "memory" in options:
        options["memory"] = _MEMORIES[options["memory"]]
    return options


def schema_message(info: Any) -> pb.PayloadSchemaInfo:
    """An index of the engine on the wire."""
    kind = _TYPES[int(info.data_type)]
    message = pb.PayloadSchemaInfo(
        data_type=pb.PayloadSchemaType.Value(kind), points=int(info.points)
    )
    if info.params is not None and kind in _PARAMETERIZED:
        params = getattr(message.params, f"{kind.lower()}_index_params")
        params.SetInParent()
        for field in params.DESCRIPTOR.fields:
            value = getattr(info.params, field.name, None)
            if isinstance(value, bool) and field.type == field.TYPE_BOOL:
                setattr(params, field.name, value)
    return message

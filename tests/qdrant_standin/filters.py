"""Filters of messages as filters of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import qdrant_edge as qe

from router_service.backends.qdrant_server.wire import q as pb
from tests.qdrant_standin.errors import invalid, unimplemented, validation
from tests.qdrant_standin.values import point_ids

_MATCHES: dict[str, Callable[[Any], Any]] = {
    "keyword": qe.MatchValue,
    "integer": qe.MatchValue,
    "boolean": qe.MatchValue,
    "text": qe.MatchText,
    "text_any": qe.MatchTextAny,
    "phrase": qe.MatchPhrase,
    "prefix": qe.MatchPrefix,
    "substring": qe.MatchSubstring,
    "keywords": lambda value: qe.MatchAny(list(value.strings)),
    "integers": lambda value: qe.MatchAny(list(value.integers)),
    "except_keywords": lambda value: qe.MatchExcept(list(value.strings)),
    "except_integers": lambda value: qe.MatchExcept(list(value.integers)),
}
_BOUNDS = ("lt", "gt", "gte", "lte")


def filter_of(message: pb.Filter) -> Any:
    """A filter; an empty one lets everything through."""
    return qe.Filter(
        must=_conditions(message.must),
        should=_conditions(message.should),
        must_not=_conditions(message.must_not),
        min_should=_min_should(message),
    )


def optional_filter(request: Any, field: str = "filter") -> Any:
    """The filter of a request that may have none."""
    return filter_of(getattr(request, field)) if request.HasField(field) else None


def _conditions(messages: Iterable[pb.Condition]) -> list[Any] | None:
    return list(map(_condition, messages)) or None


def _min_should(message: pb.Filter) -> Any:
    if not message.HasField("min_should"):
        return None
    if not message.min_should.min_count:
        raise validation("filter.min_should.min_count", "min_count must be greater than 0")
    conditions = _conditions(message.min_should.conditions) or []
    return qe.MinShould(conditions, message.min_should.min_count)


def _condition(message: pb.Condition) -> Any:
    match message.WhichOneof("condition_one_of"):
        case "field":
            return _field(message.field)
        case "is_empty":
            return qe.IsEmptyCondition(message.is_empty.key)
        case "is_null":
            return qe.IsNullCondition(message.is_null.key)
        case "has_id":
            return qe.HasIdCondition(set(point_ids(message.has_id.has_id)))
        case "has_vector":
            return qe.HasVectorCondition(message.has_vector.has_vector)
        case "filter":
            return filter_of(message.filter)
        case "nested":
            return qe.NestedCondition(message.nested.key, filter_of(message.nested.filter))
        case None:
            raise invalid("Malformed Condition")
        case other:
            raise unimplemented(f"filter condition {other}")


def _field(message: pb.FieldCondition) -> Any:
    given = {field.name for field, _ in message.ListFields()} - {"key"}
    if not given:
        raise validation("filter", "At least one field condition must be specified")
    if unknown := given - {"match", "range", "values_count", "is_empty", "is_null"}:
        raise unimplemented(f"filter condition {', '.join(sorted(unknown))}")
    return qe.FieldCondition(
        message.key,
        match=_match(message.match) if "match" in given else None,
        range=qe.RangeFloat(**_bounds(message.range)) if "range" in given else None,
        values_count=qe.ValuesCount(**_bounds(message.values_count))
        if "values_count" in given
        else None,
        is_empty=message.is_empty if "is_empty" in given else None,
        is_null=message.is_null if "is_null" in given else None,
    )


def _match(message: pb.Match) -> Any:
    kind = message.WhichOneof("match_value")
    if kind is None:
        raise invalid("Malformed Match condition")
    return _MATCHES[kind](getattr(message, kind))


def _bounds(message: Any) -> dict[str, Any]:
    return {name: getattr(message, name) for name in _BOUNDS if message.HasField(name)}

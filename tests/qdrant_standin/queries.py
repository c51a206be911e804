"""Queries of messages as queries of the engine."""

from __future__ import annotations

from typing import Any

import qdrant_edge as qe

from router_service.backends.qdrant_server.wire import q as pb
from tests.qdrant_standin.collection import Collection
from tests.qdrant_standin.errors import bad_input, empty_update, invalid, not_found, unimplemented
from tests.qdrant_standin.filters import filter_of, optional_filter
from tests.qdrant_standin.values import (
    DEFAULT_VECTOR,
    floats,
    point_id,
    point_ids,
    with_payload,
    with_vectors,
)
from tests.qdrant_standin.writes import Write, for_all

_DEFAULT_LIMIT = 10


def query_request(collection: Collection, message: pb.QueryPoints) -> Any:
    """A query with its prefetches. Raises ApiError."""
    if message.HasField("lookup_from"):
        raise unimplemented("lookup_from")
    query, seen = _query(collection, message)
    payload = with_payload(message.with_payload) if message.HasField("with_payload") else False
    return qe.QueryRequest(
        message.limit if message.HasField("limit") else _DEFAULT_LIMIT,
        offset=message.offset or None,
        query=query,
        prefetches=[_prefetch(collection, each) for each in message.prefetch] or None,
        with_vector=with_vectors(message.with_vectors),
        with_payload=payload,
        filter=_without(optional_filter(message), seen),
        score_threshold=message.score_threshold if message.HasField("score_threshold") else None,
        params=_params(message),
    )


def _prefetch(collection: Collection, message: pb.PrefetchQuery) -> Any:
    if message.HasField("lookup_from"):
        raise unimplemented("lookup_from")
    query, seen = _query(collection, message)
    return qe.Prefetch(
        message.limit if message.HasField("limit") else _DEFAULT_LIMIT,
        query,
        [_prefetch(collection, each) for each in message.prefetch] or None,
        _params(message),
        _without(optional_filter(message), seen),
        message.score_threshold if message.HasField("score_threshold") else None,
    )


def _query(collection: Collection, message: Any) -> tuple[Any, Any]:
    """What to score by, and the id of a point that is not to be found: a query by id leaves it out."""
    if not message.HasField("query"):
        return None, None
    kind = message.query.WhichOneof("variant")
    if kind is None:
        raise invalid("Query variant is missing")
    if kind != "nearest":
        raise unimplemented(f"query by {kind}")
    name = message.using if message.HasField("using") else DEFAULT_VECTOR
    if name not in collection.vectors:
        raise bad_input(f"Not existing vector name error: {name}")
    vector, seen = _vector(collection, message.query.nearest, name)
    expected = collection.vectors[name].size
    if len(vector) != expected:
        raise bad_input(f"Vector dimension error: expected dim: {expected}, got {len(vector)}")
    return qe.Query.Nearest(vector, name), seen


def _vector(collection: Collection, message: pb.VectorInput, name: str) -> tuple[Any, Any]:
    match message.WhichOneof("variant"):
        case "dense":
            return floats(message.dense.data), None
        case "id":
            seen = point_id(message.id)
            return _stored(collection, seen, name), seen
        case None:
            raise invalid("VectorInput variant is missing")
        case other:
            raise unimplemented(f"query by {other}")


def _stored(collection: Collection, seen: Any, name: str) -> Any:
    found = collection.call(lambda shard: shard.retrieve([seen], False, True))
    if not found:
        raise not_found(f"No point with id {seen} found")
    vector = found[0].vector
    if isinstance(vector, dict):
        if name not in vector:
            raise not_found(f"Vector with name {name} for point {seen} not found")
        vector = vector[name]
    return vector


def _without(wanted: Any, seen: Any) -> Any:
    if seen is None:
        return wanted
    other = qe.HasIdCondition({seen})
    return qe.Filter(must=[wanted] if wanted else None, must_not=[other])


def _params(message: Any) -> Any:
    if not message.HasField("params"):
        return None
    params = message.params
    if params.HasField("acorn") or params.HasField("idf"):
        raise unimplemented("acorn and idf")
    quantization = None
    if params.HasField("quantization"):
        given = params.quantization
        quantization = qe.QuantizationSearchParams(
            ignore=given.ignore,
            rescore=given.rescore if given.HasField("rescore") else None,
            oversampling=given.oversampling if given.HasField("oversampling") else None,
        )
    return qe.SearchParams(
        hnsw_ef=params.hnsw_ef if params.HasField("hnsw_ef") else None,
        exact=params.exact,
        quantization=quantization,
        indexed_only=params.indexed_only,
    )


def scroll_request(message: pb.ScrollPoints) -> Any:
    """A page of points in the order of their ids."""
    if message.HasField("order_by"):
        raise unimplemented("order_by")
    payload = with_payload(message.with_payload) if message.HasField("with_payload") else True
    return qe.ScrollRequest(
        point_id(message.offset) if message.HasField("offset") else None,
        message.limit if message.HasField("limit") else _DEFAULT_LIMIT,
        optional_filter(message),
        payload,
        with_vectors(message.with_vectors),
    )


def selected(message: pb.PointsSelector, name: str, *rest: Any) -> Write:
    """The engine's operation of this name on points, by their ids or by a filter."""
    operations = qe.UpdateOperation
    match message.WhichOneof("points_selector_one_of"):
        case "points":
            if not message.points.ids:
                raise empty_update()
            ids = point_ids(message.points.ids)
            return Write(lambda some: getattr(operations, name)(some, *rest), ids, ids)
        case "filter":
            by_filter = getattr(operations, f"{name}_by_filter")
            return for_all(by_filter(filter_of(message.filter), *rest))
    raise invalid("Malformed PointsSelector type")

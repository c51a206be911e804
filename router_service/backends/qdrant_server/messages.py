"""Arrays as Qdrant's messages, and back. Vectors cross as packed bytes: no list of Python floats is ever made."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from router_service.arrays import F32, NO_ID, U64, Entries, ExampleRef, Neighbours
from router_service.backends.base import CollectionSpec, Metric, SearchOptions
from router_service.backends.points import (
    VALUE,
    Payload,
    Record,
    entries_of,
    payload_of,
    value_rows,
)
from router_service.backends.qdrant_server.wire import q

_DISTANCES = {Metric.EUCLID: q.Distance.Euclid, Metric.COSINE: q.Distance.Cosine}
METRICS = {number: metric for metric, number in _DISTANCES.items()}
# Field 1 of DenseVector, packed.
_DENSE_TAG = b"\x0a"


def vector_params(spec: CollectionSpec, on_disk: bool | None) -> Any:
    """The vectors of a collection."""
    params = q.VectorParams(size=spec.dimension, distance=_DISTANCES[spec.metric], on_disk=on_disk)
    return q.VectorsConfig(params=params)


def dense(row: F32) -> Any:
    """A vector of a row [d]."""
    data = row.astype("<f4", copy=False).tobytes()
    return q.DenseVector.FromString(_DENSE_TAG + _varint(len(data)) + data)


def _varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


def points_of(entries: Entries) -> list[Any]:
    """Points of entries, in their order."""
    rows = zip(entries.ids.tolist(), entries.keys, entries.values, entries.provenance, strict=True)
    return [
        q.PointStruct(
            id=q.PointId(num=number),
            vectors=q.Vectors(vector=q.Vector(dense=dense(key))),
            payload={name: _value(each) for name, each in payload_of(value, origin).items()},
        )
        for number, key, value, origin in rows
    ]


def point_ids(ids: U64) -> list[Any]:
    """Ids of points."""
    return [q.PointId(num=number) for number in ids.tolist()]


def entries_from(points: Sequence[Any], dimension: int, value_width: int) -> Entries:
    """Entries of retrieved points; `dimension` 0 when their keys were not read."""
    records = [
        Record(point.id.num, payload_from(point), _key(point.vectors, dimension))
        for point in points
    ]
    return entries_of(records, dimension, value_width)


def digests_from(points: Sequence[Any]) -> U64:
    """Digests [n] of all of retrieved points but their vectors, which go: equal where these are, in one process."""
    hashed = bytearray()
    for point in points:
        point.ClearField("vectors")
        text = point.SerializeToString(deterministic=True)
        hashed += hashlib.blake2b(text, digest_size=8).digest()
    return np.frombuffer(bytes(hashed), np.uint64)


def payload_from(point: Any) -> Payload:
    """The flat payload of a point."""
    return {name: _plain(value) for name, value in point.payload.items()}


def queries_of(
    collection: str,
    queries: F32,
    k: int,
    options: SearchOptions,
    excluded: Sequence[ExampleRef | None],
) -> list[Any]:
    """One query per row [t, d], each without the entries of its excluded example.

    One with an exclusion looks at every entry, for a graph search loses its way among entries that it may not see.
    """
    quantized = q.QuantizationSearchParams(rescore=True, oversampling=options.oversampling)
    exact = q.SearchParams(exact=True)
    indexed = (
        exact if options.exact else q.SearchParams(hnsw_ef=options.hnsw_ef, quantization=quantized)
    )
    filters = {ref: _without(ref) for ref in set(excluded)}
    value = q.WithPayloadSelector(include=q.PayloadIncludeSelector(fields=[VALUE]))
    return [
        q.QueryPoints(
            collection_name=collection,
            query=q.Query(nearest=q.VectorInput(dense=dense(query))),
            filter=filters[ref],
            params=indexed if ref is None else exact,
            limit=k,
            with_payload=value,
        )
        for query, ref in zip(queries, excluded, strict=True)
    ]


def neighbours_from(results: Sequence[Any], k: int, metric: Metric, value_width: int) -> Neighbours:
    """Neighbours [t, k] of the results of t queries; scores are d or the cosine, distances d squared or 1 - cosine."""
    hits = list(chain.from_iterable(result.result for result in results))
    counts = np.fromiter((len(result.result) for result in results), np.intp, len(results))
    filled = np.arange(k) < counts[:, None]
    found = Neighbours.empty(len(results), k, value_width)
    found.ids[filled] = np.fromiter((hit.id.num for hit in hits), np.uint64, len(hits))
    scores = np.fromiter((hit.score for hit in hits), np.float64, len(hits))
    found.distances[filled] = _distances(scores, metric)
    payloads = ({VALUE: hit.payload[VALUE].string_value} for hit in hits)
    found.values[filled] = value_rows(payloads, value_width)
    nowhere = ~np.isfinite(found.distances)  # too far for f32
    found.ids[nowhere], found.distances[nowhere], found.values[nowhere] = NO_ID, np.inf, 0.0
    return found


def _distances(scores: Any, metric: Metric) -> F32:
    with np.errstate(over="ignore"):
        wide = scores * scores if metric is Metric.EUCLID else np.clip(1.0 - scores, 0.0, 2.0)
        return np.asarray(wide).astype(np.float32)


def _without(ref: ExampleRef | None) -> Any:
    if ref is None:
        return None
    same = q.Filter(must=[_equals("source", ref.source), _equals("example", ref.example)])
    return q.Filter(must_not=[q.Condition(filter=same)])


def _equals(field: str, value: str) -> Any:
    """Empty strings are not stored."""
    if not value:
        return q.Condition(is_empty=q.IsEmptyCondition(key=field))
    return q.Condition(field=q.FieldCondition(key=field, match=q.Match(keyword=value)))


def _value(value: Any) -> Any:
    if isinstance(value, str):
        return q.Value(string_value=value)
    if isinstance(value, float):
        return q.Value(double_value=value)
    return q.Value(integer_value=value)


def _plain(value: Any) -> Any:
    return getattr(value, value.WhichOneof("kind") or "null_value")


def _key(vectors: Any, dimension: int) -> F32 | None:
    """The key [d] of what a server of any age returns; None when keys were not asked for."""
    if not dimension:
        return None
    vector = vectors.vector
    if not vector.HasField("dense"):
        return np.array(vector.data, np.float32)
    return np.frombuffer(vector.dense.SerializeToString()[-4 * dimension :], "<f4")

"""What the adapter of Qdrant Edge asks of the engine: configurations, filters, queries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import qdrant_edge as qe

from router_service.arrays import F32, ExampleRef
from router_service.backends.base import CollectionSpec, Metric, Quantization, SearchOptions
from router_service.backends.boundary import storage_call
from router_service.backends.points import GENERATION
from router_service.backends.search_keys import SearchKeys

_DISTANCES = {Metric.EUCLID: qe.Distance.Euclid, Metric.COSINE: qe.Distance.Cosine}
# Against 16: a quarter as many lambdas off by 1e-3 at K = 32, 8 % more work at K = 1 (benchmarks/README.md).
_HNSW_LINKS = 24
_HNSW_BUILD_EF = 128
# Names of the vectors of a point: the key is the engine's default vector.
KEY = ""
SEARCH_KEY = "search"
# Candidates by search keys at the least: rescoring them costs less than finding them.
_FEWEST_CANDIDATES = 16
# A row [d] of f32 as the engine takes it: any sequence will do, and this one makes no list (its stubs say list).
FLOATS: Any = memoryview
# Below this many entries a full scan is as fast as the graph, and exact.
_FULL_SCAN_ENTRIES = 512
# 1 KB is the least the engine takes: optimize() indexes whatever holds more than that.
_INDEXING_THRESHOLD_KB = 1
# 1 TB: one segment per collection, whatever the number of cores (the default is 200 MB for each).
_MAX_SEGMENT_KB = 10**9


def search_request(
    queries: F32,
    limit: int,
    options: SearchOptions,
    excluded: Sequence[ExampleRef | None],
    search_keys: SearchKeys | None = None,
) -> Any:
    """The engine's form of a batch of queries [t, d], each without the entries of its excluded example."""
    if search_keys is not None and not options.exact:
        return _two_stage_request(queries, limit, options, excluded, search_keys)
    with storage_call("prepare queries"):
        quantized = qe.QuantizationSearchParams(rescore=True, oversampling=options.oversampling)
        params = qe.SearchParams(options.hnsw_ef, options.exact, quantized)
        filters = {ref: _without(ref) for ref in set(excluded)}
        nearest, request = qe.Query.Nearest, qe.QueryRequest
        return qe.QueryBatchRequest(
            [
                request(limit, None, nearest(query), None, False, False, filters[ref], None, params)
                for query, ref in zip(map(FLOATS, queries), excluded, strict=True)
            ]
        )


def _two_stage_request(
    queries: F32,
    limit: int,
    options: SearchOptions,
    excluded: Sequence[ExampleRef | None],
    search_keys: SearchKeys,
) -> Any:
    """Candidates by their search keys, of which the nearest by their keys are taken, exactly as stored."""
    with storage_call("prepare queries"):
        candidates = max(math.ceil(limit * options.oversampling), _FEWEST_CANDIDATES)
        quantized = qe.QuantizationSearchParams(rescore=False)  # the keys do it
        params = qe.SearchParams(hnsw_ef=options.hnsw_ef, quantization=quantized)
        filters = {ref: _without(ref) for ref in set(excluded)}
        nearest, request, prefetch = qe.Query.Nearest, qe.QueryRequest, qe.Prefetch
        rows = zip(
            map(FLOATS, queries), map(FLOATS, search_keys.of(queries)), excluded, strict=True
        )
        return qe.QueryBatchRequest(
            [
                request(
                    limit,
                    None,
                    nearest(query, KEY),
                    [prefetch(candidates, nearest(short, SEARCH_KEY), None, params, filters[ref])],
                )
                for query, short, ref in rows
            ]
        )


def configuration(
    spec: CollectionSpec,
    quantization: Quantization,
    search_threads: int,
    search_keys: SearchKeys | None,
    segments: int = 1,
) -> Any:
    """The engine's form of what a shard is and how it is indexed; search keys apart are what is quantized then.

    `segments`: that optimize() leaves at most, if that is more than 1, with the one that is written to.
    """
    apart = search_keys is not None
    return qe.EdgeConfig(
        vectors=_vectors(spec, quantization, search_keys),
        hnsw_config=_graph(spec.dimension * 4),
        quantization_config=None if apart else _quantization(quantization),
        optimizers=qe.EdgeOptimizersConfig(
            default_segment_number=segments,
            max_segment_size=_MAX_SEGMENT_KB,
            indexing_threshold=_INDEXING_THRESHOLD_KB,
            prevent_unoptimized=False,  # True would hide the tail from searches
        ),
        max_search_threads=search_threads,
    )


def _graph(bytes_per_key: int) -> Any:
    full_scan_kb = max(1, _FULL_SCAN_ENTRIES * bytes_per_key // 1024)
    return qe.HnswIndexConfig(_HNSW_LINKS, _HNSW_BUILD_EF, full_scan_kb)


def _vectors(
    spec: CollectionSpec, quantization: Quantization, search_keys: SearchKeys | None
) -> Any:
    """The key, and beside it the search key if it is stored apart: then only that one has a graph."""
    metric = _DISTANCES[spec.metric]
    if search_keys is None:
        return qe.EdgeVectorParams(spec.dimension, metric)
    half, kinds = search_keys.half, qe.VectorStorageDatatype
    without_graph = qe.HnswIndexConfig(0, _HNSW_BUILD_EF, 1)
    short = qe.EdgeVectorParams(
        search_keys.dimension,
        qe.Distance.Euclid,  # of unit vectors it has the order of the cosine
        datatype=kinds.Float16 if half else kinds.Float32,
        quantization_config=_quantization(quantization),
        hnsw_config=_graph(search_keys.dimension * (2 if half else 4)),
    )
    key = qe.EdgeVectorParams(spec.dimension, metric, hnsw_config=without_graph)
    return {KEY: key, SEARCH_KEY: short}


def _quantization(quantization: Quantization) -> Any:
    """What the engine itself quantizes, held in RAM; None for the rest."""
    ram, bits = qe.Memory.Pinned, qe.TurboQuantBitSize
    match quantization:
        case Quantization.INT8:
            return qe.ScalarQuantizationConfig(qe.ScalarType.Int8, memory=ram)
        case Quantization.TURBO4:
            return qe.TurboQuantQuantizationConfig(bits=bits.Bits4, memory=ram)
        case Quantization.TURBO2:
            return qe.TurboQuantQuantizationConfig(bits=bits.Bits2, memory=ram)
        case Quantization.TURBO1:
            return qe.TurboQuantQuantizationConfig(bits=bits.Bits1, memory=ram)
        case Quantization.BINARY:
            return qe.BinaryQuantizationConfig(memory=ram)
        case Quantization.PRODUCT:
            return qe.ProductQuantizationConfig(qe.CompressionRatio.X16, memory=ram)
        case _:
            return None


def payload_indexes() -> dict[str, Any]:
    """For exclusions, for forgetting a document, for counting the tail; no HNSW links of their own: they cost time."""
    keyword = qe.KeywordIndexParams(enable_hnsw=False)
    number = qe.IntegerIndexParams(lookup=True, range=False, enable_hnsw=False)
    return {"source": keyword, "example": keyword, GENERATION: number}


def _without(ref: ExampleRef | None) -> Any:
    if ref is None:
        return None
    same = qe.Filter(must=[_equals("source", ref.source), _equals("example", ref.example)])
    return qe.Filter(must_not=[same])


def _equals(field: str, value: str) -> Any:
    """Empty strings are not stored."""
    if not value:
        return qe.IsEmptyCondition(field)
    return qe.FieldCondition(field, match=qe.MatchValue(value))

"""The adapter of Qdrant Edge: the only module that imports qdrant_edge, so that the rest sees arrays and StorageErrors.

Every engine call holds the GIL until it returns; callers keep batches small. Vectors go in as memoryviews of f32 rows,
three times as fast as lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as qe

from router_service.arrays import F32, NO_ID, U64, Entries, ExampleRef
from router_service.backends.base import CollectionSpec, Metric, Quantization, SearchOptions
from router_service.backends.boundary import storage_call
from router_service.backends.edge_points import (
    GENERATION,
    VALUE,
    Record,
    entries_of,
    payloads_of,
)
from router_service.backends.shard import ShardCounts

_DISTANCES = {Metric.EUCLID: qe.Distance.Euclid, Metric.COSINE: qe.Distance.Cosine}
# Against 16: a quarter as many lambdas off by 1e-3 at K = 32, 8 % more work at K = 1 (benchmarks/README.md).
_HNSW_LINKS = 24
_HNSW_BUILD_EF = 128
# A row [d] of f32 as the engine takes it: any sequence will do, and this one makes no list (its stubs say list).
_FLOATS: Any = memoryview
# Below this many entries a full scan is as fast as the graph, and exact.
_FULL_SCAN_ENTRIES = 512
# 1 KB is the least the engine takes: optimize() indexes whatever holds more than that.
_INDEXING_THRESHOLD_KB = 1
# 1 TB: one segment per collection, whatever the number of cores (the default is 200 MB for each).
_MAX_SEGMENT_KB = 10**9


def search_request(
    queries: F32, limit: int, options: SearchOptions, excluded: Sequence[ExampleRef | None]
) -> Any:
    """The engine's form of a batch of queries [t, d], each without the entries of its excluded example."""
    with storage_call("prepare queries"):
        quantized = qe.QuantizationSearchParams(rescore=True, oversampling=options.oversampling)
        params = qe.SearchParams(hnsw_ef=options.hnsw_ef, quantization=quantized)
        filters = {ref: _without(ref) for ref in set(excluded)}
        nearest, request = qe.Query.Nearest, qe.QueryRequest
        return qe.QueryBatchRequest(
            [
                request(limit, None, nearest(query), None, False, False, filters[ref], None, params)
                for query, ref in zip(map(_FLOATS, queries), excluded, strict=True)
            ]
        )


def read_hits(hits: Sequence[Sequence[Any]], k: int) -> tuple[U64, F32]:
    """Ids and engine scores [t, k] of a search, best first; NO_ID and inf where there are fewer than k."""
    flat = list(chain.from_iterable(hits))
    found = np.fromiter(map(len, hits), np.intp, len(hits))
    filled = np.arange(k) < found[:, None]
    ids = np.full((len(hits), k), NO_ID, np.uint64)
    scores = np.full((len(hits), k), np.inf, np.float32)
    ids[filled] = np.fromiter(map(attrgetter("id"), flat), np.uint64, len(flat))
    scores[filled] = np.fromiter(map(attrgetter("score"), flat), np.float32, len(flat))
    return ids, scores


class EngineShard:
    """A Shard in this process."""

    def __init__(self, shard: Any, directory: Path, spec: CollectionSpec) -> None:
        self._shard, self._directory, self._spec = shard, directory, spec

    @staticmethod
    def create(directory: Path, spec: CollectionSpec, search_threads: int) -> EngineShard:
        """A new shard in a directory that is not there yet, with its payload indexes."""
        with storage_call(f"create {directory}"):
            directory.mkdir(parents=True)
            config = _config(spec, Quantization.NONE, search_threads)
            shard = qe.EdgeShard.create(str(directory), config)
            for field, schema in _payload_indexes().items():
                shard.update(qe.UpdateOperation.create_field_index(field, schema))
        return EngineShard(shard, directory, spec)

    @staticmethod
    def load(
        directory: Path, spec: CollectionSpec, quantization: Quantization, search_threads: int
    ) -> EngineShard:
        """Opens a shard. Raises DirectoryInUse when a process has it open, CorruptMemory when it cannot be read.

        `quantization` is what the next optimize() builds; Quantization.NONE keeps what the shard has (see
        forget_configuration).
        """
        with storage_call(f"open {directory}", opening=True):
            config = _config(spec, quantization, search_threads)
            return EngineShard(qe.EdgeShard.load(str(directory), config), directory, spec)

    @property
    def alive(self) -> bool:
        """See Shard.alive: as long as this process."""
        return True

    def search(
        self,
        queries: F32,
        limit: int,
        options: SearchOptions,
        excluded: Sequence[ExampleRef | None],
    ) -> tuple[U64, F32]:
        """See Shard.search."""
        request = search_request(queries, limit, options, excluded)
        with storage_call(f"search {self._directory}"):
            return read_hits(self._shard.query_batch(request), limit)

    def upsert(self, entries: Entries, generation: int) -> None:
        """See Shard.upsert; of repeated ids the last counts."""
        with storage_call(f"write to {self._directory}"):
            rows, payloads = map(_FLOATS, entries.keys), payloads_of(entries, generation)
            points = list(map(qe.Point, entries.ids.tolist(), rows, payloads))
            self._shard.update(qe.UpdateOperation.upsert_points(points))

    def delete(self, ids: U64) -> None:
        """See Shard.delete."""
        with storage_call(f"write to {self._directory}"):
            self._shard.update(qe.UpdateOperation.delete_points(ids.tolist()))

    def scroll(
        self, after: int | None, limit: int, *, keys: bool = True, provenance: bool = True
    ) -> Entries:
        """See Shard.scroll."""
        offset = None if after is None else after + 1
        fields: bool | list[str] = True if provenance else [VALUE]
        with storage_call(f"read {self._directory}"):
            request = qe.ScrollRequest(offset, limit, None, fields, keys)
            records, _ = self._shard.scroll(request)
        return self._entries(records, keys)

    def retrieve(self, ids: U64, *, keys: bool = False) -> Entries:
        """See Shard.retrieve."""
        with storage_call(f"read {self._directory}"):
            records = self._shard.retrieve(ids.tolist(), True, keys)
        return self._entries(records, keys)

    def _entries(self, records: Sequence[Any], keys: bool) -> Entries:
        read = [Record(record.id, record.payload, record.vector) for record in records]
        return entries_of(read, self._spec.dimension if keys else 0, self._spec.value_width)

    def counts(self, generation: int) -> ShardCounts:
        """See Shard.counts."""
        written = qe.FieldCondition(GENERATION, match=qe.MatchValue(generation))
        with storage_call(f"count {self._directory}"):
            tail = self._shard.count(qe.CountRequest(exact=True, filter=qe.Filter(must=[written])))
            entries = self._shard.count(qe.CountRequest(exact=True, filter=None))
            return ShardCounts(
                int(entries), int(tail), int(self._shard.info().indexed_vectors_count)
            )

    def optimize(self) -> None:
        """Builds indexes and quantized keys. Blocks the whole process: only for a process of its own."""
        with storage_call(f"optimize {self._directory}"):
            self._shard.optimize()

    def flush(self) -> None:
        """Fsyncs every write, and cuts the write-ahead log."""
        with storage_call(f"flush {self._directory}"):
            self._shard.flush()

    def close(self) -> None:
        """Releases the files. Closing twice is allowed."""
        with storage_call(f"close {self._directory}"):
            self._shard.close()


def forget_configuration(directory: Path) -> None:
    """Makes load() take its configuration as a whole: else the engine keeps a quantization that is no longer wanted."""
    with storage_call(f"configure {directory}"):
        (directory / "edge_config.json").unlink(missing_ok=True)


def _config(spec: CollectionSpec, quantization: Quantization, search_threads: int) -> Any:
    full_scan_kb = max(1, _FULL_SCAN_ENTRIES * spec.dimension * 4 // 1024)
    return qe.EdgeConfig(
        vectors=qe.EdgeVectorParams(spec.dimension, _DISTANCES[spec.metric]),
        hnsw_config=qe.HnswIndexConfig(_HNSW_LINKS, _HNSW_BUILD_EF, full_scan_kb),
        quantization_config=_quantization(quantization),
        optimizers=qe.EdgeOptimizersConfig(
            default_segment_number=1,
            max_segment_size=_MAX_SEGMENT_KB,
            indexing_threshold=_INDEXING_THRESHOLD_KB,
            prevent_unoptimized=False,  # True would hide the tail from searches
        ),
        max_search_threads=search_threads,
    )


def _quantization(quantization: Quantization) -> Any:
    if quantization is Quantization.NONE:
        return None
    return qe.ScalarQuantizationConfig(qe.ScalarType.Int8, memory=qe.Memory.Pinned)


def _payload_indexes() -> dict[str, Any]:
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

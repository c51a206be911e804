"""The adapter of Qdrant Edge: what a shard is, and the engine's form of configurations, filters and queries."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as qe

from router_service.arrays import (
    F32,
    NO_ID,
    OF_KEY,
    OF_REST,
    U64,
    Entries,
    ExampleRef,
    key_digests,
    rest_digests,
)
from router_service.backends.base import (
    INT8_QUANTILE,
    CollectionSpec,
    Compression,
    Metric,
    Quantization,
    SearchOptions,
)
from router_service.backends.disk import storage_call
from router_service.backends.edge.ledger import UNREADABLE
from router_service.backends.edge.search_keys import SearchKeys
from router_service.backends.points import (
    GENERATION,
    VALUE,
    Payload,
    Record,
    entries_of,
    payloads_of,
)

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
_IDS_PER_PAGE = 4096
_FLOATS_PER_AUDIT = 1 << 20
_READ_BYTES = 1 << 20
# Of search keys made once more: f16 has 11 bits, and a product of matrices of another height another rounding.
_SEARCH_KEY_TOLERANCE = 4e-3
# More gain nothing: a collection has one large segment.
_SEARCH_THREADS = 1


@dataclass(frozen=True, slots=True)
class Audit:
    """Entries as the engine has them: ids [n], value rows [n, W], digests [n, 2]; see ledger."""

    ids: U64
    values: F32
    digests: U64

    @staticmethod
    def empty(spec: CollectionSpec) -> Audit:
        """Of no entries."""
        values = np.empty((0, spec.value_width), np.float32)
        return Audit(np.empty(0, np.uint64), values, np.empty((0, 2), np.uint64))

    @staticmethod
    def concat(parts: Sequence[Audit]) -> Audit:
        """All parts, of which there is at least one."""
        ids, values, digests = zip(
            *((part.ids, part.values, part.digests) for part in parts), strict=True
        )
        return Audit(np.concatenate(ids), np.concatenate(values), np.concatenate(digests))


@dataclass(frozen=True, slots=True)
class ShardCounts:
    """Exact number of entries, those written since the last optimize, and vectors in graphs, replaced ones included.

    `segments`: that a search goes through, the one that is written to among them.
    """

    entries: int
    tail: int
    graph_vectors: int
    segments: int = 0


def search_request(
    queries: F32,
    limit: int,
    options: SearchOptions,
    excluded: Sequence[ExampleRef | None],
    search_keys: SearchKeys | None = None,
) -> Any:
    """The engine's form of a batch of queries [t, d], each without the entries of its excluded example.

    A query with an exclusion looks at every entry: a graph search cannot step over what it may not see, and loses its
    way when that is much of the layer, or all that is near (docs/recall.md).
    """
    rows = list(map(FLOATS, queries))
    refused = {ref: _without(ref) for ref in set(excluded)}
    if options.exact or None not in refused:
        made = [_exact(row, limit, refused[ref]) for row, ref in zip(rows, excluded, strict=True)]
        return qe.QueryBatchRequest(made)
    if search_keys is None:
        indexed = _one_stage(rows, limit, options)
    else:
        indexed = _two_stages(rows, queries, limit, options, search_keys)
    made = [
        on_index if ref is None else _exact(row, limit, refused[ref])
        for row, ref, on_index in zip(rows, excluded, indexed, strict=True)
    ]
    return qe.QueryBatchRequest(made)


def _exact(query: Any, limit: int, refuse: Any) -> Any:
    """Of all entries but those that the filter refuses."""
    params, nearest = qe.SearchParams(exact=True), qe.Query.Nearest
    return qe.QueryRequest(
        limit, None, nearest(query, KEY), None, False, False, refuse, None, params
    )


def _one_stage(queries: Sequence[Any], limit: int, options: SearchOptions) -> Iterator[Any]:
    params = _rescoring(options.hnsw_ef, options.oversampling)
    nearest, request = qe.Query.Nearest, qe.QueryRequest
    for query in queries:
        yield request(limit, None, nearest(query), None, False, False, None, None, params)


@lru_cache(maxsize=64)
def _rescoring(hnsw_ef: int, oversampling: float) -> Any:
    quantized = qe.QuantizationSearchParams(rescore=True, oversampling=oversampling)
    return qe.SearchParams(hnsw_ef, False, quantized)


def _two_stages(
    rows: Sequence[Any], queries: F32, limit: int, options: SearchOptions, search_keys: SearchKeys
) -> Iterator[Any]:
    """Candidates by their search keys, of which the nearest by their keys are taken, exactly as stored."""
    candidates = max(math.ceil(limit * options.oversampling), _FEWEST_CANDIDATES)
    quantized = qe.QuantizationSearchParams(rescore=False)  # the keys do it
    params = qe.SearchParams(hnsw_ef=options.hnsw_ef, quantization=quantized)
    nearest, request, prefetch = qe.Query.Nearest, qe.QueryRequest, qe.Prefetch
    for row, short in zip(rows, map(FLOATS, search_keys.of(queries)), strict=True):
        by_search_key = prefetch(candidates, nearest(short, SEARCH_KEY), None, params, None)
        yield request(limit, None, nearest(row, KEY), [by_search_key])


def configuration(
    spec: CollectionSpec,
    quantization: Quantization,
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
        max_search_threads=_SEARCH_THREADS,
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
    turbo = {
        Quantization.TURBO4: bits.Bits4,
        Quantization.TURBO2: bits.Bits2,
        Quantization.TURBO1: bits.Bits1,
    }
    match quantization:
        case Quantization.INT8:
            return qe.ScalarQuantizationConfig(qe.ScalarType.Int8, INT8_QUANTILE, memory=ram)
        case Quantization.BINARY:
            return qe.BinaryQuantizationConfig(memory=ram)
        case Quantization.PRODUCT:
            return qe.ProductQuantizationConfig(qe.CompressionRatio.X16, memory=ram)
        case Quantization.TURBO4 | Quantization.TURBO2 | Quantization.TURBO1:
            return qe.TurboQuantQuantizationConfig(bits=turbo[quantization], memory=ram)
        case _:
            return None


def payload_indexes() -> dict[str, Any]:
    """For exclusions, for forgetting a document, for counting the tail; no HNSW links of their own: they cost time."""
    keyword = qe.KeywordIndexParams(enable_hnsw=False)
    number = qe.IntegerIndexParams(lookup=True, range=False, enable_hnsw=False)
    return {"source": keyword, "example": keyword, GENERATION: number}


def _without(ref: ExampleRef | None) -> Any:
    return None if ref is None else qe.Filter(must_not=[_of_example(ref)])


def _of_example(ref: ExampleRef) -> Any:
    return qe.Filter(must=[_equals("source", ref.source), _equals("example", ref.example)])


def _equals(field: str, value: str) -> Any:
    """Empty strings are not stored."""
    if not value:
        return qe.IsEmptyCondition(field)
    return qe.FieldCondition(field, match=qe.MatchValue(value))


def read_hits(hits: Sequence[Sequence[Any]], k: int) -> tuple[U64, F32]:
    """Ids and engine scores [t, k] of a search, best first; NO_ID and inf where there are fewer than k."""
    ids = np.full((len(hits), k), NO_ID, np.uint64)
    scores = np.full((len(hits), k), np.inf, np.float32)
    for row, found in enumerate(hits):
        ids[row, : len(found)] = [hit.id for hit in found]
        scores[row, : len(found)] = [hit.score for hit in found]
    return ids, scores


class EngineShard:
    """One open shard of the engine, in this process.

    Not thread-safe: the collection holds a lock around each call. Failures are StorageErrors.
    """

    def __init__(
        self,
        shard: Any,
        directory: Path,
        spec: CollectionSpec,
        search_keys: SearchKeys | None = None,
    ) -> None:
        self._shard, self._directory, self._spec = shard, directory, spec
        self._search_keys = search_keys
        self._vectors: bool | list[str] = True if search_keys is None else [KEY]

    @staticmethod
    def create(
        directory: Path, spec: CollectionSpec, search_keys: SearchKeys | None = None
    ) -> EngineShard:
        """A new shard in a directory that is not there yet, with its payload indexes."""
        with storage_call(f"create {directory}"):
            directory.mkdir(parents=True)
            if search_keys is not None:
                search_keys.save(directory)
            config = configuration(spec, Quantization.NONE, search_keys)
            shard = qe.EdgeShard.create(str(directory), config)
            for field, schema in payload_indexes().items():
                shard.update(qe.UpdateOperation.create_field_index(field, schema))
        return EngineShard(shard, directory, spec, search_keys)

    @staticmethod
    def load(
        directory: Path, spec: CollectionSpec, compression: Compression, segments: int = 1
    ) -> EngineShard:
        """Opens a shard. Raises DirectoryInUse when a process has it open, CorruptMemory when it cannot be read.

        `compression` is what the next optimize() builds; Quantization.NONE keeps what the shard has (see
        forget_configuration), and `segments` how many it leaves. Search keys that are stored apart must be there.
        """
        search_keys = SearchKeys.load(directory) if compression.apart else None
        with storage_call(f"open {directory}", opening=True):
            _read_ahead(directory)
            quantization = compression.quantization
            config = configuration(spec, quantization, search_keys, segments)
            shard = qe.EdgeShard.load(str(directory), config)
        return EngineShard(shard, directory, spec, search_keys)

    @staticmethod
    def load_as_it_is(directory: Path, spec: CollectionSpec) -> EngineShard:
        """Opens a shard whose compression does not matter, to copy its entries."""
        with storage_call(f"open {directory}", opening=True):
            return EngineShard(qe.EdgeShard.load(str(directory)), directory, spec)

    @property
    def alive(self) -> bool:
        """Whether calls can still succeed: as long as this process."""
        return True

    def search(
        self,
        queries: F32,
        limit: int,
        options: SearchOptions,
        excluded: Sequence[ExampleRef | None],
    ) -> tuple[U64, F32]:
        """Ids and engine scores [t, limit] of the nearest entries, best first; NO_ID and inf where there are fewer."""
        with storage_call(f"search {self._directory}"):
            hidden = self._hidden(excluded) if any(excluded) else excluded
            request = search_request(queries, limit, options, hidden, self._search_keys)
            return read_hits(self._shard.query_batch(request), limit)

    def _hidden(self, excluded: Sequence[ExampleRef | None]) -> Sequence[ExampleRef | None]:
        """Without the examples that have no entries."""
        there = {ref: ref if ref and self._has(ref) else None for ref in set(excluded)}
        return [there[ref] for ref in excluded]

    def _has(self, ref: ExampleRef) -> bool:
        """Whether there are entries of an example; 5 us, whatever their number."""
        found, _ = self._shard.scroll(qe.ScrollRequest(None, 1, _of_example(ref), False, False))
        return bool(found)

    def upsert(self, entries: Entries, generation: int) -> None:
        """Writes entries, marked with the generation of files; they survive SIGKILL when this returns.

        Of repeated ids the last counts.
        """
        self._write(entries.ids.tolist(), entries.keys, payloads_of(entries, generation))

    def put(self, records: Sequence[Record]) -> None:
        """Writes records of another shard with the payloads that they have there."""
        keys = np.array([record.key for record in records], np.float32)
        self._write([each.id for each in records], keys, [each.payload for each in records])

    def _write(self, ids: Sequence[int], keys: F32, payloads: Sequence[Payload]) -> None:
        with storage_call(f"write to {self._directory}"):
            points = list(map(qe.Point, ids, self._points(keys), payloads))
            self._shard.update(qe.UpdateOperation.upsert_points(points))

    def _points(self, keys: F32) -> Iterator[Any]:
        """The vectors of points with these keys [n, d]."""
        if self._search_keys is None:
            return map(FLOATS, keys)
        pairs = zip(map(FLOATS, keys), map(FLOATS, self._search_keys.of(keys)), strict=True)
        return ({KEY: key, SEARCH_KEY: short} for key, short in pairs)

    def pages(self, size: int, *, payloads: bool, keys: bool = True) -> Iterator[list[Record]]:
        """Every record, in the order of ids."""
        start = None
        while True:
            with storage_call(f"read {self._directory}"):
                vectors = keys and self._vectors
                request = qe.ScrollRequest(start, size, None, payloads, vectors)
                found, start = self._shard.scroll(request)
            if found:
                yield list(map(_record, found))
            if start is None:
                return

    def delete(self, ids: U64) -> None:
        """Removes the entries of these ids; they stay away after SIGKILL when this returns."""
        with storage_call(f"write to {self._directory}"):
            self._shard.update(qe.UpdateOperation.delete_points(ids.tolist()))

    def scroll(
        self, after: int | None, limit: int, *, keys: bool = True, provenance: bool = True
    ) -> Entries:
        """Up to `limit` entries above an id, in the order of ids; d = 0 without keys."""
        offset = None if after is None else after + 1
        fields: bool | list[str] = True if provenance else [VALUE]
        with storage_call(f"read {self._directory}"):
            request = qe.ScrollRequest(offset, limit, None, fields, keys and self._vectors)
            records, _ = self._shard.scroll(request)
        return self._entries(records, keys)

    def retrieve(self, ids: U64, *, keys: bool = False) -> Entries:
        """The entries of these ids, in any order; those that are not there are left out."""
        with storage_call(f"read {self._directory}"):
            records = self._shard.retrieve(ids.tolist(), True, keys and self._vectors)
        return self._entries(records, keys)

    def _entries(self, records: Sequence[Any], keys: bool) -> Entries:
        dimension = self._spec.dimension if keys else 0
        return entries_of(list(map(_record, records)), dimension, self._spec.value_width)

    def ids(self) -> U64:
        """The ids of all entries, ascending."""
        found: list[int] = []
        start = None
        while True:
            with storage_call(f"read {self._directory}"):
                request = qe.ScrollRequest(start, _IDS_PER_PAGE, None, False, False)
                records, start = self._shard.scroll(request)
            found += [record.id for record in records]
            if start is None:
                return np.array(found, np.uint64)

    def audit(self, ids: U64, generation: int, *, keys: bool) -> Audit:
        """What there is of the entries of these ids, in their order; those that are not there are left out.

        `keys`: of all entries; else of those that were written in this generation. Raises StorageError when one of them
        cannot be read.
        """
        with storage_call(f"read {self._directory}"):
            records = self._shard.retrieve(ids.tolist(), True, False)
            records.sort(key=attrgetter("id"))
            entries = self._entries(records, False)
            rest = rest_digests(entries)
            new = [record.payload.get(GENERATION) == generation for record in records]
        digests = np.zeros((len(entries), 2), np.uint64)
        digests[:, OF_REST] = rest
        wanted = entries.ids if keys else entries.ids[np.array(new, np.bool_)]
        digests[np.isin(entries.ids, wanted), OF_KEY] = self._key_digests(wanted)
        return Audit(entries.ids, entries.values, digests)

    def _key_digests(self, ids: U64) -> U64:
        """Digests [n] of the keys of entries that are there; UNREADABLE also where a search key is not the key's."""
        found = np.full(len(ids), UNREADABLE)
        step = max(1, _FLOATS_PER_AUDIT // self._spec.dimension)
        for start in range(0, len(ids), step):
            part = ids[start : start + step]
            with storage_call(f"read {self._directory}"):
                records = self._shard.retrieve(part.tolist(), False, True)
            records.sort(key=attrgetter("id"))
            whole = [self._vectors_of(record) for record in records]
            rows = [start + n for n, vectors in enumerate(whole) if vectors is not None]
            keys = np.array([each[KEY] for each in whole if each], np.float32)
            keys = keys.reshape(len(rows), self._spec.dimension)
            found[rows] = key_digests(keys)
            if self._search_keys is not None and rows:
                stored = np.array([each[SEARCH_KEY] for each in whole if each], np.float32)
                right = self._search_keys.of(keys)
                near = np.isclose(
                    stored, right, rtol=_SEARCH_KEY_TOLERANCE, atol=_SEARCH_KEY_TOLERANCE
                )
                found[np.array(rows)[~near.all(axis=1)]] = UNREADABLE
        return found

    def _vectors_of(self, record: Any) -> dict[str, Any] | None:
        """The vectors of a record by their names; None unless all are there."""
        vectors = record.vector if isinstance(record.vector, dict) else {KEY: record.vector}
        names = (KEY,) if self._search_keys is None else (KEY, SEARCH_KEY)
        lengths = (len(vectors.get(name) or ()) for name in names)
        expected = [
            self._spec.dimension,
            *([self._search_keys.dimension] if self._search_keys else []),
        ]
        return vectors if list(lengths) == expected else None

    def problems(self) -> list[str]:
        """What is wrong with a shard just opened, beside its entries."""
        return [*self._index_problems(), *self._version_problems()]

    def _version_problems(self) -> Iterator[str]:
        """The engine numbers its writes; of an entry with a number that is yet to come it would drop the next ones."""
        with storage_call(f"read {self._directory}"):
            manifest = self._shard.snapshot_manifest()
            last = max((segment["segment_version"] for segment in manifest.values()), default=0)
            for path in self._directory.glob("segments/*/*id_tracker.versions"):
                versions = np.fromfile(path, "<u8")
                if len(versions) and versions.max() > last:
                    yield f"{path.relative_to(self._directory)} numbers a write that was not made"

    def _index_problems(self) -> list[str]:
        """Where the indexes of payloads, which exclusions and counts are read from, are not those of the payloads."""
        fields = ("source", "example", GENERATION)
        counts: dict[str, Counter[Any]] = {field: Counter() for field in fields}
        for records in self.pages(_IDS_PER_PAGE, payloads=True, keys=False):
            for field, counter in counts.items():
                counter.update(record.payload.get(field) for record in records)
        problems = []
        with storage_call(f"count {self._directory}"):
            for field, counter in counts.items():
                empty = qe.Filter(must=[qe.IsEmptyCondition(field)])
                without = self._shard.count(qe.CountRequest(exact=True, filter=empty))
                request = qe.FacetRequest(field, len(counter) + 1, True, None)
                hits = self._shard.facet(request).hits  # also of values that no entry has any more
                found = {hit.value: hit.count for hit in hits if hit.count}
                if without != counter.pop(None, 0) or found != counter:
                    problems.append(f"the index of {field} is damaged")
        return problems

    def counts(self, generation: int) -> ShardCounts:
        """What there is; `generation` is the one being written."""
        written = qe.FieldCondition(GENERATION, match=qe.MatchValue(generation))
        with storage_call(f"count {self._directory}"):
            tail = self._shard.count(qe.CountRequest(exact=True, filter=qe.Filter(must=[written])))
            entries = self._shard.count(qe.CountRequest(exact=True, filter=None))
            info = self._shard.info()
        vectors = int(info.indexed_vectors_count) // (1 if self._search_keys is None else 2)
        return ShardCounts(int(entries), int(tail), vectors, int(info.segments_count))

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


def _read_ahead(directory: Path) -> None:
    """Brings quantized keys into the page cache, from where the engine takes them row by row into RAM.

    It drops them from there each time, and its page faults read them slowly: 41 MB in 0.07 s like this, else in 1 s.
    """
    block = bytearray(_READ_BYTES)
    for path in directory.glob("segments/*/*/quantized.data"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def forget_configuration(directory: Path) -> None:
    """Makes load() take its configuration as a whole: else the engine keeps a quantization that is no longer wanted."""
    with storage_call(f"configure {directory}"):
        (directory / "edge_config.json").unlink(missing_ok=True)


def _record(found: Any) -> Record:
    vector = found.vector[KEY] if isinstance(found.vector, dict) else found.vector
    return Record(found.id, found.payload, vector)

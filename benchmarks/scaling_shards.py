"""Real Qdrant Edge shards for benchmarks.scaling: what they take on disk and in RAM, and what a query takes.

Run as `python -m benchmarks.scaling_shards DIRECTORY`, opens a shard and prints how much RAM that pins.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as qe

from benchmarks.clustered import F32, Workload
from benchmarks.timing import CacheSweep
from router_service.arrays import U64, Entries, Provenance
from router_service.backends.base import (
    CollectionSpec,
    Compression,
    Metric,
    SearchOptions,
)
from router_service.backends.disk import allocated_bytes, copy_tree
from router_service.backends.edge.engine import (
    EngineShard,
    forget_configuration,
    payload_indexes,
)
from router_service.backends.points import GENERATION, Payload, Record, payload_of

NEIGHBOURS, HNSW_EF = 32, 100
BATCHES = {1: 100, 16: 30, 64: 12, 512: 4}  # tokens of a call: calls that are timed
_TOKENS_PER_EXAMPLE = 128
_ENTRIES_PER_UPDATE = 512
_SHORT = 8
_ROOT = Path(__file__).parents[1]
# The parts of a shard, by the directory or the beginning of the name within a segment.
_PARTS = {
    "vector_storage/matrix": "key",
    "vector_storage/quantized.data": "codes",
    "vector_index/links": "graph",
    "payload_storage/": "payload",
    "payload_index/": "payload_index",
    "id_tracker": "ids",
}


def origin(number: int) -> Provenance:
    """Provenance as a builder writes it: texts of 21 and 13 characters, every field filled in."""
    document, position = divmod(number, _TOKENS_PER_EXAMPLE)
    return Provenance(
        source="textbook-medicine.txt",
        example=f"chapter-{document:05d}",
        position=position,
        token=number * 7919 % 50_000,
        gain=0.0123 * (number % 97),
        created_unix_ms=1_790_000_000_000 + number,
    )


def spec_of(dimension: int, value_floats: int) -> CollectionSpec:
    """A collection of Euclidean keys."""
    return CollectionSpec(dimension, Metric.EUCLID, value_floats)


def written(directory: Path, workload: Workload) -> Path:
    """A shard with the entries of a workload, as the service writes it, without an index."""
    spec = spec_of(workload.keys.shape[1], workload.deltas.shape[1])
    shard, path = EngineShard.create(directory, spec), directory
    for start in range(0, len(workload.ids), _ENTRIES_PER_UPDATE):
        rows = np.s_[start : start + _ENTRIES_PER_UPDATE]
        ids = workload.ids[rows]
        origins = [origin(start + number) for number in range(len(ids))]
        shard.upsert(Entries(ids, workload.keys[rows], workload.deltas[rows], origins), 0)
    shard.flush()
    shard.close()
    return path


def optimized(source: Path, target: Path, spec: CollectionSpec, method: str) -> float:
    """A copy of a shard with an index and quantized keys; returns the seconds that the indexing took."""
    copy_tree(source, target, ("matrix.dat",))
    forget_configuration(target)
    shard = EngineShard.load(target, spec, Compression.parse(method))
    started = time.perf_counter()
    shard.optimize()
    elapsed_s = time.perf_counter() - started
    shard.flush()
    shard.close()
    return elapsed_s


def parts(shard: Path) -> dict[str, int]:
    """Bytes on disk by part of a shard; `log` is the write-ahead log, `rest` what grows with no entry."""
    found = dict.fromkeys([*_PARTS.values(), "log", "rest"], 0)
    for path in shard.rglob("*"):
        if path.is_file():
            found[_part(path.relative_to(shard))] += allocated_bytes(path)
    return found


def _part(path: Path) -> str:
    if path.parts[0] == "wal":
        return "log"
    inside = "/".join(path.parts[2:])
    return next((part for start, part in _PARTS.items() if inside.startswith(start)), "rest")


class Queries:
    """An indexed shard and what it is asked."""

    def __init__(self, shard: Path, spec: CollectionSpec, method: str, queries: F32) -> None:
        compression = Compression.parse(method)
        self._shard = EngineShard.load(shard, spec, compression)
        self._options = SearchOptions(HNSW_EF, compression.oversampling)
        self._queries = queries

    def found(self, *, exact: bool = False) -> U64:
        """Ids [q, K] of the nearest neighbours."""
        options = SearchOptions(exact=True) if exact else self._options
        return self._search(self._queries, options)

    def ms_per_query(self, tokens: int, calls: int, sweep: CacheSweep) -> tuple[float, float]:
        """Elapsed and processor time per query, with caches evicted before each call.

        Lower quartiles: what else runs on the machine only ever adds to a call.
        """
        times = []
        for number in range(calls):
            start = number * tokens % (len(self._queries) - tokens + 1)
            sweep.sweep()
            clocks = time.perf_counter(), time.process_time()
            self._search(self._queries[start : start + tokens], self._options)
            times.append((time.perf_counter() - clocks[0], time.process_time() - clocks[1]))
        elapsed, processor = np.quantile(np.array(times), 0.25, axis=0) * 1000 / tokens
        return float(elapsed), float(processor)

    def _search(self, queries: F32, options: SearchOptions) -> U64:
        nobody: Sequence[Any] = [None] * len(queries)
        return self._shard.search(queries, NEIGHBOURS, options, nobody)[0]

    def close(self) -> None:
        """Releases the files."""
        self._shard.close()


def without_graph(directory: Path, entries: int, indexes: str, value_floats: int = 8) -> Path:
    """A shard of short keys, for what an entry takes beside its key.

    `indexes`: those on source and example, as a server's collection has them ("ram", or "disk"), "none", or
    "embedded", which has another one.
    """
    directory.mkdir(parents=True)
    spec = spec_of(_SHORT, value_floats)
    shard = qe.EdgeShard.create(str(directory), _configuration(spec.dimension))
    for field, schema in _payload_indexes(indexes).items():
        shard.update(qe.UpdateOperation.create_field_index(field, schema))
    adapter = EngineShard(shard, directory, spec)
    _fill(adapter, entries, value_floats, {GENERATION: 0} if indexes == "embedded" else {})
    adapter.optimize()
    adapter.flush()
    adapter.close()
    return directory


def _fill(shard: EngineShard, entries: int, value_floats: int, mark: Payload) -> None:
    rng, step = np.random.default_rng(0), 4 * _ENTRIES_PER_UPDATE
    ids = rng.permutation(np.unique(rng.integers(2**63, size=entries, dtype=np.uint64)))
    for start in range(0, len(ids), step):
        some = ids[start : start + step]
        keys = rng.standard_normal((len(some), _SHORT), np.float32)
        values = rng.standard_normal((len(some), value_floats), np.float32)
        rows = enumerate(zip(some.tolist(), keys, values, strict=True), start)
        shard.put(
            [
                Record(number, payload_of(value, origin(at)) | mark, key)
                for at, (number, key, value) in rows
            ]
        )


def _payload_indexes(indexes: str) -> dict[str, Any]:
    if indexes == "embedded":
        return payload_indexes()
    keyword = qe.KeywordIndexParams(enable_hnsw=False, on_disk=indexes == "disk")
    return {} if indexes == "none" else {"source": keyword, "example": keyword}


def _configuration(dimension: int) -> Any:
    every_key = qe.EdgeOptimizersConfig(
        default_segment_number=1, max_segment_size=10**9, indexing_threshold=1
    )
    return qe.EdgeConfig(
        vectors=qe.EdgeVectorParams(dimension, qe.Distance.Euclid),
        hnsw_config=qe.HnswIndexConfig(0, 1, 1),
        optimizers=every_key,
        max_search_threads=1,
    )


def pinned_bytes(shard: Path) -> int:
    """RAM that opening a shard takes and the kernel cannot take back, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scaling_shards", str(shard.resolve())]
    done = subprocess.run(command, capture_output=True, check=True, cwd=_ROOT)
    return int(done.stdout)


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    before = _anonymous_bytes()
    opened = qe.EdgeShard.load(sys.argv[1])
    print(_anonymous_bytes() - before)

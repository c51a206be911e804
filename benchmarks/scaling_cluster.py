"""Lookups of a cluster, measured: nodes, shards and replicas against lookups/s, p99 and bytes on the wire.

Every cell is a collection of its own, asked by several threads of one process, through one node and through all that
are given. What nodes send each other is computed: shards of which the asked node has no copy.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks import qdrant
from benchmarks.clustered import F32, Workload, make_workload
from benchmarks.scaling_grid import Column, Grid, count, decimal
from model_runner.progress import Progress
from router_service.arrays import Entries, ExampleRef, Provenance
from router_service.backends.base import Collection, CollectionSpec, Metric, SearchOptions
from router_service.backends.qdrant_server import messages
from router_service.backends.qdrant_server.backend import ServerBackend
from router_service.backends.qdrant_server.connection import Connection
from router_service.backends.qdrant_server.wire import q
from router_service.memories.settings import MemorySettings

NAME, NUM_EXPERTS, NEIGHBOURS = "layer", 64, 32
_QUERIES = 256
_ENTRIES_PER_UPSERT = 512
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """What is measured. `nodes`: of stand-ins; a cluster that is there has those that it has."""

    entries: int = 20_000
    dimension: int = 2048
    nodes: tuple[int, ...] = (1, 3)
    shards: tuple[int, ...] = (1, 3, 6)
    replicas: tuple[int, ...] = (1, 2)
    tokens: tuple[int, ...] = (1, 64)
    callers: int = 4
    calls: int = 200  # of one token; of more in proportion fewer, 20 at the least

    def quick(self) -> ClusterPlan:
        """A small grid, in less than a minute."""
        return replace(self, entries=1_200, dimension=256, shards=(1, 3), calls=60, tokens=(1, 16))


def rows(backend: str, plan: ClusterPlan, progress: Progress) -> Iterator[Row]:
    """Every cell, of the nodes that are given (URL,URL,...), or of stand-ins of each number of nodes."""
    workload = make_workload(plan.entries, plan.dimension, _QUERIES, 1, NUM_EXPERTS, 0)
    for nodes in plan.nodes if backend == qdrant.STANDIN else (len(backend.split(",")),):
        with qdrant.serving(backend, nodes) as urls:
            for shards, replicas in itertools.product(plan.shards, plan.replicas):
                if replicas <= nodes:
                    progress.say(f"{nodes} nodes, {shards} shards, {replicas} replicas")
                    yield from _cells(urls.split(","), shards, replicas, workload, plan)


def _cells(
    urls: list[str], shards: int, replicas: int, workload: Workload, plan: ClusterPlan
) -> Iterator[Row]:
    spec = CollectionSpec(plan.dimension, Metric.EUCLID, NUM_EXPERTS)
    made_as = replace(
        qdrant.options(",".join(urls)), shard_number=shards, replication_factor=replicas
    )
    maker = ServerBackend(Connection(made_as))
    maker.drop(NAME)
    try:
        made = maker.create(NAME, spec)
        _fill(made, workload)
        made.optimize()
        for asked in sorted({1, len(urls)}):
            with qdrant.backend_at(",".join(urls[:asked])) as backend:
                collection = backend.open(NAME, spec)
                sent, back = _bytes(backend.connection, made.alias, workload)
                for tokens in plan.tokens:
                    yield {
                        "nodes": len(urls),
                        "asked": asked,
                        "shards": shards,
                        "replicas": replicas,
                        "tokens": tokens,
                        **_timed(collection, workload.queries.astype(np.float32), tokens, plan),
                        "request_bytes": sent,
                        "response_bytes": back,
                        "remote_shards": shards * (1 - min(1.0, replicas / len(urls))),
                    }
                collection.close()
        made.close()
        maker.drop(NAME)
    finally:
        maker.close()


def _fill(collection: Collection, workload: Workload) -> None:
    for start in range(0, len(workload.ids), _ENTRIES_PER_UPSERT):
        some = np.s_[start : start + _ENTRIES_PER_UPSERT]
        ids = workload.ids[some]
        origins = [Provenance()] * len(ids)
        collection.upsert(Entries(ids, workload.keys[some], workload.deltas[some], origins))


def _options() -> SearchOptions:
    return MemorySettings().search(NEIGHBOURS)


def _bytes(connection: Connection, name: str, workload: Workload) -> tuple[float, float]:
    """Of a lookup's share of a message to the cluster and of its answer, without gRPC's own."""
    queries = workload.queries[:16].astype(np.float32)
    nobody: list[ExampleRef | None] = [None] * len(queries)
    asked = messages.queries_of(name, queries, NEIGHBOURS, _options(), nobody)
    request = q.QueryBatchPoints(collection_name=name, query_points=asked)
    reply = connection.call("points", "QueryBatch", request, qdrant.TIMEOUT_S)
    return request.ByteSize() / len(queries), reply.ByteSize() / len(queries)


def _timed(collection: Collection, queries: F32, tokens: int, plan: ClusterPlan) -> Row:
    """Lookups/s of all callers together, and ms of a call."""
    calls = max(20, plan.calls // tokens)
    elapsed_ms: list[float] = []
    begin = threading.Barrier(plan.callers + 1)

    def caller(number: int) -> None:
        begin.wait()
        for turn in range(calls):
            first = (number * calls + turn) * tokens % (len(queries) - tokens + 1)
            started = time.perf_counter()
            collection.search(queries[first : first + tokens], NEIGHBOURS, _options())
            elapsed_ms.append((time.perf_counter() - started) * 1000)

    collection.search(queries[:tokens], NEIGHBOURS, _options())
    with ThreadPoolExecutor(plan.callers) as pool:
        working = [pool.submit(caller, number) for number in range(plan.callers)]
        begin.wait()
        started = time.perf_counter()
        for each in working:
            each.result()
        elapsed_s = time.perf_counter() - started
    return {
        "lookups_per_s": plan.callers * calls * tokens / elapsed_s,
        "p50_ms": float(np.median(elapsed_ms)),
        "p99_ms": float(np.quantile(elapsed_ms, 0.99)),
    }


def grid(found: list[Row]) -> Grid:
    """The table."""
    columns = [Column("nodes"), Column("of them asked"), Column("shards"), Column("replicas")]
    columns += [Column("tokens of a call"), Column("lookups/s", count)]
    columns += [Column("p50, ms", decimal(1)), Column("p99, ms", decimal(1))]
    columns += [Column("bytes to it", count), Column("bytes back", count)]
    columns += [Column("shards asked of other nodes", decimal(1))]
    first = ("nodes", "asked", "shards", "replicas", "tokens", "lookups_per_s", "p50_ms", "p99_ms")
    names = (*first, "request_bytes", "response_bytes", "remote_shards")
    values = [tuple(row[name] for name in names) for row in found]
    return Grid("lookups", "Lookups of a cluster, measured", columns, values)

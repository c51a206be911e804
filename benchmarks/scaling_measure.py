"""Measures what benchmarks.scaling computes with; everything else there is arithmetic."""

from __future__ import annotations

import tempfile
import tracemalloc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clustered import Workload, make_workload
from benchmarks.report import load_average, machine
from benchmarks.scaling_shards import (
    BATCHES,
    HNSW_EF,
    NEIGHBOURS,
    Queries,
    optimized,
    parts,
    pinned_bytes,
    spec_of,
    without_graph,
    written,
)
from benchmarks.scaling_sizes import METHODS, MODELS, Row, value_floats
from benchmarks.scaling_wire import query_costs, route_bytes
from benchmarks.timing import CacheSweep
from model_runner.progress import Progress
from router_service.backends.disk import remove_tree
from router_service.backends.edge.generation import ValueTable
from router_service.memories.settings import PRESETS, Kind

SCHEMA = 1
_SWEEP_MIB = 64
_QUERIES = 512


@dataclass(frozen=True, slots=True)
class Shards:
    """Shards of `entries` keys [d], indexed with one method after the other."""

    dimension: int
    entries: int
    methods: tuple[str, ...] = METHODS


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes that are measured."""

    shards: tuple[Shards, ...] = (
        Shards(2048, 20_000),
        Shards(2880, 20_000, ("none", "int8", "turbo4", "turbo2", "turbo1", "binary")),
        Shards(2880, 4_000, ("product",)),
        Shards(2048, 100_000, ("int8",)),
        Shards(2048, 400_000, ("int8",)),
    )
    payload_entries: int = 50_000
    pinned_entries: tuple[int, int] = (50_000, 200_000)
    sweep_mib: int = _SWEEP_MIB


def measurements(plan: Plan, progress: Progress) -> Row:
    """Everything that the file of measurements holds; takes a quarter of an hour."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as made:
        root = Path(made)
        return {
            "schema": SCHEMA,
            "machine": machine(),
            "neighbours": NEIGHBOURS,
            "hnsw_ef": HNSW_EF,
            "sweep_mib": plan.sweep_mib,
            "keys": [row for each in plan.shards for row in _keys(root, each, plan, progress)],
            "payloads": [
                _payload(root, plan.payload_entries, width)
                for width in progress.track(_widths(), "payloads")
            ],
            "pinned": [
                _pinned(root, plan.pinned_entries, indexes)
                for indexes in progress.track(
                    ("none", "ram", "disk", "embedded"), "payload indexes"
                )
            ],
            "value_tables": [_value_table(width) for width in _widths()],
            "queries": _queries(),
            "routes": [
                route_bytes(*shape)
                for shape in _distinct((each.dimension, each.experts) for each in MODELS)
            ],
            "load_average": load_average(),
        }


def _distinct(items: Iterable[Any]) -> list[Any]:
    return sorted(set(items))


def _widths() -> list[int]:
    return _distinct(value_floats(model, kind) for model in MODELS for kind in Kind)


def _keys(root: Path, shards: Shards, plan: Plan, progress: Progress) -> list[Row]:
    workload = make_workload(shards.entries, shards.dimension, _QUERIES, 1, 8, seed=0)
    base, sweep = written(root / "base", workload), CacheSweep(plan.sweep_mib)
    what = f"{shards.entries} x {shards.dimension}"
    rows = []
    for method in progress.track(shards.methods, what, "methods"):
        rows.append(_indexed(base, root / method, workload, method, sweep))
        remove_tree(root / method)
    remove_tree(base)
    sweep.close()
    return rows


def _indexed(base: Path, shard: Path, workload: Workload, method: str, sweep: CacheSweep) -> Row:
    entries, dimension = workload.keys.shape
    spec = spec_of(dimension, workload.deltas.shape[1])
    build_s = optimized(base, shard, spec, method)
    sizes = parts(shard)
    queries = Queries(shard, spec, method, workload.queries.astype(np.float32))
    found = queries.found()
    row = {
        "dimension": dimension,
        "entries": entries,
        "method": method,
        "build_s": round(build_s, 1),
        **{f"{part}_bytes": sizes[part] / entries for part in ("key", "codes", "graph")},
        **_recall(found, queries.found(exact=True)),
        "batches": [_batch(queries, tokens, sweep) for tokens in BATCHES],
    }
    queries.close()
    return row


def _recall(found: Any, exact: Any) -> Row:
    hits = [np.isin(one, other).mean() for one, other in zip(exact, found, strict=True)]
    first = (exact[:, :1] == found).any(axis=1).mean()
    return {"recall_at_1": float(first), "recall_at_32": float(np.mean(hits))}


def _batch(queries: Queries, tokens: int, sweep: CacheSweep) -> Row:
    elapsed, processor = queries.ms_per_query(tokens, BATCHES[tokens], sweep)
    return {"tokens": tokens, "ms_per_query": elapsed, "processor_ms_per_query": processor}


def _payload(root: Path, entries: int, width: int) -> Row:
    shard = without_graph(root / "payload", entries, "ram", width)
    sizes = parts(shard)
    remove_tree(shard)
    per_entry = {
        f"{part}_bytes": sizes[part] / entries for part in ("payload", "payload_index", "ids")
    }
    fixed = {f"{part}_bytes_per_shard": sizes[part] for part in ("log", "rest")}
    return {"value_floats": width, "entries": entries, **per_entry, **fixed}


def _pinned(root: Path, sizes: Sequence[int], indexes: str) -> Row:
    """What an entry more pins: the difference of two shards, so that what every shard pins drops out."""
    pinned = []
    for entries in sizes:
        shard = without_graph(root / "pinned", entries, indexes)
        pinned.append(pinned_bytes(shard))
        remove_tree(shard)
    per_entry = (pinned[1] - pinned[0]) / (sizes[1] - sizes[0])
    return {"indexes": indexes, "bytes_per_entry": per_entry, "entries": list(sizes)}


def _value_table(width: int) -> Row:
    """Bytes per entry of the embedded backend's values: as they are opened, and after they have grown."""
    entries = 20_000
    ids, values = np.arange(entries, dtype=np.uint64), np.zeros((entries, width), np.float32)
    tracemalloc.start()
    table = ValueTable(ids.copy(), values.copy())
    opened = tracemalloc.get_traced_memory()[0]
    table = table.with_rows(np.array([entries], np.uint64), values[:1])
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    per_entry = {"opened_bytes": opened / entries, "grown_bytes": grown / len(table)}
    return {"value_floats": width, **per_entry}


def _queries() -> list[Row]:
    neighbours = {
        Kind.LOGIT_DELTA: PRESETS["recommended"].neighbours,
        Kind.ASSIGNMENT: PRESETS["paper"].neighbours,
    }
    shapes = _distinct(
        (model.dimension, value_floats(model, kind), k)
        for model in MODELS
        for kind, k in neighbours.items()
    )
    return [query_costs(*shape) for shape in shapes]

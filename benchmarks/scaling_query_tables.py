"""The tables of docs/scaling.md about queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.scaling_grid import Column, Grid, count, decimal, rate, short
from benchmarks.scaling_load import (
    LOADS,
    Load,
    added_ms,
    demand,
    line_ms,
    measured_ms,
    search_cores,
)
from benchmarks.scaling_shards import BATCHES
from benchmarks.scaling_sizes import (
    EXAMPLES,
    METHOD,
    MODELS,
    Measured,
    Model,
    Row,
    entries_per_layer,
)

_SEARCHED = EXAMPLES[:2]
_FEW = 5


def wire(measured: Measured) -> Grid:
    """Measured: a query to a Qdrant server and its answer."""
    columns = [Column("d"), *map(Column, ("floats of a value", "K"))]
    columns += [Column("bytes to Qdrant", count), Column("bytes back", count)]
    columns += [Column("Python to ask, µs", decimal(0)), Column("to read, µs", decimal(0))]
    names = ("dimension", "value_floats", "neighbours", "request_bytes", "response_bytes")
    rows = [
        tuple(row[name] for name in (*names, "request_us", "response_us"))
        for row in measured.queries
    ]
    return Grid("wire", "A query on the wire", columns, rows)


def growths(measured: Measured) -> Grid:
    """How search cost and links grow with the entries of a graph: measured, or on the line through it."""
    columns = [Column(f"entries of a graph, `{METHOD}`", count), Column("")]
    columns += [Column(f"ms of a core, batch {tokens}", decimal(2)) for tokens in BATCHES]
    columns += [Column("bytes of links", decimal(0))]
    rows = {int(row["entries"]): row for row in measured.grown}
    numbers = sorted({*rows, *map(entries_per_layer, EXAMPLES)})
    cells = [_grown(measured, number, rows.get(number)) for number in numbers]
    return Grid("growth", "Search cost by size", columns, cells)


def _grown(measured: Measured, entries: int, row: Row | None) -> list[Any]:
    if row is not None:
        times = [measured_ms(row, tokens) for tokens in BATCHES]
        return [entries, "measured", *times, row["graph_bytes"]]
    times = [line_ms(measured, entries, tokens) for tokens in BATCHES]
    return [entries, "line", *times, measured.graph(MODELS[0].dimension, METHOD, entries)]


def queries(measured: Measured) -> Grid:
    """Computed: demand per second."""
    columns = [
        Column("model"),
        Column("load"),
        Column("calls/s", count),
        Column("queries/s", count),
    ]
    columns += [Column(f"search cores, {count(number)} examples", short) for number in _SEARCHED]
    columns += [Column("runner to sidecar", rate), Column("and back", rate)]
    columns += [Column("sidecar to Qdrant", rate), Column("values back", rate)]
    columns += [Column("Python cores for these messages", decimal(1))]
    rows = [_demanded(measured, model, load) for model in MODELS for load in LOADS]
    return Grid("queries", "Demand per second", columns, rows)


def _demanded(measured: Measured, model: Model, load: Load) -> tuple[Any, ...]:
    asked = demand(measured, model, load)
    sizes = map(entries_per_layer, _SEARCHED)
    cores = [search_cores(measured, model, load, entries) for entries in sizes]
    network = (asked.to_sidecar, asked.from_sidecar, asked.to_qdrant, asked.from_qdrant)
    return (model.name, load.name, asked.calls, asked.queries, *cores, *network, asked.python_cores)


def latency(routes: Sequence[Row]) -> Grid:
    """Measured ms of a call, times layers."""
    columns = [Column("ms that lookups add to a step")]
    columns += [
        Column("1 token" if row["tokens"] == 1 else f"{row['tokens']} tokens", decimal(0))
        for row in routes
    ]
    rows: list[list[Any]] = [
        [f"{model.name}, {model.layers} layers", *_added(routes, model.layers)] for model in MODELS
    ]
    silent = MODELS[0].layers - _FEW
    few = f"{MODELS[0].name}, {_FEW} of {MODELS[0].layers} layers (`memory set --layers`)"
    rows.append([few, *_added(routes, _FEW, silent)])
    return Grid("latency", "Latency of a step", columns, rows)


def _added(routes: Sequence[Row], layers: int, silent: int = 0) -> list[float]:
    return [added_ms(row, layers, silent) for row in routes]

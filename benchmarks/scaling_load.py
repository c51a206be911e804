"""Queries, processor cores and network that a model asks of a memory: arithmetic on what was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from benchmarks.scaling_sizes import METHOD, Measured, Model, Row, line, value_floats
from router_service.memories.settings import Kind


@dataclass(frozen=True, slots=True)
class Load:
    """Steps of a model: every step asks once per MoE layer about all of its tokens."""

    name: str
    tokens_per_step: int
    steps_per_s: float

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together."""
        return self.tokens_per_step * self.steps_per_s


LOADS = (
    Load("decode, 1 x 50 tok/s", 1, 50.0),
    Load("decode, 16 x 50 tok/s", 16, 50.0),
    Load("decode, 64 x 50 tok/s", 64, 50.0),
    Load("prefill, 5,000 tok/s", 512, 5_000 / 512),
)


def measured_ms(row: Row, tokens: int) -> float:
    """Processor time of one query, in calls of `tokens`, to a shard that was measured."""
    found: list[Any] = [batch for batch in row["batches"] if batch["tokens"] == tokens]
    return float(found[0]["processor_ms_per_query"])


def line_ms(measured: Measured, entries: int, tokens: int) -> float:
    """The same to a graph of `entries` keys of the dimension that was measured at several sizes."""
    return line([(row["entries"], measured_ms(row, tokens)) for row in measured.grown], entries)


def processor_ms(measured: Measured, model: Model, entries: int, tokens: int) -> float:
    """The same for a model's keys, which cost more where they are longer."""
    theirs, grown = measured.keys(model.dimension, METHOD)[0], measured.grown[0]
    longer = measured_ms(theirs, tokens) / measured_ms(grown, tokens)
    return line_ms(measured, entries, tokens) * longer


@dataclass(frozen=True, slots=True)
class Demand:
    """What a load asks for, per second."""

    calls: float
    queries: float
    to_sidecar: float  # bytes
    from_sidecar: float
    to_qdrant: float
    from_qdrant: float
    python_cores: float  # of sidecars that speak to a Qdrant server: messages alone


def demand(measured: Measured, model: Model, load: Load) -> Demand:
    """Of all of a model's layers, with logit deltas."""
    calls, queries = model.layers * load.steps_per_s, model.layers * load.tokens_per_s
    route = measured.route(model)
    query = measured.query(model.dimension, value_floats(model, Kind.LOGIT_DELTA))
    return Demand(
        calls,
        queries,
        queries * route["request_bytes"],
        queries * route["response_bytes"],
        queries * query["request_bytes"],
        queries * query["response_bytes"],
        queries * (query["request_us"] + query["response_us"]) / 1e6,
    )


def search_cores(
    measured: Measured, model: Model, load: Load, entries: int, graphs: int = 1
) -> float:
    """Cores that searching takes when every query walks `graphs` graphs of entries / graphs each."""
    ms = processor_ms(measured, model, entries // graphs, load.tokens_per_step)
    return graphs * model.layers * load.tokens_per_s * ms / 1000


def default_graphs(entries: int, dimension: int, indexing_threads: int = 8) -> int:
    """Segments of a shard under Qdrant's defaults: 256,000 KB of keys per indexing thread, at least 2."""
    kb = entries * dimension * 4 / 1024
    return max(2, math.ceil(kb / (256_000 * indexing_threads)))


def added_ms(route: Row, layers: int, silent: int = 0) -> float:
    """What lookups add to a step: layers follow each other, and those that the memory is silent at are asked too.

    `route`: a row of benchmarks.route; a layer that is silent takes its call but the search.
    """
    return layers * float(route["p50_ms"]) + silent * float(
        route["p50_ms"] - route["stages_ms"]["search"]
    )

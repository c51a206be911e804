"""Bytes, RAM, shards and nodes of a memory: arithmetic on what benchmarks.scaling_measure measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from router_service.memories.settings import Kind

Row = dict[str, Any]
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Model:
    """A model as a memory sees it: MoE layers, hidden size d, experts N, top-k."""

    name: str
    layers: int
    dimension: int
    experts: int
    top_k: int


MODELS = (
    Model("OLMoE-1B-7B", 16, 2048, 64, 8),
    Model("GPT-OSS-20B", 24, 2880, 32, 4),
    Model("GPT-OSS-120B", 36, 2880, 128, 4),
    Model("Qwen3-30B-A3B", 48, 2048, 128, 8),
)
# Bytes of weights in bf16 (6.92 and 30.5 billion, by the model cards) of those that are computed by entries per layer.
WEIGHTS = {"OLMoE-1B-7B": 13.8e9, "Qwen3-30B-A3B": 61.1e9}
METHODS = ("none", "int8", "turbo4", "turbo2", "turbo1", "binary", "product")
# Of which shards of several sizes were measured, and with keys of which dimension; others grow as these do.
METHOD, _GROWN_DIMENSION = "int8", 2048
EXAMPLES = (1_000, 100_000, 10_000_000)
ENTRIES_PER_LAYER = (10_000, 1_000_000, 100_000_000)
TOKENS_PER_EXAMPLE = 128
NODES_GIB = (64, 256)
NODE_CORES = 16
REPLICATION = 2
# Fewer cannot lose one and go on changing collections.
FEWEST_NODES = 3
# Of a node's RAM and cores; the rest is for pages that rescoring reads, for indexing, and for the system.
USABLE_RAM = 0.75
# So that no node gets much more than its share.
REPLICAS_PER_NODE = 4
# https://qdrant.tech/documentation/capacity-planning/: vectors in RAM x 1.5.
QDRANT_OVERHEAD = 1.5


def value_floats(model: Model, kind: Kind) -> int:
    """Width of a value row."""
    return kind.value_width(model.experts, model.top_k)


def entries_per_layer(examples: int, tokens: int = TOKENS_PER_EXAMPLE) -> int:
    """One entry per token of every example."""
    return examples * tokens


def line(points: Sequence[tuple[int, float]], entries: int) -> float:
    """A figure at `entries`: the least-squares line in log n through points, level below the smallest of them."""
    at, figures = np.log([point[0] for point in points]), [point[1] for point in points]
    slope, start = np.polyfit(at, figures, 1)
    return float(start + slope * max(math.log(max(entries, 1)), at.min()))


class Measured:
    """The file of measurements, by what is asked of it."""

    def __init__(self, content: Row) -> None:
        self._content = content

    @property
    def shards(self) -> list[Row]:
        """Every shard that was indexed and searched."""
        return list(self._content["keys"])

    @property
    def queries(self) -> list[Row]:
        """Every shape of query to a Qdrant server."""
        return list(self._content["queries"])

    def codes(self, dimension: int, method: str) -> float:
        """Bytes of a quantized key; 0 for `none`."""
        return float(self.keys(dimension, method)[-1]["codes_bytes"])

    @property
    def grown(self) -> list[Row]:
        """Shards of several sizes and the same kind, the smallest first."""
        return self.keys(_GROWN_DIMENSION, METHOD)

    def graph(self, dimension: int, method: str, entries: int) -> float:
        """Bytes of an entry's links: with more entries they are more, and their numbers longer."""
        sizes = [(int(row["entries"]), float(row["graph_bytes"])) for row in self.grown]
        smallest = self.keys(dimension, method)[0]
        growth = line(sizes, entries) / line(sizes, smallest["entries"])
        return float(smallest["graph_bytes"]) * growth

    def payload(self, width: int) -> Row:
        """Disk per entry with value rows of `width` floats."""
        return self._one("payloads", value_floats=width)

    def pinned(self, indexes: str) -> float:
        """RAM per entry that ids and payload indexes pin."""
        return float(self._one("pinned", indexes=indexes)["bytes_per_entry"])

    def value_table(self, width: int) -> float:
        """RAM per entry of the embedded backend's values."""
        return float(self._one("value_tables", value_floats=width)["opened_bytes"])

    def query(self, dimension: int, width: int) -> Row:
        """Bytes and Python time per query to a Qdrant server."""
        return self._one("queries", dimension=dimension, value_floats=width)

    def route(self, model: Model) -> Row:
        """Bytes per token between runner and sidecar."""
        return self._one("routes", dimension=model.dimension, experts=model.experts)

    def keys(self, dimension: int, method: str) -> list[Row]:
        """Shards of a dimension and method, the smallest first."""
        found = [
            row
            for row in self._content["keys"]
            if (row["dimension"], row["method"]) == (dimension, method)
        ]
        return sorted(found, key=lambda row: int(row["entries"]))

    def _one(self, table: str, **wanted: Any) -> Row:
        rows = [
            row for row in self._content[table] if all(row[name] == wanted[name] for name in wanted)
        ]
        if len(rows) != 1:
            raise LookupError(
                f"{table} has {len(rows)} rows for {wanted}; measure again (--measure)"
            )
        row: Row = rows[0]
        return row


@dataclass(frozen=True, slots=True)
class EntrySize:
    """Bytes of one entry."""

    key: int
    codes: float
    graph: float
    payload: float
    bookkeeping: float  # ids and payload indexes on disk
    pinned: float  # the same in RAM

    @property
    def disk(self) -> float:
        """All that is stored."""
        return self.key + self.codes + self.graph + self.payload + self.bookkeeping

    @property
    def ram(self) -> float:
        """What a search reads but for rescoring; without codes that is the keys themselves."""
        return (self.codes or self.key) + self.graph + self.pinned


def entry_size(
    measured: Measured,
    model: Model,
    method: str,
    entries: int,
    kind: Kind = Kind.LOGIT_DELTA,
    indexes: str = "ram",
) -> EntrySize:
    """One of `entries` in a layer's collection, with payload indexes as Measured.pinned() knows them."""
    payload = measured.payload(value_floats(model, kind))
    return EntrySize(
        key=4 * model.dimension,
        codes=measured.codes(model.dimension, method),
        graph=measured.graph(model.dimension, method, entries),
        payload=payload["payload_bytes"],
        bookkeeping=payload["payload_index_bytes"] + payload["ids_bytes"],
        pinned=measured.pinned(indexes),
    )


@dataclass(frozen=True, slots=True)
class MemorySize:
    """A memory of one model, one copy."""

    layers: int
    entries: int  # all layers
    disk: float
    ram: float


def memory_size(
    measured: Measured, model: Model, method: str, entries: int, layers: int | None = None
) -> MemorySize:
    """With `entries` in each of the model's layers, or in so many of them."""
    each = entry_size(measured, model, method, entries)
    number = layers or model.layers
    total = number * entries
    return MemorySize(number, total, total * each.disk, total * each.ram)


def qdrant_rule(model: Model, entries: int) -> float:
    """RAM of all vectors by Qdrant's published rule of thumb."""
    return model.layers * entries * 4 * model.dimension * QDRANT_OVERHEAD


def nodes(ram: float, node_gib: int) -> int:
    """Nodes of `node_gib` GiB that hold REPLICATION copies of `ram` bytes."""
    return max(FEWEST_NODES, math.ceil(REPLICATION * ram / (USABLE_RAM * node_gib * GIB)))


def nodes_by_cores(search_cores: float) -> int:
    """Nodes of NODE_CORES cores that search that much; every copy answers."""
    return math.ceil(search_cores / (USABLE_RAM * NODE_CORES))


# Bytes of a number of the keys that a model's own process holds; beside them an id, and values of f32.
HELD = {"f32": 4, "f16": 2, "int8": 1}
_ID_BYTES = 8
GPU_BYTES = 80e9
# Of a GPU's memory; the rest is for activations and the cache of keys and values.
_USABLE_GPU = 0.8


def held_entry(model: Model, number_bytes: float) -> float:
    """Bytes of an entry in a model's own process: key, value row of logit deltas, id; scanned, so without links."""
    values = 4 * value_floats(model, Kind.LOGIT_DELTA)
    return number_bytes * model.dimension + values + _ID_BYTES


def held_on_gpu(model: Model, number_bytes: float) -> int:
    """Entries per layer on a GPU of GPU_BYTES beside the weights; 0 when there is no room."""
    room = max(0.0, _USABLE_GPU * GPU_BYTES - WEIGHTS[model.name])
    return int(room / (model.layers * held_entry(model, number_bytes)))


def held_in_ram(model: Model, number_bytes: float, ram_gib: int) -> int:
    """Entries per layer in USABLE_RAM of a host's RAM, the weights being on the GPU."""
    return int(USABLE_RAM * ram_gib * GIB / (model.layers * held_entry(model, number_bytes)))


def shards_per_layer(number_of_nodes: int, layers: int) -> int:
    """Enough that every node has REPLICAS_PER_NODE replicas or more, whatever the layer they belong to."""
    return max(1, math.ceil(REPLICAS_PER_NODE * number_of_nodes / (REPLICATION * layers)))


def examples_embedded(measured: Measured, model: Model, method: str, ram_gib: int) -> int:
    """Examples that one machine holds embedded, with the values in RAM too; one copy."""
    usable, examples = USABLE_RAM * ram_gib * GIB, 0.0
    for _ in range(8):  # the graph's bytes depend on the number
        entries = max(2, int(examples * TOKENS_PER_EXAMPLE))
        each = entry_size(measured, model, method, entries, indexes="embedded")
        values = measured.value_table(value_floats(model, Kind.LOGIT_DELTA))
        examples = usable / (model.layers * TOKENS_PER_EXAMPLE * (each.ram + values))
    return int(examples)

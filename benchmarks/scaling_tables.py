"""The tables of docs/scaling.md; those about queries: scaling_query_tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.scaling_grid import Column, Grid, amount, count, decimal
from benchmarks.scaling_load import LOADS, default_graphs, search_cores
from benchmarks.scaling_query_tables import growths, latency, queries, wire
from benchmarks.scaling_shards import BATCHES
from benchmarks.scaling_sizes import (
    ENTRIES_PER_LAYER,
    EXAMPLES,
    FEWEST_NODES,
    GPU_BYTES,
    HELD,
    METHOD,
    METHODS,
    MODELS,
    NODE_CORES,
    NODES_GIB,
    REPLICATION,
    WEIGHTS,
    Measured,
    Model,
    Row,
    entries_per_layer,
    entry_size,
    examples_embedded,
    held_entry,
    held_in_ram,
    held_on_gpu,
    memory_size,
    nodes,
    nodes_by_cores,
    qdrant_rule,
    shards_per_layer,
    value_floats,
)
from router_service.memories.settings import Kind

# Share of entries or layers that is kept, and what the step is.
LESS = (
    ("everything", 1.0, None),
    ("pruned to half", 0.5, None),
    ("and 5 layers", 0.5, 5),
    ("and every 8th token", 0.5 / 8, 5),
)
# Of search keys; and what is asked of the cluster.
_OF_CLUSTER, _LOAD = ("none", "int8", "turbo4"), LOADS[1]
_ONE = decimal(1)


def tables(measured: Measured, routes: Sequence[Row]) -> list[Grid]:
    """All of them; `routes` are rows of benchmarks.route, one for each number of tokens."""
    return [
        models(),
        methods(measured),
        entries(measured),
        *(sizes(measured, model) for model in MODELS),
        embedded(measured),
        placement(measured),
        less(measured),
        cluster(measured),
        held(),
        wire(measured),
        growths(measured),
        queries(measured),
        latency(routes),
    ]


def slug(model: Model) -> str:
    """Of a model's name, for the name of its table."""
    return model.name.lower().split("-1b")[0].split("-30b")[0]


def models() -> Grid:
    """What a memory stores of each model."""
    columns = [Column("model"), *map(Column, ("MoE layers", "d", "experts N", "top-k"))]
    columns += [Column("floats of a logit delta"), Column("of an assignment")]
    columns += [Column(f"entries at {count(number)} examples", count) for number in EXAMPLES]
    rows = [
        (
            *(model.name, model.layers, model.dimension, model.experts, model.top_k),
            *(value_floats(model, kind) for kind in (Kind.LOGIT_DELTA, Kind.ASSIGNMENT)),
            *(model.layers * entries_per_layer(number) for number in EXAMPLES),
        )
        for model in MODELS
    ]
    return Grid("models", "Models", columns, rows)


def methods(measured: Measured) -> Grid:
    """Measured: bytes, recall and time of each compression, with the candidates that it has by default."""
    columns = [Column("search keys"), Column("d"), Column("keys", count)]
    columns += [Column("bytes of codes", _ONE), Column("of links", _ONE)]
    columns += [Column("recall@1", decimal(3)), Column("recall@32", decimal(4))]
    columns += [Column(f"ms of a core per query, batch {tokens}", decimal(2)) for tokens in BATCHES]
    columns += [Column("build, s", decimal(0))]
    rows = [
        (
            *(f"`{row['method']}`", row["dimension"], row["entries"]),
            *(row["codes_bytes"] or None, row["graph_bytes"]),
            *(row["recall_at_1"], row["recall_at_32"]),
            *(batch["processor_ms_per_query"] for batch in row["batches"]),
            row["build_s"],
        )
        for row in measured.shards
    ]
    return Grid("methods", "Search keys, measured", columns, rows)


def entries(measured: Measured) -> Grid:
    """Measured: what an entry takes beside its search key."""
    columns = [Column("model"), Column("value"), Column("key on disk", count)]
    columns += [Column("payload on disk", count), Column("ids and payload indexes on disk", count)]
    columns += [Column("the same, pinned in RAM", count)]
    columns += [Column("pinned if the indexes were on disk", count)]
    columns += [Column("values in RAM, embedded", count)]
    rows = []
    for model in MODELS:
        for kind in (Kind.LOGIT_DELTA, Kind.ASSIGNMENT):
            size = entry_size(measured, model, "none", entries_per_layer(1000), kind)
            table = measured.value_table(value_floats(model, kind))
            what = f"{value_floats(model, kind)} floats, `{kind.value}`"
            parts = (size.key, size.payload, size.bookkeeping, size.pinned)
            rows.append((model.name, what, *parts, measured.pinned("disk"), table))
    return Grid("entries", "Bytes of an entry beside its search key", columns, rows)


def sizes(measured: Measured, model: Model) -> Grid:
    """Computed: disk and RAM of one copy, and nodes for all copies."""
    columns = [Column(model.name)]
    for number in EXAMPLES:
        of = f"{count(number)} examples"
        columns += [Column(f"{of}: disk", amount), Column(f"{of}: RAM", amount)]
        columns += [Column(f"{of}: nodes")]
    rows = [(f"`{method}`", *_of_all_examples(measured, model, method)) for method in METHODS]
    rule = [qdrant_rule(model, entries_per_layer(number)) for number in EXAMPLES]
    last: list[Any] = ["Qdrant's rule, all in RAM"]
    for ram in rule:
        last += [None, ram, _nodes(ram)]
    return Grid(f"sizes-{slug(model)}", f"Sizes of {model.name}", columns, [*rows, last])


def _of_all_examples(measured: Measured, model: Model, method: str) -> list[Any]:
    cells: list[Any] = []
    for number in EXAMPLES:
        size = memory_size(measured, model, method, entries_per_layer(number))
        cells += [size.disk, size.ram, _nodes(size.ram)]
    return cells


def _nodes(ram: float) -> str:
    return " / ".join(f"{nodes(ram, gib):,}" for gib in NODES_GIB)


def embedded(measured: Measured) -> Grid:
    """Computed: the most that one machine holds without a server."""
    columns = [Column("examples that fit")]
    columns += [Column(f"{model.name}, {gib} GiB", count) for model in MODELS for gib in NODES_GIB]
    rows = [
        (
            f"`{method}`",
            *(examples_embedded(measured, m, method, gib) for m in MODELS for gib in NODES_GIB),
        )
        for method in METHODS
    ]
    return Grid("embedded", "What one machine holds", columns, rows)


def placement(measured: Measured) -> Grid:
    """Computed: shards over nodes of the largest size."""
    columns = [Column(f"`{METHOD}`, nodes of {NODES_GIB[-1]} GiB"), Column("examples", count)]
    columns += [
        Column("nodes", count),
        Column("shards per layer"),
        Column("entries per shard", count),
    ]
    columns += [Column("replicas per node", _ONE), Column("disk per node", amount)]
    columns += [Column("graphs per query, segments of Qdrant's default size", count)]
    rows = [_placed(measured, model, number) for model in MODELS for number in EXAMPLES]
    return Grid("placement", "Shards and nodes", columns, rows)


def _placed(measured: Measured, model: Model, examples: int) -> tuple[Any, ...]:
    per_layer = entries_per_layer(examples)
    size = memory_size(measured, model, METHOD, per_layer)
    number = nodes(size.ram, NODES_GIB[-1])
    shards = shards_per_layer(number, model.layers)
    replicas = REPLICATION * shards * model.layers / number
    each = per_layer // shards
    graphs = shards * default_graphs(each, model.dimension)
    disk = REPLICATION * size.disk / number
    return (model.name, examples, number, shards, each, replicas, disk, graphs)


def less(measured: Measured) -> Grid:
    """Computed: ways out of 10 million examples."""
    columns = [Column(f"{count(EXAMPLES[-1])} examples, `turbo4`")]
    for model in (MODELS[0], MODELS[-1]):
        columns += [Column(f"{model.name}: entries", count), Column(f"{model.name}: RAM", amount)]
        columns += [Column(f"{model.name}: nodes of {NODES_GIB[-1]} GiB", count)]
    rows = [
        (
            what,
            *_with_less(measured, MODELS[0], share, layers),
            *_with_less(measured, MODELS[-1], share, layers),
        )
        for what, share, layers in LESS
    ]
    return Grid("less", "What to leave out", columns, rows)


def _with_less(measured: Measured, model: Model, share: float, layers: int | None) -> list[Any]:
    kept = int(entries_per_layer(EXAMPLES[-1]) * share)
    size = memory_size(measured, model, "turbo4", kept, layers)
    return [size.entries, size.ram, nodes(size.ram, NODES_GIB[-1])]


def _by_layer() -> list[Model]:
    return [model for model in MODELS if model.name in WEIGHTS]


def cluster(measured: Measured) -> Grid:
    """Computed: nodes by entries per layer, for all copies and for one load."""
    columns = [Column("model"), Column("entries per layer", count), Column("entries", count)]
    columns += [Column(f"`{METHOD}`: disk, {REPLICATION} copies", amount)]
    for method in _OF_CLUSTER:
        columns += [Column(f"`{method}`: RAM, {REPLICATION} copies", amount)]
        columns += [Column(f"`{method}`: nodes for it")]
    columns += [Column("shards per layer"), Column("lookups/s", count)]
    columns += [Column("search cores", _ONE), Column(f"nodes of {NODE_CORES} cores for them")]
    columns += [Column(f"`{METHOD}`: nodes of {NODES_GIB[-1]} GiB and {NODE_CORES} cores")]
    rows = [
        _at_size(measured, model, entries) for model in _by_layer() for entries in ENTRIES_PER_LAYER
    ]
    return Grid("cluster", f"Nodes for {_LOAD.name}", columns, rows)


def _at_size(measured: Measured, model: Model, per_layer: int) -> tuple[Any, ...]:
    sizes = {method: memory_size(measured, model, method, per_layer) for method in _OF_CLUSTER}
    by_ram = [(REPLICATION * size.ram, _nodes(size.ram)) for size in sizes.values()]
    chosen = sizes[METHOD]
    by_size = nodes(chosen.ram, NODES_GIB[-1])
    shards = shards_per_layer(by_size, model.layers)
    cores = search_cores(measured, model, _LOAD, per_layer, graphs=shards)
    by_cores = nodes_by_cores(cores)
    return (
        *(model.name, per_layer, chosen.entries, REPLICATION * chosen.disk),
        *(cell for pair in by_ram for cell in pair),
        *(shards, model.layers * _LOAD.tokens_per_s, cores, by_cores),
        max(FEWEST_NODES, by_size, by_cores),
    )


def held() -> Grid:
    """Computed: what a model's own process holds, and how many entries per layer fit there."""
    columns = [Column("model"), Column("keys as"), Column("bytes of an entry", count)]
    columns += [Column(f"{count(each)} entries per layer", amount) for each in ENTRIES_PER_LAYER]
    columns += [Column(f"entries per layer on a GPU of {amount(GPU_BYTES)}", count)]
    columns += [Column(f"in RAM of {gib} GiB", count) for gib in NODES_GIB]
    rows = [
        (
            *(model.name, name, held_entry(model, number)),
            *(model.layers * each * held_entry(model, number) for each in ENTRIES_PER_LAYER),
            held_on_gpu(model, number),
            *(held_in_ram(model, number, gib) for gib in NODES_GIB),
        )
        for model in _by_layer()
        for name, number in HELD.items()
    ]
    return Grid("held", "Keys beside the model", columns, rows)

"""What searches find: exclusion share x state of the index x compression, `python -m benchmarks.recall --json FILE`.

--backend URL asks a Qdrant server instead of the embedded backend, with the methods that it has itself.

Keys are draws around 400 centres. One example has a share of the entries; queries are its keys, which must not find
their own example, or (share 0) keys of the same kind that are not stored. `same`: the example's entries lie among the
others. `own`: it has centres to itself, so that all that is near a query is hidden. Recall@32 and the share of queries
whose nearest entry is another one are against brute force in float64.

States, one after the other: `indexed`; `tail`: a tenth more was written since; `outdated`: a quarter of the indexed
entries was replaced, too; `worn`: half of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks import qdrant
from benchmarks.report import load_average, machine
from router_service.arrays import F32, Entries, ExampleRef, Provenance
from router_service.backends.base import (
    Collection,
    CollectionSpec,
    Compression,
    Maintained,
    Metric,
    Pacing,
    Quantization,
)
from router_service.backends.edge.backend import EdgeBackend
from router_service.backends.qdrant_server.collection import OWN
from router_service.memories.settings import MemorySettings

SCHEMA = 1
NEIGHBOURS = 32
CENTRES = 400
SOURCE = "text"
STATES = ("indexed", "tail", "outdated", "worn")
COMPRESSIONS = tuple(Quantization)
EMBEDDED = "embedded"
# Shares of the large examples of a layer: as many as fit are measured on one index.
LAYOUTS = ((0.01, 0.1, 0.3, 0.5), (0.8,), (0.95,), (0.99,))
_TAIL = 0.1
_REPLACED = {"outdated": 0.25, "worn": 0.5}
_WRITE = 500
_SAME_DISTANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Settings:
    """What is searched."""

    entries: tuple[int, ...] = (12_000, 100_000)
    dimension: int = 64
    queries: int = 64
    layouts: tuple[tuple[float, ...], ...] = LAYOUTS
    compressions: tuple[str, ...] = COMPRESSIONS
    seed: int = 0
    backend: str = EMBEDDED  # or the URL of a Qdrant server


@dataclass(frozen=True, slots=True)
class Row:
    """One cell of the table. `kind`: `same` or `own`; `share`: of the hidden example, 0 when nothing is hidden."""

    entries: int
    kind: str
    share: float
    state: str
    compression: str
    recall: float
    nearest_wrong: float
    ms_per_query: float


@dataclass(frozen=True, slots=True)
class _Layer:
    """Keys [n, d] and the example of each; per hidden share the example and the queries [q, d]."""

    kind: str
    keys: F32
    examples: list[str]
    questions: dict[float, tuple[str, F32]]

    def entries(self, rows: range) -> Entries:
        origins = [Provenance(SOURCE, self.examples[row], row, 0, 0.0, 1) for row in rows]
        values = np.zeros((len(rows), 2), np.float32)
        return Entries(np.array(rows, np.uint64), self.keys[rows], values, origins)

    def nearest(self, share: float, size: int) -> NDArray[np.float64]:
        """Exact squared distances [q, at most 32], ascending, among the first `size` entries."""
        hidden, queries = self.questions[share]
        seen = [row for row in range(size) if self.examples[row] != hidden]
        keys, asked = self.keys[seen].astype(np.float64), queries.astype(np.float64)
        squares = (asked**2).sum(axis=1)[:, None] + (keys**2).sum(axis=1)
        distances = np.maximum(squares - 2 * asked @ keys.T, 0)
        most = min(NEIGHBOURS, len(keys))
        return np.sort(np.partition(distances, most - 1)[:, :most])


def _layer(settings: Settings, entries: int, kind: str, shares: Sequence[float]) -> _Layer:
    rng = np.random.default_rng(settings.seed)
    centres = rng.standard_normal((CENTRES, settings.dimension))
    centre = rng.integers(CENTRES, size=entries + settings.queries)
    noise = rng.standard_normal((len(centre), settings.dimension)) / 2
    keys = (centres[centre] + noise).astype(np.float32)
    place = rng.random(entries) if kind == "same" else centre[:entries] / CENTRES
    part = np.searchsorted(np.cumsum(shares), place, side="right")
    names = [f"big-{share}" for share in shares]
    examples = [names[p] if p < len(names) else f"note-{row // 50}" for row, p in enumerate(part)]
    questions = {0.0: ("", keys[entries:])}
    for number, (share, name) in enumerate(zip(shares, names, strict=True)):
        own = np.flatnonzero(part == number)[: settings.queries]
        questions[share] = (name, keys[own])
    return _Layer(kind, keys[:entries], examples, questions)


def rows(settings: Settings) -> Iterator[Row]:
    """Every cell."""
    for entries in settings.entries:
        for kind in ("same", "own"):
            for shares in settings.layouts:
                layer = _layer(settings, entries, kind, shares)
                for label in settings.compressions:
                    yield from _measured(settings.backend, layer, label)


@contextmanager
def _empty_layer(backend: str, dimension: int) -> Iterator[Collection]:
    """A layer of that backend, gone afterwards."""
    spec = CollectionSpec(dimension, Metric.EUCLID, 2)
    if backend == EMBEDDED:
        with tempfile.TemporaryDirectory() as directory:
            edge = EdgeBackend(Path(directory), min_free_bytes=0, isolate_above_bytes=1 << 62)
            yield edge.create("layer", spec)
            edge.close()
        return
    with qdrant.backend_at(backend) as server:
        server.drop("layer")
        collection = server.create("layer", spec)
        yield collection
        collection.close()
        server.drop("layer")


def _measured(backend: str, layer: _Layer, label: str) -> Iterator[Row]:
    compression, size = Compression.parse(label), len(layer.keys)
    indexed = size - int(_TAIL * size)
    with _empty_layer(backend, layer.keys.shape[1]) as collection:
        for state in STATES:
            if state == "indexed":
                _write(collection, layer, range(indexed))
                collection.optimize(compression)
            elif state == "tail":
                _write(collection, layer, range(indexed, size))
            else:
                _write(collection, layer, range(int(_REPLACED[state] * indexed)))
            for share in layer.questions:
                there = indexed if state == "indexed" else size
                yield _cell(collection, layer, share, there, (state, label))


def _cell(
    collection: Collection, layer: _Layer, share: float, size: int, names: tuple[str, str]
) -> Row:
    state, label = names
    settings = MemorySettings(oversampling=Compression.parse(label).oversampling)
    hidden, queries = layer.questions[share]
    exclude = [ExampleRef(SOURCE, hidden)] if hidden else []
    started = time.perf_counter()
    options = settings.search(NEIGHBOURS)
    found = collection.search(queries, NEIGHBOURS, options, exclude).distances
    elapsed_ms = (time.perf_counter() - started) * 1000
    nearest = layer.nearest(share, size)
    # A neighbour as near as the farthest of the true ones is one of them, or ties with it.
    within = found <= nearest[:, -1:] * (1 + _SAME_DISTANCE)
    hits = np.minimum(within.sum(axis=1), nearest.shape[1])
    wrong = found[:, 0] > nearest[:, 0] * (1 + _SAME_DISTANCE)
    return Row(
        len(layer.keys),
        layer.kind,
        share,
        state,
        label,
        float(hits.mean() / nearest.shape[1]),
        float(wrong.mean()),
        elapsed_ms / len(queries),
    )


def _write(collection: Collection, layer: _Layer, some: range) -> None:
    if isinstance(collection, Maintained):
        collection.pacing = Pacing()  # writes do not rest: nobody else is searching
    for start in range(some.start, some.stop, _WRITE):
        collection.upsert(layer.entries(range(start, min(start + _WRITE, some.stop))))


def table_of(found: Sequence[dict[str, Any]]) -> Table:
    """A line per number of entries, kind, share and state; a column per compression: recall, and wrong nearest in %."""
    labels = list(dict.fromkeys(row["compression"] for row in found))
    table = Table("entries", "example", "hidden", "index", *labels)
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in found:
        key = (row["entries"], row["kind"], row["share"], row["state"])
        wrong = f" ({row['nearest_wrong']:.0%})" if row["nearest_wrong"] else ""
        cells.setdefault(key, {}).setdefault(row["compression"], f"{row['recall']:.3f}{wrong}")
    for (entries, kind, share, state), by_label in cells.items():
        table.add_row(
            f"{entries:,}", kind, f"{share:g}", state, *(by_label[label] for label in labels)
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table, writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="the numbers go here")
    parser.add_argument(
        "--backend", default=EMBEDDED, help="embedded, the URL of a Qdrant server, or standin"
    )
    parser.add_argument("--entries", default="12000,100000")
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--methods", help="default: all that the backend has")
    parser.add_argument(
        "--hidden",
        default=" ".join(",".join(map(str, shares)) for shares in LAYOUTS),
        help="shares of the hidden examples, for each layer with such examples",
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    own = COMPRESSIONS if given.backend == EMBEDDED else OWN
    settings = Settings(
        entries=tuple(int(each) for each in given.entries.split(",")),
        dimension=given.dimension,
        layouts=tuple(tuple(map(float, each.split(","))) for each in given.hidden.split()),
        compressions=tuple(given.methods.split(",")) if given.methods else own,
        seed=given.seed,
        backend=given.backend,
    )
    started = time.monotonic()
    with (
        qdrant.serving(given.backend) if given.backend != EMBEDDED else nullcontext(EMBEDDED) as at
    ):
        found = [asdict(row) for row in rows(replace(settings, backend=at))]
    results = {
        "schema": SCHEMA,
        "settings": asdict(settings),
        "rows": found,
        "machine": machine(),
        "load_average": load_average(),
        "elapsed_s": round(time.monotonic() - started, 1),
    }
    given.json.write_text(json.dumps(results, indent=1) + "\n")
    Console(width=200).print(table_of(found))


if __name__ == "__main__":
    main()

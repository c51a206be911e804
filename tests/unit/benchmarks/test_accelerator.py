"""The prepared run, on a CPU and at toy size: answers next to NumPy, and what is skipped is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import accelerator
from benchmarks.accelerator import GRAPH, Check, Steps, error_of
from benchmarks.olmoe import Shape


def run(*arguments: str | Path) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(accelerator.main)
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.exit_code, done.output


def test_the_toy_run_compares_measures_and_says_what_it_left_out(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    code, output = run("--tiny", "--device", "cpu", "--json", file)
    assert code == 0, output
    made = json.loads(file.read_text())
    assert made["checks"]
    assert all(check["right"] for check in made["checks"])
    assert {(row["mode"], row["arm"].split(",")[0]) for row in made["rows"]} >= {
        ("eager", "plain"),
        ("torch.compile", "plain"),
        ("eager", "replica"),
        ("torch.compile", "replica"),
        ("eager", "remote"),
    }
    assert set(made["skipped"]) == {f"decode x1, {GRAPH}"}
    assert f"skipped decode x1, {GRAPH}: no CUDA" in output


def test_nothing_begins_when_the_time_is_up(tmp_path: Path) -> None:
    code, output = run("--tiny", "--device", "cpu", "--budget-s", "1", "--json", tmp_path / "a")
    assert code == 1  # nothing was compared
    assert "s left, it may take" in output


@pytest.mark.parametrize("values", ["deltas", "logits"])
def test_answers_are_those_of_numpy(values: str) -> None:
    shape = Shape.tiny(1, keys=50)
    check = Check(values, 3, 8, torch.float32)
    assert error_of(check, torch.device("cpu"), shape) < 1e-5


def test_a_step_that_fails_is_named_and_ends_no_run() -> None:
    steps = Steps(60)
    with steps.step("graph"):
        raise RuntimeError("cannot be captured")
    assert steps.skipped == {"graph": "RuntimeError: cannot be captured"}

"""The help of `model-runner` teaches: every command and option is explained, every example can be run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from model_runner.cli.app import app
from model_runner.memory_builder.recipes import PRESETS

ROOT: Any = typer.main.get_command(app)
COMMANDS = sorted(ROOT.commands)


def examples(text: str) -> list[str]:
    return re.findall(r"^ *(model-runner .+?)$", text, flags=re.MULTILINE)


def test_the_commands() -> None:
    commands = {
        "build",
        "calibrate",
        "demo",
        "evaluate",
        "experiment",
        "explain",
        "generate",
        "learn",
        "lm-eval",
        "reference",
        "sample-data",
    }
    assert set(COMMANDS) == commands


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str) -> None:
    unexplained = [p.name for p in ROOT.commands[command].params if not getattr(p, "help", None)]
    assert unexplained == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_summary_and_an_example_of_itself(command: str) -> None:
    text = ROOT.commands[command].help
    assert re.match(r"[A-Z].{20,}\.", text)
    assert any(line.startswith(f"model-runner {command} ") for line in examples(text))


@pytest.mark.parametrize(
    "line", [line for c in (ROOT, *ROOT.commands.values()) for line in examples(c.help)]
)
def test_examples_name_options_that_exist_and_all_that_are_required(line: str) -> None:
    _, command, *rest = shlex.split(line)
    params = ROOT.commands[command].params
    used = {word for word in rest if word.startswith("--")}
    passes_on = ROOT.commands[command].context_settings.get("ignore_unknown_options")
    known = {name for p in params for name in (*p.opts, *p.secondary_opts)}
    assert passes_on or used <= known
    required = [p for p in params if p.required]
    assert {p.opts[0] for p in required if p.param_type_name == "option"} <= used
    words = [word for word in rest if not word.startswith("-")]
    assert len(words) >= len([p for p in required if p.param_type_name == "argument"])


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_is_printed(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage: " in result.output


def test_help_names_the_presets_own_numbers() -> None:
    helps = {p.name: p.help for p in ROOT.commands["build"].params}
    paper, ours, boosted = (PRESETS[name] for name in ("paper", "recommended", "boosted"))
    assert f"paper, paper-v2: {paper.recipe.step_size:g}" in helps["step_size"]
    assert f"boosted: {boosted.rounds}, others: none" in helps["rounds"]
    lambdas = f"{paper.lambda0} paper, {ours.lambda0} recommended, {boosted.lambda0} boosted"
    assert lambdas in helps["lambda0"]


def test_no_arguments_print_the_help() -> None:
    assert "Start a sidecar" in CliRunner().invoke(app, []).output


def test_exit_codes_are_documented() -> None:
    for code in ("0 done", "1 failed", "2 bad input", "3 the sidecar", "130 Ctrl-C"):
        assert code in ROOT.help


def test_help_does_not_wait_for_torch() -> None:
    check = (
        "import sys, model_runner.cli; sys.exit('torch' in sys.modules or 'grpc' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0

"""`model-runner` at its edges: the version, Ctrl-C, libraries that are not there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer

from model_runner.cli.app import app
from model_runner.small_moe import data_file
from tests.integration.command_runs import Run, in_process
from tests.integration.runner_parts import build, windows_of
from tests.sidecar import Sidecar
from tests.tiny_checkpoint import save_checkpoint

TEXT = str(data_file("shifted", "test"))
ROOT: Any = typer.main.get_command(app)
# Words with which each command begins its work.
COMMANDS = (
    ("build", "--memory", "law", "--reference", TEXT),
    ("calibrate", "--memory", "law", "--text", TEXT),
    ("evaluate", "--memory", "law", "--text", TEXT),
    ("explain", "--memory", "law", "--prompt", "The tenant"),
    ("generate", "--prompt", "The tenant"),
    ("learn", TEXT, "--memory", "law"),
    ("demo", "--out", "/nowhere"),
    ("experiment", "main", "--quick", "--out", "/nowhere"),
)
# Sample texts and reference text are made without a model; lm-eval misses its own library first.
WITHOUT_A_MODEL = {"sample-data", "reference", "lm-eval"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return in_process(monkeypatch, capsys)


def test_the_version(run: Run) -> None:
    assert run("--version").out == f"{version('knn-moe')}\n"


def ended_without(library: str, *commands: tuple[str, ...]) -> list[int]:
    """Exit codes of commands in a process where a library is not installed, after one line each on stderr."""
    script = (
        "import json, sys\n"
        "from model_runner.cli import main\n"
        f"sys.modules[{library!r}], codes = None, []\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['model-runner', *words]\n"
        "    try:\n        main()\n"
        "    except SystemExit as ended:\n        codes.append(ended.code or 0)\n"
        "sys.exit(','.join(map(str, codes)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=False,
    )
    *said, codes = [line for line in done.stderr.splitlines() if not line.startswith("model: ")]
    line = f"model-runner: {library} is not installed; the runner needs it: pip install 'knn-moe[runner]'"
    found = [int(code) for code in codes.split(",")]
    assert said == [line] * sum(code != 0 for code in found)
    return found


def test_a_missing_extra_is_one_line() -> None:
    """Of every command that needs it."""
    assert {words[0] for words in COMMANDS} == ROOT.commands.keys() - WITHOUT_A_MODEL
    codes = ended_without("torch", *COMMANDS, ("--help",), ("build", "--help"), ("--version",))
    assert codes == [1] * len(COMMANDS) + [0, 0, 0]
    assert ended_without("transformers", ("generate", "--prompt", "x")) == [1]


class Interrupted:
    """Standard input at which Ctrl-C is pressed."""

    @property
    def buffer(self) -> Interrupted:
        return self

    def isatty(self) -> bool:
        return False

    def read(self) -> bytes:
        raise KeyboardInterrupt

    def __iter__(self) -> Iterator[str]:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `loaded_model`."""
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ("build", "--reference", "-"),
            "; what the sidecar acknowledged is kept: the same command again goes on where it stopped",
        ),
        (
            ("learn", "-"),
            "; what the sidecar acknowledged is kept: the same command again goes on where it stopped",
        ),
        (("generate", "--interactive"), "; what the sidecar acknowledged is kept"),
        (("generate", "--prompt", "-"), ""),
        (("evaluate", "--text", "-"), ""),
    ],
)
def test_ctrl_c_says_what_is_kept_where_something_was_written(
    run: Run,
    edge_sidecar: Sidecar,
    name: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    expected: str,
) -> None:
    build(edge_sidecar.target, name, windows=windows_of()[:1])
    monkeypatch.setattr(sys, "stdin", Interrupted())
    done = run(*words, "--memory", name, "--target", edge_sidecar.target, "--model", model)
    assert done.code == 130
    assert done.err.splitlines()[-1] == f"model-runner: interrupted{expected}"

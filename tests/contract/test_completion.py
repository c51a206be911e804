"""The shell completes the commands of the three console scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = pytest.mark.parametrize("script", ["router-service", "router-admin", "model-runner"])
BIN = Path(sys.executable).parent


def _bash(command: str, **environment: str) -> str:
    """What a command prints whose parent is a bash, as it is for a user."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit $?"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@SCRIPTS
def test_show_completion_prints_what_bash_needs(script: str) -> None:
    printed = _bash(f"{script} --show-completion")
    assert f"complete -o default -F _{script.replace('-', '_')}_completion {script}" in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("router-admin me", {"memory", "merge"}),
        ("router-admin import --i", {"--into"}),
        ("router-admin merge a b --on-conflict n", {"newer"}),
        ("router-service se", {"serve"}),
        ("model-runner ev", {"evaluate"}),
    ],
)
def test_completion(words: str, expected: set[str]) -> None:
    script, *rest = words.split()
    variable = f"_{script.upper().replace('-', '_')}_COMPLETE"
    printed = _bash(
        script, COMP_WORDS=words, COMP_CWORD=str(len(rest)), **{variable: "complete_bash"}
    )
    assert set(printed.split()) == expected

"""The shell completes names of memories; where no service answers it says nothing."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from knnmoe.client import memory_names

from tests.sidecar import Sidecar

BIN = Path(sys.executable).parent


def _completed(words: str, shell: str = "bash", **environment: str) -> list[str]:
    """What the completion of a shell prints for a line; it must not fail, nor write into the line that is typed."""
    script = words.split(" ")[0]
    variable = f"_{script.upper().replace('-', '_')}_COMPLETE"
    asked = {variable: f"complete_{shell}", "_TYPER_COMPLETE_ARGS": words}
    asked |= {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    done = subprocess.run(
        [shutil.which("bash") or "bash", "-c", f"{BIN}/{script}; exit $?"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **asked, **environment},
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    "words",
    [
        "router-admin --target {} memory show {}",
        "router-admin --target {} stats {}",
        "router-admin --target {} merge other {}",
        "router-admin --target {} memory replace x --by {}",
        "model-runner generate --target {} --memory {}",
        "model-runner build --target {} --memory {}",
    ],
)
def test_names_of_memories(ram_sidecar: Sidecar, name: str, words: str) -> None:
    for ending in ("one", "two"):
        ram_sidecar.create(f"{name}-{ending}")
    assert _completed(words.format(ram_sidecar.target, f"{name}-")) == [
        f"{name}-one",
        f"{name}-two",
    ]
    assert _completed(words.format(ram_sidecar.target, f"{name}-t")) == [f"{name}-two"]


def test_in_zsh_and_with_the_target_of_the_environment(ram_sidecar: Sidecar, name: str) -> None:
    ram_sidecar.create(name)
    found = _completed(
        f"router-admin sources {name[:-1]}", "zsh", ROUTER_ADMIN_TARGET=ram_sidecar.target
    )
    assert any(name in word for word in found)
    found = _completed(
        f"model-runner learn --memory {name[:-1]}", "zsh", MODEL_RUNNER_TARGET=ram_sidecar.target
    )
    assert any(name in word for word in found)


def test_nobody_there(tmp_path: Path) -> None:
    assert _completed(f"router-admin --target unix:{tmp_path}/none stats a") == []


def test_somebody_there_who_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        assert _completed(f"router-admin --target {target} memory show a") == []
        assert memory_names(target, within_s=0.05) == []


def test_a_target_that_makes_no_sense() -> None:
    assert _completed("router-admin --target :::nonsense::: stats a") == []

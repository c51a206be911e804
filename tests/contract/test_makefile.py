"""`make help` says what every target does."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_target_is_in_the_help() -> None:
    if shutil.which("make") is None:
        pytest.skip("no make here")
    [phony] = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    # Under `make test` make would say which directory it enters.
    command = ["make", "--no-print-directory", "help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    explained = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines())
    assert set(explained) == set(phony.split())

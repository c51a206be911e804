"""Runs a Dockerfile's instructions as they stand where there is no Docker engine, each stage in a copy-on-write chroot.

In place of the base image is this machine's own root with its system Python 3.11, without what is in its homes.
Needs root (a container's will do), and a mount namespace of its own, with which the mounts end: `make docker-check`.
"""

from __future__ import annotations

import os
import re
import shutil
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.images.dockerfile import ROOT, Instruction, Stage, in_context, read_stages

PYTHON = Path("/usr/bin/python3.11")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What a build engine passes on from its host, and how pip reaches its index here.
_PASSED_ON = re.compile(r"(https?|no|all)_proxy|PIP_\w+|SSL_CERT_\w+", re.IGNORECASE)


class DryBuildError(RuntimeError):
    """An instruction failed, or this machine cannot run it."""


@dataclass
class Image:
    """The root of a stage as it is after its last instruction."""

    root: Path
    stage: Stage
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": _PATH})
    workdir: str = "/"

    def path(self, inside: str) -> Path:
        """Where something inside is on this machine; relative to WORKDIR."""
        return self.root / str(Path(self.workdir, inside)).lstrip("/")

    def expanded(self, text: str, arguments: Mapping[str, str]) -> str:
        """$NAME and ${NAME} of ENV and ARG filled in."""
        return string.Template(text).safe_substitute({**self.environment, **arguments})


def build(dockerfile: Path, arguments: Mapping[str, str], scratch: Path) -> Image:
    """The last stage's image. Raises DryBuildError."""
    _require_python()
    built: dict[str, Image] = {}
    for number, stage in enumerate(read_stages(dockerfile)):
        name = stage.name or str(number)
        image = Image(_overlay(scratch / f"{dockerfile.stem}-{name}"), stage)
        built[name] = _Builder(image, built, arguments).run()
    return image


class _Builder:
    """Runs the instructions of one stage."""

    def __init__(self, image: Image, built: Mapping[str, Image], given: Mapping[str, str]) -> None:
        self._image, self._built, self._given = image, built, given
        self._arguments: dict[str, str] = {}

    def run(self) -> Image:
        for instruction in self._image.stage.instructions:
            handler = getattr(self, f"_{instruction.name.lower()}", None)
            if handler is not None:
                sys.stdout.write(f"{instruction.name} {instruction.text[:160]}\n")
                sys.stdout.flush()
                handler(instruction)
        return self._image

    def _arg(self, instruction: Instruction) -> None:
        name, _, default = instruction.text.partition("=")
        if name in self._given or "=" in instruction.text:  # else it is not set
            self._arguments[name] = self._given.get(name, default)

    def _env(self, instruction: Instruction) -> None:
        for word in instruction.words:
            name, _, value = word.partition("=")
            self._image.environment[name] = self._image.expanded(value, self._arguments)

    def _workdir(self, instruction: Instruction) -> None:
        self._image.workdir = instruction.text
        self._image.path(".").mkdir(parents=True, exist_ok=True)

    def _run(self, instruction: Instruction) -> None:
        passed_on = {
            name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name)
        }
        variables = passed_on | self._arguments | self._image.environment
        script = f"cd {self._image.workdir} && {instruction.text}"
        _call(["chroot", str(self._image.root), "/bin/sh", "-c", script], env=variables)

    def _copy(self, instruction: Instruction) -> None:
        *sources, target = instruction.words
        for source in sources:
            place = self._image.path(target)
            if stage := instruction.flags.get("from"):
                _copy_all(self._built[stage].path(source), place)
            elif (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=_outside_context, dirs_exist_ok=True)
            else:
                shutil.copy2(ROOT / source, place)


def _outside_context(directory: str, names: Sequence[str]) -> list[str]:
    folder = Path(directory).relative_to(ROOT)
    return [name for name in names if not in_context(str(folder / name))]


def _copy_all(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    _call(["cp", "--archive", f"{source}/.", str(target)])


def _overlay(work: Path) -> Path:
    root, upper, temporary = work / "root", work / "upper", work / "work"
    for directory in (root, upper, temporary):
        directory.mkdir(parents=True)
    options = f"lowerdir=/,upperdir={upper},workdir={temporary}"
    _call(["mount", "-t", "overlay", "overlay", "-o", options, str(root)])
    for hidden in ("/root", "/home", "/tmp", str(ROOT.parent)):
        if (root / hidden[1:]).is_dir():
            _call(["mount", "-t", "tmpfs", "tmpfs", str(root / hidden[1:])])
    for needed in ("/dev", "/proc"):
        _call(["mount", "--rbind", needed, str(root / needed[1:])])
    _imitate_base(root)
    return root


def _imitate_base(root: Path) -> None:
    """`python` and `pip` as the image python:3.11-slim has them."""
    for marker in (root / "usr/lib").glob("python3*/EXTERNALLY-MANAGED"):
        marker.unlink()
    for name, line in (("python", ""), ("pip", "-m pip ")):
        script = root / "usr/local/bin" / name
        script.unlink(missing_ok=True)
        script.write_text(f'#!/bin/sh\nexec {PYTHON} {line}"$@"\n')
        script.chmod(0o755)


def _require_python() -> None:
    check = [str(PYTHON), "-c", "import pip, venv"]
    if os.geteuid() != 0 or not PYTHON.exists() or subprocess.run(check, check=False).returncode:
        raise DryBuildError(
            f"a dry build needs root and {PYTHON} with pip and venv (apt-get install python3-pip python3-venv)"
        )


def _call(command: list[str], env: Mapping[str, str] | None = None) -> None:
    if code := subprocess.run(command, env=env, check=False).returncode:
        raise DryBuildError(f"exit code {code}: {' '.join(command)[:400]}")

"""What every Dockerfile here keeps to: the rules of hadolint that matter, and a few of our own.

problems(stages) yields a line for each breach; an empty list is a clean file.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

from tests.images.dockerfile import ROOT, Instruction, Stage, in_context

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)
_PINNED = re.compile(r":v?\d+\.\d+[^:]*$|@sha256:[0-9a-f]{64}$")


def problems(stages: list[Stage]) -> list[str]:
    """Every breach, with its line where it has one."""
    found = [problem for stage in stages for problem in _stage_problems(stage, stages)]
    return found + list(_image_problems(stages[-1]))


def is_pinned(image: str) -> bool:
    """Whether an image names a version, major and minor at least."""
    return _PINNED.search(image) is not None


def _stage_problems(stage: Stage, stages: list[Stage]) -> Iterator[str]:
    if not is_pinned(stage.base) and stage.base not in {other.name for other in stages}:
        yield f"the base image {stage.base} has no version"
    for instruction in stage.instructions:
        for check in (_CHECKS.get(instruction.name, _nothing), _flags):
            yield from (f"line {instruction.line}: {problem}" for problem in check(instruction))


def _image_problems(stage: Stage) -> Iterator[str]:
    user = stage.last("USER")
    if user is None or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user.text):
        yield "USER is not a number other than 0"
    else:
        after = stage.instructions[stage.instructions.index(user) :]
        yield from (f"line {i.line}: RUN after USER" for i in after if i.name == "RUN")
    if stage.last("HEALTHCHECK") is None:
        yield "no HEALTHCHECK (NONE is one)"
    if stage.last("ENTRYPOINT") is None:
        yield "no ENTRYPOINT"


def _flags(instruction: Instruction) -> Iterator[str]:
    """The classic builder of Engine 20.10 ends at a flag that it does not know, and takes a heredoc for arguments."""
    flags = set() if instruction.text.startswith("[") else instruction.flags.keys()
    for flag in flags - _CLASSIC_FLAGS.get(instruction.name, set()):
        yield f"--{flag} needs BuildKit or a later engine"
    if re.search(r"<<-?\s*[\"']?[A-Za-z_]", instruction.text):
        yield "a heredoc needs BuildKit"


def _run(instruction: Instruction) -> Iterator[str]:
    syntax = subprocess.run(["sh", "-n", "-c", instruction.text], capture_output=True, check=False)
    if syntax.returncode:
        yield f"syntax error: {syntax.stderr.decode().strip()}"
    for command in re.split(r"&&|\|\||[;|]", instruction.text):
        yield from _apt(command, instruction.text)
        yield from _pip(command)


def _apt(command: str, run: str) -> Iterator[str]:
    if "apt-get install" not in command:
        return
    if "--no-install-recommends" not in command:
        yield "apt-get install without --no-install-recommends"
    if "rm -rf /var/lib/apt/lists/*" not in run:
        yield "apt-get leaves its lists in the layer"


def _pip(command: str) -> Iterator[str]:
    if not re.search(r"\bpip\b.* (install|wheel)\b", command):
        return
    if "--no-cache-dir" not in command:
        yield "pip without --no-cache-dir"
    if "--constraint constraints.txt" not in command and "--no-deps" not in command:
        yield "pip without --constraint constraints.txt"


def _copy(instruction: Instruction) -> Iterator[str]:
    if "from" in instruction.flags:
        return
    for source in instruction.words[:-1]:
        if not (ROOT / source).exists():
            yield f"COPY {source}: not there"
        elif not in_context(source):
            yield f"COPY {source}: .dockerignore leaves it out"


def _variables(instruction: Instruction) -> Iterator[str]:
    for word in instruction.words:
        name, _, value = word.partition("=")
        if _SECRET.search(name) and value:
            yield f"{instruction.name} {name}: a secret stays in the image"


def _exec_form(instruction: Instruction) -> Iterator[str]:
    if instruction.command is None and instruction.text != "NONE":
        yield f"{instruction.name} is not in the exec form"


def _workdir(instruction: Instruction) -> Iterator[str]:
    if not instruction.text.startswith("/"):
        yield f"WORKDIR {instruction.text} is relative"


def _add(_: Instruction) -> Iterator[str]:
    yield "ADD; COPY does no more than it says"


def _nothing(_: Instruction) -> Iterator[str]:
    yield from ()


_CLASSIC_FLAGS = {
    "COPY": {"from", "chown"},
    "HEALTHCHECK": {"interval", "timeout", "start-period", "retries"},
}
_CHECKS = {
    "ADD": _add,
    "ARG": _variables,
    "CMD": _exec_form,
    "COPY": _copy,
    "ENTRYPOINT": _exec_form,
    "ENV": _variables,
    "HEALTHCHECK": _exec_form,
    "RUN": _run,
    "WORKDIR": _workdir,
}

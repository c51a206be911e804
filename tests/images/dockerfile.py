"""Reads Dockerfiles: instructions, stages, and what the build context holds.

from tests.images.dockerfile import ROOT, read_stages
"""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


@dataclass(frozen=True)
class Instruction:
    """One instruction: its line, its name in capitals, and what follows the name, on one line."""

    line: int
    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """The arguments without --flags: of the JSON form where there is one."""
        return [word for word in self._all_words() if not word.startswith("--")]

    @property
    def flags(self) -> dict[str, str]:
        """--name=value before the arguments."""
        first = takewhile(lambda word: word.startswith("--"), self._all_words())
        pairs = (word[2:].partition("=") for word in first)
        return {name: value for name, _, value in pairs}

    @property
    def command(self) -> list[str] | None:
        """The exec form at the end (ENTRYPOINT, CMD, HEALTHCHECK ... CMD, VOLUME); None where there is none."""
        match = re.search(r"\[.*\]$", self.text)
        return json.loads(match.group()) if match else None

    def _all_words(self) -> list[str]:
        if self.text.startswith("["):
            return list(json.loads(self.text))
        return shlex.split(self.text)


@dataclass
class Stage:
    """What one FROM begins."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        """Its instructions of one name, in order."""
        return [instruction for instruction in self.instructions if instruction.name == name]

    def last(self, name: str) -> Instruction | None:
        """The one of a name that counts."""
        return next(iter(reversed(self.all(name))), None)

    def variables(self, name: str = "ENV") -> dict[str, str]:
        """What ENV or ARG set, as written."""
        pairs = (word.partition("=") for each in self.all(name) for word in each.words)
        return {key: value for key, _, value in pairs}


def read_stages(path: Path) -> list[Stage]:
    """The stages of a Dockerfile."""
    return stages_of(path.read_text())


def stages_of(text: str) -> list[Stage]:
    """The stages of a Dockerfile's text."""
    stages: list[Stage] = []
    for instruction in _instructions(text):
        if instruction.name == "FROM":
            base, *alias = instruction.words
            stages.append(Stage(base, alias[1] if alias else ""))
        stages[-1].instructions.append(instruction)
    return stages


def in_context(path: str) -> bool:
    """Whether .dockerignore lets a path (relative to the root of the repository) into the build context."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        if any(_matches(pattern, part) for part in _with_parents(path)):
            kept = line.startswith("!")
    return kept


def _matches(pattern: str, path: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch.fnmatch(path.rpartition("/")[2], pattern.removeprefix("**/"))
    return pattern.count("/") == path.count("/") and fnmatch.fnmatch(path, pattern)


def _with_parents(path: str) -> list[str]:
    parts = path.strip("/").split("/")
    return ["/".join(parts[: n + 1]) for n in range(len(parts))]


def _instructions(text: str) -> list[Instruction]:
    found: list[Instruction] = []
    begun, line = "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        if not raw.strip() or raw.lstrip().startswith("#"):
            continue
        line = line if begun else number
        begun += raw.strip()
        if begun.endswith("\\"):
            begun = begun[:-1]
            continue
        name, _, rest = begun.partition(" ")
        found.append(Instruction(line, name.upper(), rest.strip()))
        begun = ""
    return found

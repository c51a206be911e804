"""The settings of `serve` as they are given: command line > environment > file > default, and who gave which."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from router_service.cli.errors import BadInput
from router_service.errors import InvalidRequest
from router_service.settings import QdrantSettings, ServiceSettings

_QDRANT = "qdrant_"
_NAMES_ARE = "names are those of the options of `router-service serve`, e.g. max-in-flight = 16"


@dataclass(frozen=True, slots=True)
class Given:
    """Values by option, e.g. `qdrant_prefix`: `flags` of the command line, `values` of the file that count."""

    flags: Mapping[str, Any]
    file: Path | None
    values: Mapping[str, Any]

    @classmethod
    def read(cls, flags: Mapping[str, Any], file: Path | None) -> Given:
        """Raises BadInput on a file that cannot be read or names what is no option."""
        values = {} if file is None else _read(file)
        variables = {name.upper() for name in os.environ}
        first = {name for name in values if name in flags or _variable(name) in variables}
        return cls(flags, file, {n: v for n, v in values.items() if n not in first})

    def settings(self) -> ServiceSettings:
        """All of them. Raises BadInput with a line per setting that cannot be used."""
        given = {**self.values, **self.flags}
        of_qdrant = {n: v for n, v in given.items() if n.startswith(_QDRANT)}
        others = {n: v for n, v in given.items() if n not in of_qdrant}
        bare = {name.removeprefix(_QDRANT): value for name, value in of_qdrant.items()}
        try:
            others["qdrant"] = QdrantSettings(**bare)
        except ValidationError as error:
            raise BadInput(self._problems(error, _QDRANT)) from error
        try:
            return ServiceSettings(**others)
        except ValidationError as error:
            raise BadInput(self._problems(error, "")) from error

    def explained(self, error: InvalidRequest) -> str:
        """What the service says; of a setting from the file where it is."""
        name = error.field.removeprefix("--").replace("-", "_")
        if not error.field.startswith("--") or name not in self.values:
            return str(error)
        return self._said(name, f"expected {error.expected}")

    def _problems(self, error: ValidationError, prefix: str) -> str:
        lines = []
        for problem in error.errors():
            message = problem["msg"].removeprefix("Value error, ")
            place = problem["loc"]
            lines.append(self._said(f"{prefix}{place[0]}", message) if place else message)
        return "\n".join(lines)

    def _said(self, name: str, message: str) -> str:
        """A message about a setting, with the place where it was given."""
        option = name.replace("_", "-")
        if name in self.values:
            value = f"{option} = {self.values[name]!r}"
            return f"{self.file}: {value}: {message}; change it there, or give --{option}"
        if name in self.flags or _variable(name) not in {each.upper() for each in os.environ}:
            return f"--{option}: {message}"
        return f"environment: {_variable(name)}: {message}"


def options() -> list[str]:
    """Names of the settings that a file may have, as options without their dashes."""
    of_qdrant = [f"qdrant-{name}" for name in QdrantSettings.model_fields if name != "api_key"]
    own = [name for name in ServiceSettings.model_fields if name != "qdrant"]
    return [name.replace("_", "-") for name in (*own, *of_qdrant)]


def _variable(name: str) -> str:
    return f"ROUTER_SERVICE_{name.upper()}"


def _read(file: Path) -> dict[str, Any]:
    """Values by setting. Raises BadInput."""
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"--config: {file}: {error.strerror}") from error
    except ValueError as error:  # no TOML, or no UTF-8
        raise BadInput(f"{file}: {error}; expected TOML, e.g. max-in-flight = 16") from error
    known = options()
    for name in document:
        if name not in known:
            near = difflib.get_close_matches(name.replace("_", "-"), known)
            meant = f"near it: {', '.join(near)}; " if near else ""
            raise BadInput(f"{file}: unknown name {name!r}; {meant}{_NAMES_ARE}")
    return {name.replace("-", "_"): value for name, value in document.items()}

"""What a check says: how bad, about what, and the command that helps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad a finding is; an error makes `doctor` fail."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor. `check` is its topic, `remedy` a command to run, or empty."""

    severity: Severity
    check: str
    what: str
    remedy: str = ""


Findings = Iterator[Finding]


def fine(check: str, what: str) -> Finding:
    """Nothing to do."""
    return Finding(Severity.OK, check, what)


def warning(check: str, what: str, remedy: str) -> Finding:
    """It works, though not as well as it could."""
    return Finding(Severity.WARNING, check, what, remedy)


def error(check: str, what: str, remedy: str) -> Finding:
    """It does not work."""
    return Finding(Severity.ERROR, check, what, remedy)

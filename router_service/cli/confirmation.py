"""Asking before something is destroyed."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from router_service.cli.admin_errors import BadInput

__all__ = ["confirm", "on_terminal"]


def confirm(command: str, question: Callable[[], str]) -> None:
    """Asks on a terminal, and ends the command on anything but yes. Raises BadInput where nobody can be asked."""
    if not on_terminal():
        raise BadInput(
            f"{command} asks before it removes anything, and stdin is no terminal; pass --yes"
        )
    typer.confirm(question(), abort=True, err=True)


def on_terminal() -> bool:
    """Whether somebody can answer."""
    return sys.stdin.isatty()

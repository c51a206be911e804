"""What every command of `router-admin` gets: the client of one service, and where to print."""

from __future__ import annotations

from dataclasses import dataclass

import typer

from router_service.cli.admin_client import AdminClient
from router_service.cli.output import Output


@dataclass(frozen=True, slots=True)
class Session:
    """The global options, opened."""

    client: AdminClient
    output: Output


def session_of(context: typer.Context) -> Session:
    """The session that the root command opened."""
    session = context.find_object(Session)
    if session is None:
        raise RuntimeError("the root command did not open a session")
    return session

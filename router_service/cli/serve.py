"""`router-service`: the routing sidecar. What serves is imported when it is asked for."""

from __future__ import annotations

from typing import Annotated, ClassVar

import typer

from router_service import __version__
from router_service.cli.options import ExampleCommand, Later, LazyGroup, print_version


class ServiceGroup(LazyGroup):
    """`serve`, beside what is here."""

    places: ClassVar = {
        "serve": Later(
            "serve_command:app",
            "Serve the memories of a directory, or of a Qdrant server, until SIGTERM or Ctrl-C.",
        )
    }


app = typer.Typer(
    cls=ServiceGroup, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=print_version,
            is_eager=True,
            help="Print the version and stop, e.g. router-service --version.",
        ),
    ] = False,
) -> None:
    """The kNN-MoE routing sidecar: keeps routing memories on Qdrant and serves them over gRPC.

    Every flag of serve is also an environment variable: --max-in-flight is ROUTER_SERVICE_MAX_IN_FLIGHT.

    Example:
      router-service serve --data /var/lib/knnmoe

    Exit codes:
      0  stopped by SIGTERM or Ctrl-C
      1  the data or the Qdrant server cannot be used, or the address is taken
      2  wrong usage

    """


@app.command("version", cls=ExampleCommand)
def print_only_version() -> None:
    """Print the version.

    Example:
      router-service version

    """
    typer.echo(__version__)


def main() -> None:
    """Entry point of the console script."""
    app()

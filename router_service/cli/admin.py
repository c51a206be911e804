"""`router-admin`: makes, fills, inspects and removes routing memories over gRPC."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from knnmoe.client import AdminClient, ServiceError

from router_service import __version__
from router_service.cli import (
    entry_commands,
    job_commands,
    memory_commands,
    migrate_command,
    operation_commands,
    retention_commands,
    service_commands,
    snapshot_commands,
)
from router_service.cli.errors import AdminError, admin_error
from router_service.cli.options import ExampleCommand, ExampleGroup
from router_service.cli.output import Output, Session


class AdminGroup(ExampleGroup):
    """Ends with one line on stderr and the error's exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except (AdminError, ServiceError) as error:
            shown = admin_error(error) if isinstance(error, ServiceError) else error
            typer.echo(f"router-admin: {shown}", err=True)
            raise typer.Exit(int(shown.exit_code)) from error


app = typer.Typer(
    cls=AdminGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.add_typer(memory_commands.app, name="memory")
app.add_typer(snapshot_commands.app, name="snapshot")
app.add_typer(operation_commands.app, name="operations")
for _command in (
    entry_commands.upsert,
    retention_commands.sources,
    retention_commands.delete,
    entry_commands.count,
    entry_commands.export,
    entry_commands.merge,
    migrate_command.migrate,
    job_commands.calibrate,
    job_commands.optimize,
    retention_commands.prune,
    job_commands.quantize,
    service_commands.stats,
    service_commands.health,
):
    app.command(cls=ExampleCommand)(_command)
app.command("import", cls=ExampleCommand)(entry_commands.import_memory)
app.command(cls=ExampleCommand)(service_commands.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            envvar="ROUTER_ADMIN_TARGET",
            help="Address of the service: HOST:PORT or unix:PATH, e.g. unix:/run/knnmoe.sock.",
        ),
    ] = "127.0.0.1:50051",
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON document on stdout and nothing else, e.g. router-admin --json memory list.",
        ),
    ] = False,
    timeout_s: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Longest wait for one reply in seconds, e.g. 60. When not given: 10, and no limit for "
            "what takes long: calibrate, delete, memory delete and replace, and operations.",
            show_default=False,
        ),
    ] = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and stop, e.g. router-admin --version.",
        ),
    ] = False,
) -> None:
    """Make, fill, look at and remove the routing memories of a kNN-MoE service.

    Options named here come before the command. Results go to stdout; progress, remarks and errors to stderr.

    Example:
      router-admin --target 127.0.0.1:50051 memory list
      export ROUTER_ADMIN_TARGET=unix:/run/knnmoe.sock
      router-admin --json stats

    Exit codes:
      0  done
      1  the service refused, or failed
      2  wrong usage, or a file that cannot be used
      3  the service cannot be reached, or did not answer in time
      130  Ctrl-C; a long operation was cancelled and left a sound state

    """
    client = AdminClient(target, timeout_s)
    context.call_on_close(client.close)
    context.obj = Session(client, Output(as_json=as_json))


def main() -> None:
    """Entry point of the console script."""
    app()

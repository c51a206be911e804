"""`router-admin`: makes, fills, inspects and removes routing memories over gRPC."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from router_service.cli.errors import AdminError, admin_error
from router_service.cli.options import Later, LazyGroup, credential, print_version


class AdminGroup(LazyGroup):
    """Ends with one line on stderr and the error's exit code."""

    places: ClassVar = {
        "upsert": Later("entry_commands:upsert", "Write entries into a memory."),
        "sources": Later(
            "retention_commands:sources",
            "List where a memory's entries came from: entries, examples, when they were written, and hits.",
        ),
        "delete": Later(
            "retention_commands:delete",
            "Delete entries of a memory: some ids, or all of a source or of one of its examples.",
        ),
        "count": Later("entry_commands:count", "Count a memory's entries, exactly."),
        "export": Later(
            "entry_commands:export",
            "Copy a memory's entries to a file, in a format that `import` and `upsert` read.",
        ),
        "merge": Later(
            "entry_commands:merge",
            "Add the entries of one memory to another of the same model, kind and similarity.",
        ),
        "migrate": Later(
            "migrate_command:migrate",
            "Move memories between a service, Qdrant servers and data directories; the source stays as it is.",
        ),
        "calibrate": Later(
            "job_commands:calibrate",
            "Set the RBF bandwidth gamma of each layer from the distances to its nearest keys.",
        ),
        "optimize": Later("job_commands:optimize", "Build the search index of a memory's layers."),
        "prune": Later(
            "retention_commands:prune",
            "Delete the entries of a memory that any of the given policies drops.",
        ),
        "quantize": Later(
            "job_commands:quantize_app",
            "Compress the search keys of a memory, or measure what each method costs.",
        ),
        "stats": Later(
            "service_commands:stats",
            "Show what the service holds and what it has done since it started.",
        ),
        "health": Later("service_commands:health", "Ask the service whether it serves."),
        "import": Later(
            "entry_commands:import_memory",
            "Make a memory from an exported file, or add the file to one.",
        ),
        "doctor": Later(
            "service_commands:doctor",
            "Look for what is wrong with the service, or with a data directory that no service has open.",
        ),
        "memory": Later("memory_commands:app", "Make, look at, change and remove memories."),
        "snapshot": Later(
            "snapshot_commands:app", "Whole copies of memories: make, check, restore and move them."
        ),
        "operations": Later(
            "operation_commands:app",
            "Look at and cancel long operations: optimize, prune, snapshots.",
        ),
    }

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except (AdminError, _service_error()) as error:
            shown = error if isinstance(error, AdminError) else admin_error(error)
            typer.echo(f"router-admin: {shown}", err=True)
            raise typer.Exit(int(shown.exit_code)) from error


def _service_error() -> Any:
    """Imported when there is an error: --help does not wait for gRPC."""
    from knnmoe.client import ServiceError

    return ServiceError


app = typer.Typer(
    cls=AdminGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)


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
    token_file: Annotated[
        Path | None,
        credential("token_file", "File with the token that the service asks for, e.g. ~/.knnmoe."),
    ] = None,
    ca_file: Annotated[
        Path | None,
        credential(
            "ca_file",
            "PEM file of the authorities that may have signed the service's certificate, e.g. ca.pem: with it "
            "HOST:PORT is spoken to in TLS.",
        ),
    ] = None,
    cert_file: Annotated[
        Path | None,
        credential("cert_file", "PEM file of this client's certificate, e.g. client.pem."),
    ] = None,
    key_file: Annotated[
        Path | None, credential("key_file", "PEM file of its key, e.g. client.key.")
    ] = None,
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
            callback=print_version,
            is_eager=True,
            help="Print the version and stop, e.g. router-admin --version.",
        ),
    ] = False,
) -> None:
    """Make, fill, look at and remove the routing memories of a kNN-MoE service.

    Options named here come before the command; --json may come after it too. Results go to stdout; progress,
    remarks and errors to stderr.

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
    from knnmoe.client import AdminClient, Credentials

    from router_service.cli.output import Output, Session

    credentials = Credentials.of_environment(
        ca_file=ca_file, cert_file=cert_file, key_file=key_file, token_file=token_file
    )
    client = AdminClient(target, timeout_s, credentials)
    context.call_on_close(client.close)
    context.obj = Session(client, Output(as_json=as_json))


def main() -> None:
    """Entry point of the console script."""
    app()

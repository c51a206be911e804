"""`router-admin calibrate`, `optimize`, `stats` and `health`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from knnmoe.v1 import memory_admin_pb2 as pb
from rich.console import Console

from router_service.backends.base import Quantization
from router_service.cli.admin_errors import BadInput, ExitCode
from router_service.cli.admin_options import MemoryName
from router_service.cli.admin_output import plain, table
from router_service.cli.admin_session import session_of
from router_service.cli.calibration_inputs import read_inputs
from router_service.cli.operation_stream import followed

SERVICES = ("knnmoe.v1.RoutingService", "knnmoe.v1.MemoryAdminService")


def calibrate(
    context: typer.Context,
    name: MemoryName,
    lambda0: Annotated[
        float,
        typer.Option(
            help="Similarity that the nearest key should have at the quantile of its distance, between 0 "
            "and 1: more trusts the memory from farther away, e.g. 0.5."
        ),
    ] = 0.5,
    inputs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.safetensors",
            help="Router inputs of held-out text, tensors layers.N.router_inputs [n, hidden_size]. Without "
            "them the memory's own keys are used, each against other examples' entries, "
            "e.g. --inputs dev.safetensors.",
        ),
    ] = None,
    quantile: Annotated[
        float,
        typer.Option(help="Quantile of the distance to the nearest key, e.g. 0.5, the median."),
    ] = 0.5,
    sample: Annotated[
        int, typer.Option(min=1, help="Keys taken per layer when no inputs are given, e.g. 1000.")
    ] = 1000,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only report; store nothing, e.g. calibrate bible --dry-run."
        ),
    ] = False,
) -> None:
    """Set the RBF bandwidth gamma of each layer from the distances to its nearest keys.

    Example:
      router-admin calibrate bible --lambda0 0.5 --inputs dev.safetensors
      router-admin --json calibrate bible --lambda0 0.8 --dry-run

    """
    session = session_of(context)
    given: dict[str, Any] = {
        "memory": name, "lambda0": lambda0, "quantile": quantile, "sample": sample, "dry_run": dry_run
    }  # fmt: skip
    layers: list[dict[str, Any]] = []
    for request in _calibrations(given, inputs):
        reply = session.client.unary(session.client.admin.Calibrate, request, long=True)
        layers += [plain(item) for item in reply.layers]
    columns = ("layer", "squared_distance", "gamma", "queries")
    rows = [[item[column] for column in columns] for item in layers]
    title = "would be" if dry_run else "stored"
    session.output.emit(
        {"memory": name, "lambda0": lambda0, "dry_run": dry_run, "layers": layers},
        lambda console: console.print(table(columns, rows, title=f"gamma of {name}, {title}")),
    )


def optimize(
    context: typer.Context,
    name: MemoryName,
    quantization: Annotated[
        Quantization | None,
        typer.Option(
            help="Compression of the search keys, e.g. int8; results are rescored. When not given each layer "
            "keeps its own. `quantize` says more and measures.",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="Only this layer; repeat it for more (--layer 14 --layer 15). All when not given.",
        ),
    ] = None,
) -> None:
    """Build the search index of a memory's layers. The service answers meanwhile; Ctrl-C ends it.

    Example:
      router-admin optimize bible --quantization int8
      router-admin optimize bible --layer 15

    """
    session = session_of(context)
    request = pb.OptimizeRequest(memory=name, layers=layer, quantization=quantization or "")
    replies = followed(session, session.client.admin.Optimize, request)
    rows = [
        plain(reply.layer) | {"elapsed_s": round(reply.elapsed_s, 3)}
        for reply in replies
        if reply.HasField("layer")
    ]
    columns = ("layer", "entries", "indexed_entries", "quantization", "elapsed_s")
    cells = [[row[column] for column in columns] for row in rows]
    session.output.emit(
        {"memory": name, "layers": rows}, lambda console: console.print(table(columns, cells))
    )


def stats(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="Only this memory, e.g. bible; all when left out.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what the service holds and what it has done since it started.

    Example:
      router-admin stats
      router-admin --json stats bible

    """
    if name == "":  # to the service: all
        raise BadInput("NAME: got '', expected the name of a memory, or nothing for all")
    session = session_of(context)
    reply = session.client.unary(session.client.admin.Stats, pb.StatsRequest(memory=name))
    document = plain(reply)

    def render(console: Console) -> None:
        service = [
            ("version", document["service_version"]),
            ("uptime", f"{document['uptime_s']} s"),
            ("resident", f"{document['resident_bytes'] / 2**20:.0f} MiB"),
            ("calls in flight", str(document["in_flight"])),
        ]
        console.print(table(("service", ""), service))
        for memory in document["memories"]:
            columns = tuple(memory["layers"][0])
            rows = [list(item.values()) for item in memory["layers"]]
            console.print(table(columns, rows, title=memory["memory"]))

    session.output.emit(document, render)


def health(context: typer.Context) -> None:
    """Ask the service whether it serves. Exit code 0: it does; 1: it is up but does not; 3: nobody answers.

    Example:
      router-admin --target unix:/run/knnmoe.sock health

    """
    session = session_of(context)
    services = {name: session.client.serving_status(name) for name in SERVICES}
    serving = all(status == "SERVING" for status in services.values())
    document = {"target": session.client.target, "serving": serving, "services": services}
    rows = list(services.items())
    session.output.emit(document, lambda console: console.print(table(("service", "status"), rows)))
    if not serving:
        raise typer.Exit(ExitCode.REFUSED)


def _calibrations(given: dict[str, Any], inputs: Path | None) -> Iterator[pb.CalibrateRequest]:
    """One request for all layers, or one per layer of the file: a whole file would not fit in a message."""
    if inputs is None:
        yield pb.CalibrateRequest(**given)
        return
    for item in read_inputs(inputs):
        yield pb.CalibrateRequest(**given, inputs=[item])

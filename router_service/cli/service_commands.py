"""How the service is: `router-admin stats`, `health` and `doctor`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from knnmoe.client import AdminClient, ServiceError
from knnmoe.v1 import doctor_pb2 as doctor_pb
from knnmoe.v1 import memory_admin_pb2 as pb
from pydantic import ValidationError
from rich.console import Console

from router_service import __version__
from router_service.cli.errors import BadInput, ExitCode, Unreachable, admin_error
from router_service.cli.options import complete_memory
from router_service.cli.output import Bytes, plain, session_of, table
from router_service.cli.setting_options import environment_problem
from router_service.doctor import Finding, Severity, diagnose_directory, error, warning
from router_service.settings import ServiceSettings

# Of a layer, in the document and on the dashboard only.
DETAILS = (
    "lambda_counts",
    *(f"abstained_{reason}" for reason in ("empty", "too_far", "layer_off")),
    *(f"replica_{what}" for what in ("requests", "tokens", "abstained")),
)
SERVICES = ("knnmoe.v1.RoutingService", "knnmoe.v1.MemoryAdminService")


def stats(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            autocompletion=complete_memory,
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
    for memory in document["memories"]:
        memory["layers"] = [_with_unknown(layer) for layer in memory["layers"]]

    def render(console: Console) -> None:
        service = [
            ("version", document["service_version"]),
            ("uptime", f"{document['uptime_s']} s"),
            ("resident", Bytes(document["resident_bytes"])),
            ("calls in flight", str(document["in_flight"])),
        ]
        console.print(table(("service", ""), service))
        for memory in document["memories"]:
            layers = list(map(_row, memory["layers"]))
            console.print(table(tuple(layers[0]), layers, title=memory["memory"]))

    session.output.emit(document, render)


def _with_unknown(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer's numbers; None where the service does not know one."""
    known = {name: value for name, value in layer.items() if name != "disk_bytes_unknown"}
    return known | ({"disk_bytes": None} if layer["disk_bytes_unknown"] else {})


def _row(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer's numbers, under shorter headings, with bytes human-readable."""
    disk = layer["disk_bytes"]
    beside = ("layer", "disk_bytes", *DETAILS)
    rest = {name: value for name, value in layer.items() if name not in beside}
    first = {"layer": layer["layer"], "disk": None if disk is None else Bytes(disk)}
    return first | rest


def health(context: typer.Context) -> None:
    """Ask the service whether it serves. Exit code 0: it does; 1: it is up but does not; 3: nobody answers.

    Example:
      router-admin --target unix:/run/knnmoe.sock health

    """
    session = session_of(context)
    services = {name: session.client.serving_status(name) for name in SERVICES}
    serving = all(status == "SERVING" for status in services.values())
    document = {"target": session.client.target, "serving": serving, "services": services}
    session.output.table(document, ("service", "status"), list(services.items()))
    if not serving:
        raise typer.Exit(ExitCode.REFUSED)


def doctor(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Look at this data directory on this machine, without a service, e.g. --data /var/lib/knnmoe.",
        ),
    ] = None,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Also compare all entries, or with --data all files, with what was written, and read all of every "
            "snapshot, e.g. doctor --deep.",
        ),
    ] = False,
) -> None:
    """Look for what is wrong with the service, or with a data directory that no service has open.

    Checks versions, free disk, who holds the directory, access to its files, the manifest and the
    layers of every memory, leftovers of crashes, entries without an index, memories that were set
    aside, snapshots, and settings that nobody has calibrated; of a service also whether lookups find a
    sample of each layer's own keys. Reads only. Each finding comes with the
    command that helps; the exit code is 1 when one is an error, or when the service does not answer.

    Example:
      router-admin doctor
      router-admin --json doctor --data /var/lib/knnmoe --deep

    """
    session = session_of(context)
    if data is None:
        findings = _of_service(session.client, deep)
    else:
        minimum = _settings(data).min_free_bytes
        findings = list(diagnose_directory(data, minimum, deep=deep))
    sound = all(finding.severity is not Severity.ERROR for finding in findings)
    document = {"sound": sound, "findings": [asdict(finding) for finding in findings]}
    session.output.line(document, _text(findings))
    if not sound:
        raise typer.Exit(ExitCode.REFUSED)


def _of_service(client: AdminClient, deep: bool) -> list[Finding]:
    try:
        reply = client.unary(
            client.doctor.Diagnose, doctor_pb.DiagnoseRequest(deep=deep), long=True
        )
    except ServiceError as failed:
        if not isinstance(shown := admin_error(failed), Unreachable):
            raise
        remedy = f"router-service serve --data DIR --listen {client.target}"
        return [error("service", str(shown), remedy)]
    findings = [_decoded(finding) for finding in reply.findings]
    if reply.service_version != __version__:
        what = f"the service is version {reply.service_version}, this program {__version__}"
        findings.insert(0, warning("versions", what, "pip install --upgrade knn-moe"))
    return findings


def _decoded(message: doctor_pb.Finding) -> Finding:
    severity = Severity(plain(message)["severity"])
    return Finding(severity, message.check, message.what, message.remedy)


def _settings(data: Path) -> ServiceSettings:
    # The rest comes from the environment, as for the service.
    given: dict[str, Any] = {"data": data}
    try:
        return ServiceSettings(**given)
    except ValidationError as invalid:
        raise environment_problem(invalid) from invalid


def _text(findings: list[Finding]) -> str:
    """Each finding with its remedy, and how many there are of each severity."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.severity:8} {finding.check}: {finding.what}")
        if finding.remedy:
            lines.append(f"{'':8} -> {finding.remedy}")
    counts = Counter(finding.severity for finding in findings)
    return "\n".join([*lines, ", ".join(f"{counts[severity]} {severity}" for severity in Severity)])

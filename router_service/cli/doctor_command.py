"""`router-admin doctor`: what is wrong, and the command that helps."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from knnmoe.v1 import doctor_pb2 as pb
from pydantic import ValidationError
from rich.console import Console

from router_service import __version__
from router_service.cli.admin_client import AdminClient
from router_service.cli.errors import BadInput, ExitCode, Unreachable
from router_service.cli.output import plain
from router_service.cli.session import session_of
from router_service.doctor import Finding, Severity, diagnose_directory, error, warning
from router_service.settings import ServiceSettings


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
            help="Also read all of every snapshot and compare its sums, e.g. doctor --deep.",
        ),
    ] = False,
) -> None:
    """Look for what is wrong with the service, or with a data directory that no service has open.

    Checks versions, free disk, who holds the directory, access to its files, the manifest and the
    layers of every memory, leftovers of crashes, entries without an index, memories that were set
    aside, snapshots, and settings that nobody has calibrated. Reads only. Each finding comes with the
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
    session.output.emit(document, lambda console: _render(console, findings))
    if not sound:
        raise typer.Exit(ExitCode.REFUSED)


def _of_service(client: AdminClient, deep: bool) -> list[Finding]:
    try:
        reply = client.unary(client.doctor.Diagnose, pb.DiagnoseRequest(deep=deep), long=True)
    except Unreachable as unreachable:
        remedy = f"router-service serve --data DIR --listen {client.target}"
        return [error("service", str(unreachable), remedy)]
    findings = [_decoded(finding) for finding in reply.findings]
    if reply.service_version != __version__:
        what = f"the service is version {reply.service_version}, this program {__version__}"
        findings.insert(0, warning("versions", what, "pip install --upgrade knn-moe"))
    return findings


def _decoded(message: pb.Finding) -> Finding:
    severity = Severity(plain(message)["severity"])
    return Finding(severity, message.check, message.what, message.remedy)


def _settings(data: Path) -> ServiceSettings:
    given: dict[str, Any] = {
        "data": data
    }  # the rest comes from the environment, as for the service
    try:
        return ServiceSettings(**given)
    except ValidationError as invalid:
        problem = invalid.errors()[0]
        name = "_".join(str(part) for part in problem["loc"]).upper()
        raise BadInput(f"environment: ROUTER_SERVICE_{name}: {problem['msg']}") from invalid


def _render(console: Console, findings: list[Finding]) -> None:
    for finding in findings:
        _print(console, f"{finding.severity:8} {finding.check}: {finding.what}")
        if finding.remedy:
            _print(console, f"{'':8} -> {finding.remedy}")
    counts = Counter(finding.severity for finding in findings)
    _print(console, ", ".join(f"{counts[severity]} {severity}" for severity in Severity))


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)

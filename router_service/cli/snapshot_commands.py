"""`router-admin snapshot`: create, list, verify, restore, pack, delete."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from knnmoe.v1 import snapshots_pb2 as pb

from router_service.cli.errors import AdminError, BadInput
from router_service.cli.operation_commands import followed
from router_service.cli.options import AdminTyper, MemoryName, Yes, complete_memory
from router_service.cli.output import Bytes, Session, confirm, plain, session_of, utc

app = AdminTyper("Whole copies of memories: make, check, restore and move them.")

SnapshotName = Annotated[
    str,
    typer.Argument(
        metavar="SNAPSHOT",
        help="Name of the snapshot, as `snapshot list` prints it, e.g. monday.",
        show_default=False,
    ),
]
SnapshotOrPath = Annotated[
    str,
    typer.Argument(
        metavar="SNAPSHOT|PATH",
        help="Name of a snapshot of the memory; or, with a slash, the path of a snapshot's directory or packed "
        "archive on the service's machine, e.g. /backup/monday.tar.",
        show_default=False,
    ),
]


@app.command("create")
def create(
    context: typer.Context,
    name: MemoryName,
    snapshot: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="SNAPSHOT",
            help="Name of the snapshot; made of time and version when not given, e.g. --as monday.",
        ),
    ] = None,
) -> None:
    """Copy a memory, all layers as they are at one moment, to the service's directory of snapshots.

    Lookups go on; writes wait while the files are copied. Of a memory on a Qdrant server the entries are copied while
    writes go on too, and at the end these wait while what is there is listed once more, unless none came meanwhile.

    Example:
      router-admin snapshot create bible --as monday

    """
    session = session_of(context)
    request = pb.CreateSnapshotRequest(memory=name, name=snapshot or "")
    _emit(session, "made", _result(session, session.client.snapshots.CreateSnapshot, request))


@app.command("list")
def list_snapshots(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]",
            autocompletion=complete_memory,
            help="Only snapshots of this memory, e.g. bible; all when left out.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """List the snapshots of the service, oldest first; those that cannot be used with the reason.

    Example:
      router-admin snapshot list bible

    """
    session = session_of(context)
    request = pb.ListSnapshotsRequest(memory=name)
    reply = session.client.unary(session.client.snapshots.ListSnapshots, request, long=True)
    columns = ("memory", "snapshot", "created", "entries", "size", "problem")
    rows = [
        [
            *(one.memory, one.name, utc(one.created_unix_ms) if one.created_unix_ms else ""),
            one.entries,
            Bytes(one.content_bytes),
            one.problem,
        ]
        for one in reply.snapshots
    ]
    session.output.table(plain(reply), columns, rows)


@app.command("verify")
def verify(context: typer.Context, name: MemoryName, snapshot: SnapshotOrPath) -> None:
    """Read all of a snapshot and compare it with its manifest.

    Example:
      router-admin snapshot verify bible monday
      router-admin snapshot verify bible /backup/monday.tar

    """
    session = session_of(context)
    request = pb.VerifySnapshotRequest(snapshot=_ref(name, snapshot))
    _emit(session, "whole:", _result(session, session.client.snapshots.VerifySnapshot, request))


@app.command("restore")
def restore(
    context: typer.Context,
    name: MemoryName,
    snapshot: SnapshotOrPath,
    as_memory: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="NEWNAME",
            help="Name of the memory to serve; NAME when not given, e.g. --as bible-monday.",
        ),
    ] = None,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Swap it in for the memory that is served under that name, e.g. --replace --yes.",
        ),
    ] = False,
    yes: Annotated[
        bool,
        typer.Option("--yes", help="Do not ask before --replace; needed in scripts, e.g. --yes."),
    ] = False,
) -> None:
    """Serve a copy of a snapshot as a memory. The snapshot itself stays as it is.

    It is checked first: a damaged, truncated or foreign one is refused, and nothing changes. A snapshot from another
    machine is given by its path on the service's machine: copy its directory there, or the archive that `pack` made.
    On a Qdrant server new collections are filled and indexed beside what serves, then all layers change over at once.

    Example:
      router-admin snapshot restore bible monday --as bible-monday
      router-admin snapshot restore bible /backup/monday.tar --replace --yes

    """
    session, target = session_of(context), as_memory or name
    if replace and not yes:
        question = f"Replace memory {target}, and all that was written to it since, by {snapshot}?"
        confirm("restore --replace", lambda: question)
    request = pb.RestoreSnapshotRequest(
        snapshot=_ref(name, snapshot), as_memory=target, replace=replace
    )
    reply = _last(session, session.client.snapshots.RestoreSnapshot, request, "memory")
    memory = reply.memory
    if reply.remark:
        session.output.remark(reply.remark)
    entries = sum(layer.entries for layer in memory.layers)
    line = f"restored {target} from {snapshot} ({entries} entries)"
    session.output.line(plain(memory), line)


@app.command("pack")
def pack(
    context: typer.Context,
    name: MemoryName,
    snapshot: SnapshotName,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE.tar",
            help="Name of a new file in the service's directory of archives (`serve --pack-dir`; DATA/packs when that "
            "was not given), or its absolute path there, e.g. monday.tar.",
            show_default=False,
        ),
    ],
) -> None:
    """Write a snapshot to one file, to carry it to another machine; prints the file's path on the service's machine.

    Example:
      router-admin snapshot pack bible monday monday.tar

    """
    session = session_of(context)
    request = pb.PackSnapshotRequest(memory=name, name=snapshot, path=file)
    reply = _last(session, session.client.snapshots.PackSnapshot, request, "snapshot")
    line = f"packed {reply.snapshot.memory} {reply.snapshot.name} into {reply.archive}"
    session.output.line(plain(reply.snapshot) | {"archive": reply.archive}, line)


@app.command("delete")
def delete(
    context: typer.Context, name: MemoryName, snapshot: SnapshotName, yes: Yes = False
) -> None:
    """Delete a snapshot. Asks first.

    Example:
      router-admin snapshot delete bible monday --yes

    """
    session = session_of(context)
    if not yes:
        confirm("snapshot delete", lambda: f"Delete snapshot {snapshot} of {name}?")
    request = pb.DeleteSnapshotRequest(memory=name, name=snapshot)
    reply = session.client.unary(session.client.snapshots.DeleteSnapshot, request, long=True)
    _emit(session, "deleted", reply.snapshot)


def _ref(memory: str, snapshot: str) -> pb.SnapshotRef:
    """A name, or with a slash a path."""
    if not snapshot:
        raise BadInput("SNAPSHOT: got nothing, expected the name of a snapshot, or a path")
    if "/" in snapshot:
        return pb.SnapshotRef(memory=memory, path=snapshot)
    return pb.SnapshotRef(memory=memory, name=snapshot)


def _result(session: Session, method: Any, request: Any, field: str = "snapshot") -> Any:
    """The snapshot, or the memory, that an operation ends with. Raises AdminError."""
    return getattr(_last(session, method, request, field), field)


def _last(session: Session, method: Any, request: Any, field: str) -> Any:
    """The response with an operation's result. Raises AdminError."""
    replies = list(followed(session, method, request, field))
    if not replies:
        raise AdminError("the service ended the operation without a result; see its log")
    return replies[-1]


def _emit(session: Session, verb: str, snapshot: pb.SnapshotDescription) -> None:
    size = Bytes(snapshot.content_bytes)
    line = f"{verb} {snapshot.memory} {snapshot.name}: {snapshot.entries} entries, {size}, {snapshot.path}"
    session.output.line(plain(snapshot), line)

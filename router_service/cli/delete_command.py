"""`router-admin delete`."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from knnmoe import tensors
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import retention_pb2 as pb
from rich.console import Console

from router_service.arrays import MAX_ENTRY_ID
from router_service.cli.admin_errors import BadInput
from router_service.cli.admin_options import MemoryName
from router_service.cli.admin_output import plain, table
from router_service.cli.admin_session import Session, session_of
from router_service.cli.confirmation import confirm


def delete(
    context: typer.Context,
    name: MemoryName,
    entry_id: Annotated[
        list[int] | None,
        typer.Option(
            "--id",
            min=0,
            max=MAX_ENTRY_ID,
            help="The entry of this id, in every layer; repeat it for more (--id 17 --id 18).",
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="All entries of this source, e.g. genesis.txt.")
    ] = None,
    example: Annotated[
        str | None,
        typer.Option(
            help="Of the source, only those of this example, e.g. --source kjv --example 3."
        ),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(min=0, help="Only in this layer, counted from 0, e.g. 15.")
    ] = None,
    fsync: Annotated[
        bool,
        typer.Option(
            "--fsync",
            help="Return when the deletion would survive loss of power, not only of the service, "
            "e.g. --fsync.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count; delete nothing, e.g. --dry-run.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask; needed in scripts, e.g. --yes.")
    ] = False,
) -> None:
    """Delete entries of a memory: some ids, or all of a source or of one of its examples. Asks first.

    Example:
      router-admin delete bible --source genesis.txt --dry-run
      router-admin delete bible --source genesis.txt --example 3 --yes
      router-admin delete bible --id 17 --id 18 --layer 15 --yes

    """
    request = _request(entry_id, source, example)
    request.memory = name
    if layer is not None:
        request.layer = layer
    request.durability = admin_pb.DURABILITY_FSYNC if fsync else admin_pb.DURABILITY_PROCESS
    session = session_of(context)
    if dry_run or not yes:
        counted = _send(session, request, dry_run=True)
        if dry_run:
            _emit(session, name, counted, dry_run=True)
            return
        confirm(f"delete ({counted.deleted} entries)", lambda: _question(name, counted))
    _emit(session, name, _send(session, request, dry_run=False), dry_run=False)


def _request(ids: list[int] | None, source: str | None, example: str | None) -> pb.DeleteRequest:
    if bool(ids) == (source is not None):
        raise BadInput("say what to delete: either --id (repeated for more) or --source")
    if ids and example is not None:
        raise BadInput("--example names an example of a --source; it does not go with --id")
    if ids:
        unique = np.unique(np.array(ids, np.uint64))
        return pb.DeleteRequest(ids=tensors.to_tensor(unique))
    return pb.DeleteRequest(filter=pb.EntryFilter(source=source, example=example))


def _send(session: Session, request: pb.DeleteRequest, *, dry_run: bool) -> pb.DeleteResponse:
    request.dry_run = dry_run
    reply: pb.DeleteResponse = session.client.unary(
        session.client.retention.Delete, request, long=True
    )
    return reply


def _question(name: str, counted: pb.DeleteResponse) -> str:
    layers = sum(1 for layer in counted.layers if layer.deleted)
    return f"Delete {counted.deleted} entries of {layers} layer(s) of {name}?"


def _emit(session: Session, name: str, reply: pb.DeleteResponse, *, dry_run: bool) -> None:
    document = {"memory": name, "dry_run": dry_run, **plain(reply)}
    verb = "would delete" if dry_run else "deleted"
    rows: list[list[object]] = [
        [layer.layer, layer.deleted, layer.entries - layer.deleted] for layer in reply.layers
    ]
    columns = ("layer", verb, "left")

    def render(console: Console) -> None:
        console.print(f"{verb} {reply.deleted} entries of {name}")
        console.print(table(columns, rows))

    session.output.emit(document, render)

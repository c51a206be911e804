"""`router-admin merge`: entries of one memory into another."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict
from typing import Annotated, Any

import typer

from router_service.cli.admin_client import AdminClient
from router_service.cli.entry_merge import Conflict, Merge, MergeCounts, Side
from router_service.cli.errors import BadInput
from router_service.cli.output import table
from router_service.cli.same_memory import require_same_entries
from router_service.cli.session import session_of


def merge(
    context: typer.Context,
    from_name: Annotated[
        str,
        typer.Argument(
            metavar="FROM", help="Memory that is read and stays, e.g. psalms.", show_default=False
        ),
    ],
    into_name: Annotated[
        str,
        typer.Argument(
            metavar="INTO", help="Memory that is written to, e.g. bible.", show_default=False
        ),
    ],
    on_conflict: Annotated[
        Conflict,
        typer.Option(
            help="Which entry stays when both have its id: INTO's (keep), FROM's (replace), or the one made "
            "later (newer), e.g. --on-conflict keep."
        ),
    ] = Conflict.NEWER,
    from_target: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Service that holds FROM, when it is not that of --target, e.g. unix:/run/other.sock.",
        ),
    ] = None,
    fsync: Annotated[
        bool,
        typer.Option(
            "--fsync",
            help="Acknowledge a batch when it would survive loss of power, e.g. merge psalms bible --fsync.",
        ),
    ] = False,
) -> None:
    """Add the entries of one memory to another of the same model, kind and similarity.

    INTO keeps its settings; the bandwidths that fitted its entries may not fit the new ones, so
    calibrate it afterwards, and optimize it to index them. Merging again adds nothing, and finishes a
    merge that was cut short.

    Example:
      router-admin merge psalms bible
      router-admin merge psalms bible --on-conflict keep --from-target 127.0.0.1:50052

    """
    session, started = session_of(context), time.monotonic()
    client = session.client
    if from_name == into_name and from_target in (None, client.target):
        raise BadInput(
            f"{from_name}: FROM and INTO are the same memory; name two, or --from-target"
        )
    with closing(client.at(from_target or client.target)) as from_client:
        source, target = _side(from_client, from_name), _side(client, into_name)
        require_same_entries(
            f"memory {from_name}", source.memory, f"memory {into_name}", target.memory
        )
        merging = Merge(source, target, on_conflict, fsync)
        total = sum(layer.entries for layer in source.memory.layers)
        with session.output.progress("merging", total) as advance:
            merging.run(advance)
    document = _document(from_name, into_name, merging, time.monotonic() - started)
    rows = [list(layer.values()) for layer in document["layers"]]
    columns = ("layer", *asdict(MergeCounts()))
    title = f"{from_name} into {into_name}"
    session.output.emit(document, lambda console: console.print(table(columns, rows, title=title)))
    if document["added"] or document["replaced"]:
        session.output.remark(
            f"next: router-admin calibrate {into_name}; router-admin optimize {into_name}"
        )


def _side(client: AdminClient, name: str) -> Side:
    return Side(client, client.memory(name))


def _document(from_name: str, into_name: str, merging: Merge, elapsed_s: float) -> dict[str, Any]:
    total = MergeCounts()
    for counts in merging.counts.values():
        total.add(counts)
    layers = [{"layer": n, **asdict(counts)} for n, counts in sorted(merging.counts.items())]
    return {
        "from": from_name,
        "into": into_name,
        "on_conflict": merging.on_conflict.value,
        **asdict(total),
        "layers": layers,
        "elapsed_s": round(elapsed_s, 3),
    }

"""`router-admin migrate`: memories to another home, and back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from router_service.cli import migration_report, options
from router_service.cli.errors import AdminError, BadInput, Interrupted
from router_service.cli.interrupts import interruptible
from router_service.cli.migration_moves import (
    Ends,
    Move,
    checked_moves,
    look_at_memory,
    move_memory,
    wanted_records,
)
from router_service.cli.places import opened_source, opened_target, place_name, store_errors
from router_service.cli.session import Session, session_of
from router_service.memories.memory import MemoryRecord
from router_service.settings import QdrantSettings
from router_service.transfer.moving import Progress

_INTERRUPTED = "interrupted; what was written stays, and running the same command again goes on"


def migrate(
    context: typer.Context,
    from_place: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="PLACE",
            help="Where the memories are: embedded (the service at --target), the URL of a Qdrant server, or a data "
            "directory that no service holds, e.g. embedded.",
        ),
    ],
    to_place: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="PLACE",
            help="Where they go, named likewise, e.g. http://qdrant:6334.",
        ),
    ],
    memory: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MEMORY...]",
            help="Memories to move, e.g. bible; all of the source when none is named.",
            show_default=False,
        ),
    ] = None,
    as_name: Annotated[
        str | None,
        typer.Option(
            "--as", metavar="NAME", help="Name of the one memory in its new place, e.g. --as law-2."
        ),
    ] = None,
    delete: Annotated[
        bool,
        typer.Option(
            "--delete",
            help="Remove entries of the target that the source lacks, e.g. migrate law --delete.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Count what would be written; write nothing, e.g. --dry-run."
        ),
    ] = False,
    optimize: Annotated[
        bool,
        typer.Option(
            "--optimize/--no-optimize",
            help="Index the target, with the compression of search keys that the source has, "
            "e.g. --no-optimize.",
        ),
    ] = True,
    qdrant_api_key_file: options.ApiKeyFile = None,
    qdrant_ca_file: options.CaFile = None,
    qdrant_prefix: options.Prefix = None,
    qdrant_shard_number: options.ShardNumber = None,
    qdrant_replication_factor: options.ReplicationFactor = None,
    qdrant_write_consistency_factor: options.WriteConsistencyFactor = None,
    qdrant_on_disk: options.OnDisk = None,
    qdrant_write_ordering: options.Ordering = None,
) -> None:
    """Move memories between a service, Qdrant servers and data directories; the source stays as it is.

    Entries that the target lacks, or has otherwise, are written, pass after pass until nothing differs;
    the source may serve and change meanwhile. Then both are read again: every layer must have the same
    count and the same checksum (docs/formats.md). A run that was cut short is finished by running it
    again. The target's memory is made with the model and all settings of the source's; hit counts and
    snapshots do not move. `embedded` goes on serving; a server or a directory is opened by this command.

    Example:
      router-admin migrate --from embedded --to http://qdrant:6334
      router-admin migrate law --from http://qdrant:6334 --to embedded --dry-run
      router-admin migrate law --from ./memories --to http://qdrant:6334 --as law-2

    """
    qdrant = options.qdrant_settings(locals())
    session, started = session_of(context), time.monotonic()
    if as_name is not None and len(memory or ()) != 1:
        raise BadInput("--as names one memory in its new place; name that one memory, too")
    places = (from_place, to_place)
    with (
        interruptible(_INTERRUPTED) as check,
        _ends(session, places, memory or (), qdrant, dry_run) as (ends, records),
    ):
        progress = _watched(session.output.progress, check)
        done, problem = [], ""
        for move in checked_moves(ends, records, as_name):
            if dry_run:
                look_at_memory(ends, move, progress, delete=delete)
            else:
                _move(session, ends, move, progress, delete=delete, optimize=optimize)
            done.append(move)
            if problem := migration_report.problem(ends, move):
                break
    _emit(session, ends, done, dry_run=dry_run, elapsed_s=time.monotonic() - started)
    if problem:
        raise AdminError(problem)


def _move(
    session: Session, ends: Ends, move: Move, progress: Progress, *, delete: bool, optimize: bool
) -> None:
    with _resumable():
        move_memory(ends, move, progress, delete=delete, optimize=optimize)
    for remark in migration_report.remarks(move):
        session.output.remark(remark)


@contextmanager
def _ends(
    session: Session,
    places: tuple[str, str],
    names: Sequence[str],
    qdrant: QdrantSettings,
    dry_run: bool,
) -> Iterator[tuple[Ends, list[MemoryRecord]]]:
    """Both places, opened, the target once the source is known to have memories of these names."""
    source_name, target_name = place_name("--from", places[0]), place_name("--to", places[1])
    if source_name.identity == target_name.identity:
        raise BadInput(
            f"--from {places[0]} and --to {places[1]} are the same place; name two (export and import copy a memory "
            "within one)"
        )
    client = session.client
    with opened_source(source_name, client, qdrant) as source:
        records = wanted_records(source, source_name, names)
        with opened_target(target_name, client, qdrant, dry_run=dry_run) as target:
            yield Ends(source, target, source_name, target_name), records


def _watched(progress: Progress, check: Callable[[], None]) -> Progress:
    """The same, that looks for Ctrl-C as it advances."""

    @contextmanager
    def watched(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
        with progress(label, total) as advance:

            def checked(done: int) -> None:
                check()
                advance(done)

            yield checked

    return watched


@contextmanager
def _resumable() -> Iterator[None]:
    """Adds to what ends a move that it is not lost."""
    try:
        with store_errors():
            yield
    except Interrupted:
        raise
    except AdminError as error:
        told = AdminError(
            f"{error} (what was written stays; running the same command again goes on)"
        )
        told.exit_code = error.exit_code
        raise told from error


def _emit(
    session: Session, ends: Ends, done: list[Move], *, dry_run: bool, elapsed_s: float
) -> None:
    memories = [migration_report.document(move) for move in done]
    document: dict[str, Any] = {
        "from": ends.source_name.text,
        "to": ends.target_name.text,
        "dry_run": dry_run,
        "verified": all(memory["verified"] for memory in memories),
        "memories": memories,
        "elapsed_s": round(elapsed_s, 3),
    }

    def render(console: Console) -> None:
        for move in done:
            migration_report.render(console, move, dry_run=dry_run)

    session.output.emit(document, render)

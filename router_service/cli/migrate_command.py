"""`router-admin migrate`: memories to another endpoint, and back."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from knnmoe.client import AdminClient, ServiceError
from rich.console import Console

from router_service.backends.exact import ExactBackend
from router_service.backends.qdrant_server.options import (
    is_url,
    parse_url,
    ports_of,
    urls_of,
    without_key,
)
from router_service.cli import setting_options as options
from router_service.cli.entry_commands import copy_errors, require_same_entries
from router_service.cli.errors import AdminError, BadInput, Interrupted, admin_error
from router_service.cli.operation_commands import first_interrupt
from router_service.cli.options import complete_memory
from router_service.cli.output import Session, session_of, table
from router_service.errors import InvalidField, shorten
from router_service.memories.memory import MemoryRecord
from router_service.memories.store import MemoryStore
from router_service.settings import QdrantSettings
from router_service.storage import opened_store
from router_service.transfer.endpoints import Advance, Endpoint, Progress
from router_service.transfer.migration import Migration
from router_service.transfer.service import EMBEDDED, ServiceEndpoint
from router_service.transfer.store import StoreEndpoint

_EXPECTED = (
    "embedded (the service), http(s)://HOST[:PORT] of a Qdrant server (or several of one cluster, with commas between "
    "them), or a data directory"
)
_AGAIN = "run the same command again"
_COUNTS = ("added", "replaced", "deleted", "only_in_target")
_INTERRUPTED = "interrupted; what was written stays, and running the same command again goes on"
# Hex digits of a checksum in a table; --json has them all.
_SHOWN_DIGITS = 16


def migrate(
    context: typer.Context,
    from_endpoint: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="ENDPOINT",
            help="Where the memories are: embedded (the service at --target), the URL of a Qdrant server or those of a "
            "cluster (http://a:6334,http://b:6334), or a data directory that no service holds, e.g. embedded.",
        ),
    ],
    to_endpoint: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="ENDPOINT",
            help="Where they go, named likewise, e.g. http://qdrant:6334.",
        ),
    ],
    memory: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MEMORY...]",
            autocompletion=complete_memory,
            help="Memories to move, e.g. bible; all of the source when none is named.",
            show_default=False,
        ),
    ] = None,
    as_name: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="NAME",
            help="Name of the one memory at its new endpoint, e.g. --as law-2.",
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
    count and the same checksum (docs/formats.md), and lookups must find a sample of the target's keys;
    when they do not, a memory that was made for this is removed again. A run that was cut short is
    finished by running it again. The target's memory is made with the model and all settings of the
    source's; hit counts and snapshots do not move. `embedded` goes on serving; a server or a directory
    is opened by this command.

    Example:
      router-admin migrate --from embedded --to http://qdrant:6334
      router-admin migrate law --from http://qdrant:6334 --to embedded --dry-run
      router-admin migrate law --from ./memories --to http://qdrant:6334 --as law-2

    """
    qdrant = options.qdrant_settings(locals())
    session, started = session_of(context), time.monotonic()
    if as_name is not None and len(memory or ()) != 1:
        raise BadInput("--as names one memory at its new endpoint; name that one memory, too")
    source_name = endpoint_name("--from", from_endpoint)
    target_name = endpoint_name("--to", to_endpoint)
    if source_name.identity & target_name.identity:
        raise BadInput(
            f"--from {from_endpoint} and --to {to_endpoint} are the same endpoint; name two (export and import copy a "
            "memory within one)"
        )
    _require_directories(source_name, target_name)
    client = session.client
    with (
        interruptible(_INTERRUPTED) as check,
        _opened("--from", source_name, client, qdrant, make=False) as source,
    ):
        records = _wanted(source, memory or ())
        with _opened("--to", target_name, client, qdrant, make=not dry_run) as target:
            progress = _watched(session.output.progress, check)
            done, problem = [], ""
            for migration in [_checked(source, target, each, as_name) for each in records]:
                if dry_run:
                    migration.look(progress, delete=delete)
                else:
                    _run(session, migration, progress, delete=delete, optimize=optimize)
                done.append(migration)
                if problem := _problem(migration):
                    break
    memories = [_document(migration) for migration in done]
    document: dict[str, Any] = {
        "from": from_endpoint,
        "to": to_endpoint,
        "dry_run": dry_run,
        "verified": all(each["verified"] for each in memories),
        "memories": memories,
        "elapsed_s": round(time.monotonic() - started, 3),
    }

    def render(console: Console) -> None:
        for each in memories:
            state = "verified" if each["verified"] else "not verified"
            name = (
                each["memory"]
                if each["as"] == each["memory"]
                else f"{each['memory']} as {each['as']}"
            )
            rows = [_row(layer) for layer in each["layers"]]
            title = f"{name}, {'would be done' if dry_run else state}"
            console.print(table(list(rows[0]), rows, title))

    session.output.emit(document, render)
    if problem:
        raise AdminError(problem)


def _run(
    session: Session, migration: Migration, progress: Progress, *, delete: bool, optimize: bool
) -> None:
    try:
        with copy_errors():
            migration.run(progress, delete=delete, optimize=optimize)
    except Interrupted:
        raise
    except (AdminError, ServiceError) as error:
        shown = admin_error(error) if isinstance(error, ServiceError) else error
        message = f"{shown} (what was written stays; running the same command again goes on)"
        raise type(shown)(message) from error
    for remark in _remarks(migration):
        session.output.remark(remark)


def _wanted(source: Endpoint, names: Sequence[str]) -> list[MemoryRecord]:
    """The memories of these names, each once, or all that the source holds. Raises AdminError."""
    wanted = list(dict.fromkeys(names)) or source.names()
    if not wanted:
        raise BadInput(f"nothing to move: {shorten(source.label)} holds no memories")
    return [source.record(name) for name in wanted]


def _checked(
    source: Endpoint, target: Endpoint, record: MemoryRecord, as_name: str | None
) -> Migration:
    """What to do. Raises BadInput unless the target can take the memory."""
    name = as_name or record.name
    there = target.find(name)
    if there is None:
        return Migration(source, target, record, name, made=True)
    left, right = f"memory {record.name} in {source.label}", f"memory {name} in {target.label}"
    require_same_entries(left, record, right, there)
    one, other = record.settings.preset, there.settings.preset
    if one != other:
        raise BadInput(
            f"{left} has preset {one}, {right} {other}, which is fixed at creation; pass --as NAME"
        )
    return Migration(source, target, record, name, made=False)


@dataclass(frozen=True, slots=True)
class EndpointName:
    """An endpoint as the user wrote it; identities of two have something in common when they are the same."""

    text: str
    identity: frozenset[tuple[str, ...]]

    @property
    def directory(self) -> Path | None:
        """The data directory, when it is one."""
        return Path(self.text) if any(kind == "directory" for kind, *_ in self.identity) else None


def endpoint_name(option: str, text: str) -> EndpointName:
    """What a user means. Raises BadInput that names the option."""
    if text == EMBEDDED:
        return EndpointName(text, frozenset({(EMBEDDED,)}))
    if is_url(text):
        try:
            nodes = [parse_url(url) for url in urls_of(text)]
        except InvalidField as error:
            raise BadInput(f"{option}: got {error.value}, expected {error.expected}") from error
        servers = (("server", host.lower(), str(ports_of(port)[0])) for host, port in nodes)
        return EndpointName(text, frozenset(servers))
    if not text or "\0" in text or "://" in text or re.fullmatch(r"[^/]+:\d+", text):
        raise BadInput(f"{option}: got {shorten(without_key(text))}, expected {_EXPECTED}")
    return EndpointName(text, frozenset({("directory", str(Path(text).resolve()))}))


def _require_directories(source: EndpointName, target: EndpointName) -> None:
    if source.directory is not None and not (source.directory / "memories").is_dir():
        raise BadInput(
            f"--from: {shorten(source.text)} is no data directory of a service (it has no memories/), "
            f"expected {_EXPECTED}"
        )
    if target.directory is not None and target.directory.exists() and not target.directory.is_dir():
        raise BadInput(f"--to: {shorten(target.text)} is a file, expected {_EXPECTED}")


@contextmanager
def _opened(
    option: str, name: EndpointName, client: AdminClient, qdrant: QdrantSettings, *, make: bool
) -> Iterator[Endpoint]:
    """Raises AdminError. Without `make`, a directory that is not there is an endpoint without memories."""
    with copy_errors():
        if name.text == EMBEDDED:
            yield ServiceEndpoint(client)
        elif make or name.directory is None or (name.directory / "memories").exists():
            with opened_store(name.text, qdrant, option) as store:
                yield StoreEndpoint(name.text, store)
        else:
            yield StoreEndpoint(name.text, MemoryStore(ExactBackend(), None))


@contextmanager
def interruptible(reason: str) -> Iterator[Callable[[], None]]:
    """Yields a function that raises Interrupted with `reason` once Ctrl-C was pressed; to be called often.

    A second Ctrl-C ends the process at once, which a store survives as it survives SIGKILL.
    """
    with first_interrupt(signal.SIG_DFL) as pressed:

        def check() -> None:
            if pressed.is_set():
                raise Interrupted(reason)

        yield check


def _watched(progress: Progress, check: Callable[[], None]) -> Progress:
    """The same, that looks for Ctrl-C as it advances."""

    @contextmanager
    def watched(label: str, total: int | None) -> Iterator[Advance]:
        with progress(label, total) as advance:

            def checked(done: int) -> None:
                check()
                advance(done)

            yield checked

    return watched


def _document(migration: Migration) -> dict[str, Any]:
    """One memory's part of the JSON document. What a run did not come to is left out."""
    layers, copy = _layers(migration), migration.copy
    return {
        "memory": migration.record.name,
        "as": migration.as_name,
        "made": migration.made,
        "changed_settings": migration.changed_settings,
        **{name: sum(layer[name] for layer in layers) for name in _COUNTS},
        "passes": copy.passes,
        "verified": migration.verified,
        "layers": layers,
    }


def _layers(migration: Migration) -> list[dict[str, Any]]:
    copy = migration.copy
    layers: dict[int, dict[str, Any]] = {}
    for number in copy.layers:
        counts = copy.counts[number]
        done = (counts.added, counts.replaced, counts.deleted, counts.only_in_sink)
        layers[number] = {"layer": number, **dict(zip(_COUNTS, done, strict=True))}
    for each in copy.sums:
        layers[each.layer] |= {
            "source": asdict(each.source),
            "target": asdict(each.sink),
            "equal": each.equal,
        }
    for index in migration.indexes:
        layers[index.layer] |= {
            "source_compression": index.source.label,
            "compression": index.target.label,
            "optimized": index.optimized,
        }
    return [layers[number] for number in sorted(layers)]


def _row(layer: dict[str, Any]) -> dict[str, object]:
    """One layer of the document, as a row of its memory's table."""
    names = ("layer", *_COUNTS)
    row: dict[str, object] = {name.replace("_", " "): layer[name] for name in names}
    if "equal" in layer:
        source, target = layer["source"], layer["target"]
        row |= {"source": source["entries"], "target": target["entries"]}
        row["sha256"] = _shown(source["sha256"])
        row["of target"] = "the same" if layer["equal"] else _shown(target["sha256"])
    if "compression" in layer:
        row["search keys"] = layer["compression"]
    return row


def _shown(digits: str) -> str:
    return f"{digits[:_SHOWN_DIGITS]}..."


def _problem(migration: Migration) -> str:
    """Why the target is not the source's equal, and what to do; "" when it is, and after a dry run."""
    copy = migration.copy
    if migration.unfound:
        left = "it was removed again" if migration.made else "what was written stays"
        return f"{migration.unfound} ({shorten(migration.target.label)}; {left})"
    if not copy.verify or copy.verified:
        return ""
    where = f"memory {shorten(migration.as_name)} in {shorten(migration.target.label)}"
    if copy.changed_in_last_pass:
        return (
            f"{where}: {copy.changed_in_last_pass} entries still changed in pass {copy.passes}; {_AGAIN} when "
            "less is written to the source"
        )
    if copy.only_in_sink:
        surplus = ", ".join(
            f"layer {number}: {counts.only_in_sink}"
            for number, counts in sorted(copy.counts.items())
            if counts.only_in_sink
        )
        return (
            f"{where} holds {copy.only_in_sink} entries that the source lacks ({surplus}); nothing of it "
            "was deleted: pass --delete to remove them, or --as NAME to make another memory"
        )
    unequal = ", ".join(
        f"layer {each.layer} has {each.source.entries} entries (sha256 {_shown(each.source.sha256)}) in the source and "
        f"{each.sink.entries} ({_shown(each.sink.sha256)}) in the target"
        for each in copy.sums
        if not each.equal
    )
    return (
        f"{where} is not the same as the source: {unequal}; {_AGAIN} while nobody writes to either"
    )


def _remarks(migration: Migration) -> list[str]:
    """What the user should know beside the counts."""
    remarks, name = [], migration.as_name
    if migration.changed_settings:
        names = ", ".join(migration.changed_settings)
        remarks.append(f"{name}: settings brought from the source: {names}")
    refused = [index for index in migration.indexes if index.refused]
    if refused:
        numbers = ", ".join(str(index.layer) for index in refused)
        first = refused[0]
        remarks.append(
            f"{name}: the target cannot have search keys {first.source.label} (layers {numbers}; "
            f"{first.refused}); they stay {first.target.label}"
        )
    return remarks

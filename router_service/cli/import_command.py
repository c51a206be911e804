"""`router-admin import`: a memory from a file that `export` wrote."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from knnmoe import tensors
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1 import routing_pb2 as routing_pb

from router_service.cli.admin_client import AdminClient
from router_service.cli.entry_files import FileError, open_reader
from router_service.cli.entry_files.batches import EntryReader, regroup
from router_service.cli.entry_transfer import Upload, shape_of
from router_service.cli.errors import BadInput
from router_service.cli.file_description import FileDescription, description_from, description_of
from router_service.cli.same_memory import Described, require_same_entries, require_same_settings
from router_service.cli.session import Session, session_of


def import_memory(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="What `export` wrote: FILE.parquet, FILE.safetensors or FILE.jsonl.",
            show_default=False,
        ),
    ],
    as_name: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="NAME",
            help="Name of the memory to make, e.g. --as bible-2; the exported one's when not given.",
        ),
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Add to this memory, whose settings stay, in place of making one, e.g. --into bible.",
        ),
    ] = None,
    fingerprint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Model and settings for a file that does not say them, such as JSONL: what "
            "`router-admin --json memory show` printed, e.g. bible.json.",
        ),
    ] = None,
    fsync: Annotated[
        bool,
        typer.Option(
            "--fsync",
            help="Acknowledge a batch when it would survive loss of power, e.g. import bible.parquet --fsync.",
        ),
    ] = False,
) -> None:
    """Make a memory from an exported file, or add the file to one.

    Parquet and safetensors files say which model and settings their memory had; for JSONL give
    --fingerprint or --into. A file of another model is refused.

    Ids are those of the file, so importing again changes nothing, and an import that was cut short is
    finished by running the same command again. A memory that holds anything else is only added to with
    --into; an entry whose id is there is replaced. Search indexes are not in the file: run optimize.

    Example:
      router-admin import bible.parquet
      router-admin import bible.parquet --as bible-2
      router-admin import bible.jsonl --as bible-3 --fingerprint bible.json
      router-admin import more.parquet --into bible --fsync

    """
    session, started = session_of(context), time.monotonic()
    if as_name is not None and into is not None:
        raise BadInput("give --as (a memory to make) or --into (one that is there), not both")
    described = _described(file, fingerprint)
    if into is not None:
        found = _opened_into(session.client, file, into, described)
    else:
        found = _opened_as(session, file, as_name, described)
    upload = Upload(session.client, found.memory, found.reader, fsync)
    with session.output.progress("importing", found.reader.total) as advance:
        upload.run(None, advance)
    document = {
        "memory": found.memory.name,
        "file": str(file),
        "made": found.made,
        "entries": upload.written.total(),
        "layers": [{"layer": n, "entries": upload.written[n]} for n in sorted(upload.written)],
        "durability": "fsync" if fsync else "process",
        "elapsed_s": round(time.monotonic() - started, 3),
    }
    verb = "made" if found.made else "filled"
    line = f"{verb} memory {found.memory.name}: {document['entries']} entries from {file}"
    session.output.emit(document, lambda console: console.print(line, soft_wrap=True))


@dataclass(frozen=True, slots=True)
class _Import:
    """A file and the memory that it goes into."""

    memory: routing_pb.MemoryDescription
    reader: EntryReader
    made: bool


def _described(file: Path, fingerprint: Path | None) -> FileDescription | None:
    described = description_of(file)
    if fingerprint is None:
        return described
    if described is not None:
        raise BadInput(f"{file}: says its model and settings itself; leave --fingerprint out")
    return description_from(fingerprint)


def _opened_into(
    client: AdminClient, file: Path, name: str, described: FileDescription | None
) -> _Import:
    memory = client.memory(name)
    if described is not None:
        require_same_entries(f"file {file}", described, f"memory {name}", memory)
    return _Import(memory, _reader(file, memory), made=False)


def _opened_as(
    session: Session, file: Path, as_name: str | None, described: FileDescription | None
) -> _Import:
    if described is None:
        raise BadInput(
            f"{file}: does not say which model it is for; pass --into NAME, or --as NAME --fingerprint FILE.json "
            "(from: router-admin --json memory show NAME > FILE.json)"
        )
    name = as_name if as_name is not None else described.name
    reader = _reader(file, described)  # what can be checked is checked before anything is made
    memory = session.client.find_memory(name)
    if memory is None:
        return _Import(_created(session.client, name, described), reader, made=True)
    require_same_entries(f"file {file}", described, f"memory {name}", memory)
    require_same_settings(f"file {file}", described, f"memory {name}", memory)
    with session.output.progress("comparing", reader.total) as advance:
        _require_nothing_else(session.client, memory, reader, advance)
    return _Import(memory, reader, made=False)


def _reader(file: Path, of: routing_pb.MemoryDescription | FileDescription) -> EntryReader:
    try:
        return open_reader(file, shape_of(of), None)
    except FileError as error:
        raise BadInput(str(error)) from error


def _created(client: AdminClient, name: str, described: Described) -> routing_pb.MemoryDescription:
    request = pb.CreateMemoryRequest(
        name=name, fingerprint=described.fingerprint, settings=described.settings
    )
    return client.unary(client.admin.CreateMemory, request).memory


def _require_nothing_else(
    client: AdminClient,
    memory: routing_pb.MemoryDescription,
    reader: EntryReader,
    advance: Callable[[int], None],
) -> None:
    """Raises BadInput unless every entry of the memory has an id of the file: then it is what an import left."""
    shared = 0
    try:
        for batch in regroup(reader.batches(), shape_of(memory).batch_entries):
            ids = tensors.to_tensor(batch.entries.ids)
            request = pb.CountRequest(memory=memory.name, layer=batch.layer, ids=ids)
            shared += client.unary(client.admin.Count, request).total
            advance(len(batch))
    except FileError as error:
        raise BadInput(str(error)) from error
    others = sum(layer.entries for layer in memory.layers) - shared
    if others > 0:
        raise BadInput(
            f"memory {memory.name} is there already and holds {others} entries that {reader.path} does not have; "
            f"pass --into {memory.name} to add to it, or --as NAME to make another"
        )

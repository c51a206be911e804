"""Commands that copy entries: `router-admin upsert`, `export`, `import` and `merge`; and `count`."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from knnmoe.client import ServiceError
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1 import types_pb2 as types_pb
from pydantic import ValidationError

from router_service.cli.errors import AdminError, BadInput, Unreachable, admin_error
from router_service.cli.options import MemoryName, OnlyLayers, complete_memory
from router_service.cli.output import Session, parse_plain, plain, session_of
from router_service.cli.setting_options import environment_problem
from router_service.errors import BackendUnavailable, InvalidRequest, RoutingServiceError, shorten
from router_service.memories.memory import MemoryRecord
from router_service.rpc import codec
from router_service.transfer import copying
from router_service.transfer.copying import Copy
from router_service.transfer.endpoints import EntryShape
from router_service.transfer.entry_fields import EntryReader, FileError
from router_service.transfer.file import format_of, new_file, open_reader, read_metadata
from router_service.transfer.service import ServiceEndpoint, ServiceEntries

# What a file says about itself: the key in its metadata, and the version of what is found there.
_KEY = "knnmoe"
_FORMAT = 1
_ROW_OF_FIELD = re.compile(r"entries\.[a-z_.]+\[(\d+)\]")


class Conflict(StrEnum):
    """Which entry stays when both memories have its id."""

    KEEP = "keep"
    REPLACE = "replace"
    NEWER = "newer"


_POLICIES = {
    Conflict.KEEP: copying.keep,
    Conflict.REPLACE: copying.replace,
    Conflict.NEWER: copying.newer,
}


@contextmanager
def copy_errors() -> Iterator[None]:
    """What files, and stores that this process holds open itself, raise, as AdminError."""
    try:
        yield
    except (FileError, InvalidRequest) as error:
        raise BadInput(str(error)) from error
    except BackendUnavailable as error:
        raise Unreachable(str(error)) from error
    except RoutingServiceError as error:
        raise AdminError(str(error)) from error
    except ValidationError as error:
        raise environment_problem(error) from error


def _file(help_text: str) -> Any:
    return typer.Argument(metavar="FILE", help=help_text, show_default=False)


def _fsync(example: str) -> Any:
    help_text = f"Acknowledge a batch when it would survive loss of power{example} --fsync."
    return typer.Option("--fsync", help=help_text)


@copy_errors()
def upsert(
    context: typer.Context,
    name: MemoryName,
    file: Annotated[Path, _file("Entries to write: FILE.jsonl, FILE.parquet or FILE.safetensors.")],
    layer: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Write only this layer's entries; rows that name no layer are of it, e.g. 15.",
        ),
    ] = None,
    fsync: Annotated[
        bool, _fsync(", not only of the service, e.g. upsert bible bible.parquet")
    ] = False,
) -> None:
    """Write entries into a memory. An entry whose id is already there is replaced.

    The end of the file's name says its format (docs/formats.md has it in full):

    JSONL, Parquet: one row per entry
      key               list of hidden_size numbers: the router input
      value             list of num_experts numbers (logit_delta memories), or
      logits            list of num_experts numbers (logits memories), or
      experts, weights  two lists of top_k numbers (assignment memories)
      layer             MoE layer, counted from 0 (or --layer)
      id                below 2^63; when left out, it is made from source, example and
                        position, so that the same entry always has the same id
      source, example, position, token, gain, created_unix_ms, snippet, token_start, token_end   optional
    safetensors: tensors per layer N
      layers.N.keys     [n, hidden_size]; f32, f16 or bf16
      layers.N.values   [n, num_experts], layers.N.logits, likewise, or layers.N.experts
                        and layers.N.weights
      layers.N.ids      optional; metadata layers.N.provenance: JSON lists by field

    Batches are acknowledged one by one; after an error, those acknowledged are in the memory.

    Example:
      router-admin upsert bible bible.parquet
      router-admin upsert bible layer15.jsonl --layer 15 --fsync

    """
    session, started = session_of(context), time.monotonic()
    format_of(file)  # before the service is asked for anything
    target = ServiceEndpoint(session.client, fsync=fsync).entries(name)
    source = open_reader(file, EntryShape.of(target.record), layer)
    copy = Copy(source, target, [] if layer is None else [layer])
    _write_file(session, copy, source, "writing")
    if not copy.written:
        raise BadInput(f"{file}: no entries" + (f" of layer {layer}" if layer is not None else ""))
    document = {"memory": name, "file": str(file), **_written(copy, fsync, started)}
    line = f"wrote {copy.written} entries to {len(document['layers'])} layer(s) of {name}"
    session.output.line(document, line)


def count(
    context: typer.Context,
    name: MemoryName,
    layer: Annotated[
        int | None, typer.Option(min=0, help="Only this layer, counted from 0, e.g. 15.")
    ] = None,
) -> None:
    """Count a memory's entries, exactly.

    Example:
      router-admin count bible
      router-admin --json count bible --layer 15

    """
    session = session_of(context)
    request = pb.CountRequest(memory=name, layer=layer)
    reply = session.client.unary(session.client.admin.Count, request, repeat=True)
    rows: list[list[object]] = [[item.layer, item.entries] for item in reply.layers]
    rows.append(["total", reply.total])
    session.output.table(plain(reply), ("layer", "entries"), rows)


@copy_errors()
def export(
    context: typer.Context,
    name: MemoryName,
    file: Annotated[Path, _file("File to make: FILE.parquet, FILE.safetensors or FILE.jsonl.")],
    layer: OnlyLayers = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace FILE when it is there, e.g. --force.")
    ] = False,
) -> None:
    """Copy a memory's entries to a file, in a format that `import` and `upsert` read.

    Parquet and safetensors files also say which model and settings the memory has, so that `import`
    needs nothing else. Entries are written as they come: a memory may be larger than RAM. A safetensors
    file takes twice its size on disk until it is whole. Keys of cosine memories are stored, and so
    exported, with length 1.

    Example:
      router-admin export bible bible.parquet
      router-admin export bible layer15.safetensors --layer 15

    """
    session = session_of(context)
    format_of(file)
    if file.exists() and not force:
        raise BadInput(f"{file}: already there; pass --force to replace it")
    source = ServiceEndpoint(session.client).entries(name)
    record = source.record
    layers = sorted(set(layer or range(record.fingerprint.num_layers)))
    with new_file(file, EntryShape.of(record), _description(record)) as sink:
        copy = Copy(source, sink, layers)
        copy.run(session.output.progress, "reading")
    document = {
        "memory": name,
        "file": str(file),
        "format": format_of(file).value,
        "entries": copy.written,
        "layers": [{"layer": n, "entries": copy.counts[n].added} for n in layers],
    }
    line = f"wrote {copy.written} entries of {len(layers)} layer(s) to {file}"
    session.output.line(document, line)


@copy_errors()
def import_memory(
    context: typer.Context,
    file: Annotated[
        Path, _file("What `export` wrote: FILE.parquet, FILE.safetensors or FILE.jsonl.")
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
            autocompletion=complete_memory,
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
    fsync: Annotated[bool, _fsync(", e.g. import bible.parquet")] = False,
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
    endpoint = ServiceEndpoint(session.client, fsync=fsync)
    if into is not None:
        name, model = into, endpoint.entries(into).record
        there: MemoryRecord | None = model
    elif described is not None:
        name, model = described.name if as_name is None else as_name, described
        there = endpoint.find(name)
    else:
        raise BadInput(
            f"{file}: does not say which model it is for; pass --into NAME, or --as NAME --fingerprint FILE.json "
            "(from: router-admin --json memory show NAME > FILE.json)"
        )
    if there is not None and described is not None:
        require_same_entries(f"file {file}", described, f"memory {name}", there)
    source = open_reader(file, EntryShape.of(model))  # checked before anything is made
    if there is None:
        endpoint.create(name, model.fingerprint, model.settings)
    elif into is None:
        _require_same_settings(f"file {file}", model, f"memory {name}", there)
        _require_nothing_else(session, source, endpoint.entries(name))
    copy = Copy(source, endpoint.entries(name))
    _write_file(session, copy, source, "importing")
    document = {
        "memory": name,
        "file": str(file),
        "made": there is None,
        **_written(copy, fsync, started),
    }
    verb = "made" if there is None else "filled"
    session.output.line(document, f"{verb} memory {name}: {copy.written} entries from {file}")


@copy_errors()
def merge(
    context: typer.Context,
    from_name: Annotated[
        str,
        typer.Argument(
            metavar="FROM",
            help="Memory that is read and stays, e.g. psalms.",
            show_default=False,
            autocompletion=complete_memory,
        ),
    ],
    into_name: Annotated[
        str,
        typer.Argument(
            metavar="INTO",
            help="Memory that is written to, e.g. bible.",
            show_default=False,
            autocompletion=complete_memory,
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
    fsync: Annotated[bool, _fsync(", e.g. merge psalms bible")] = False,
) -> None:
    """Add the entries of one memory to another of the same model, kind and similarity.

    An id that both have for another text (source, example or token) is said, with one example.

    INTO keeps its settings; the bandwidths that fitted its entries may not fit the new ones, so
    calibrate it afterwards, and optimize it to index them. Merging again adds nothing, and finishes a
    merge that was cut short. Before and after it, lookups must find a sample of INTO's own keys.

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
        source = ServiceEndpoint(from_client).entries(from_name)
        target = ServiceEndpoint(client, fsync=fsync).entries(into_name)
        require_same_entries(
            f"memory {from_name}", source.record, f"memory {into_name}", target.record
        )
        if unfound := target.unfound():
            raise AdminError(f"{unfound} (nothing was written)")
        numbers = range(source.record.fingerprint.num_layers)
        layers = [layer for layer in numbers if source.state(layer).entries]
        policy = copying.OtherTexts(_POLICIES[on_conflict])
        copy = Copy(source, target, layers, policy)
        try:
            copy.run(session.output.progress, "merging")
        except ServiceError as error:
            raise _with_remark(error, " (merging again goes on where this ended)") from error
        if unfound := target.unfound():
            raise AdminError(
                f"{unfound} ({copy.written} entries of {from_name} were written to {into_name}, and stay)"
            )
    columns = ("added", "replaced", "kept")
    rows = [
        {"layer": layer, **{name: getattr(copy.counts[layer], name) for name in columns}}
        for layer in layers
    ]
    document = {
        "from": from_name,
        "into": into_name,
        "on_conflict": on_conflict.value,
        **{name: sum(row[name] for row in rows) for name in columns},
        "other_text": policy.entries,
        "layers": rows,
        "elapsed_s": round(time.monotonic() - started, 3),
    }
    title = f"{from_name} into {into_name}"
    session.output.table(document, ("layer", *columns), rows, title)
    if policy.entries:
        session.output.remark(
            f"{policy.entries} entries of {from_name} have the id of another text's in {into_name}, where one of each "
            f"pair is now, as --on-conflict says; e.g. {policy.example}"
        )
    if copy.written:
        session.output.remark(
            f"next: router-admin calibrate {into_name}; router-admin optimize {into_name}"
        )


def _with_remark(error: ServiceError, remark: str) -> AdminError:
    """The error, and what became of the copy; a service that is gone says enough itself."""
    shown = admin_error(error)
    return shown if isinstance(shown, Unreachable) else AdminError(f"{shown}{remark}")


def _write_file(session: Session, copy: Copy, source: EntryReader, label: str) -> None:
    """Raises AdminError that names the file and, where it is known, the row."""
    try:
        copy.run(session.output.progress, label)
    except FileError as error:
        raise BadInput(f"{error}{_so_far(copy)}") from error
    except ServiceError as error:
        found = _ROW_OF_FIELD.match(error.metadata.get("field", ""))
        if not found or not copy.waiting:
            raise _with_remark(error, _so_far(copy)) from error
        # The service's answer is to the oldest batch on its way.
        batch, row = copy.waiting[0][0], int(found[1])
        place = source.place(batch.layer, batch.rows[row])
        raise BadInput(f"{source.path}: {place}: {error.message}{_so_far(copy)}") from error


def _so_far(copy: Copy) -> str:
    if not copy.written:
        return ""
    return f" ({copy.written} entries were acknowledged before; writing them again replaces them)"


def _written(copy: Copy, fsync: bool, started: float) -> dict[str, Any]:
    return {
        "entries": copy.written,
        "layers": [{"layer": n, "entries": copy.counts[n].added} for n in sorted(copy.counts)],
        "durability": "fsync" if fsync else "process",
        "elapsed_s": round(time.monotonic() - started, 3),
    }


def _require_nothing_else(session: Session, source: EntryReader, target: ServiceEntries) -> None:
    """Raises BadInput unless every entry of the memory has an id of the file: then it is what an import left."""
    name, others = target.record.name, target.total(range(target.record.fingerprint.num_layers))
    with session.output.progress("comparing", source.entries) as advance:
        for batch in source.batches():
            others -= target.count(batch.layer, batch.entries.ids)
            advance(len(batch))
    if others > 0:
        raise BadInput(
            f"memory {name} is there already and holds {others} entries that {source.path} does not have; "
            f"pass --into {name} to add to it, or --as NAME to make another"
        )


def _description(record: MemoryRecord) -> dict[str, str]:
    """What goes into the metadata of a memory's file: the memory that its entries were made for."""
    document = {
        "format": _FORMAT,
        "memory": record.name,
        "fingerprint": plain(codec.encode_fingerprint(record.fingerprint)),
        "settings": _settings(record),
    }
    return {_KEY: json.dumps(document)}


def _described(file: Path, fingerprint: Path | None) -> MemoryRecord | None:
    """The memory that a file was made of, as it or --fingerprint says; its name is empty when nothing says it."""
    text = read_metadata(file).get(_KEY)
    if fingerprint is None:
        return None if text is None else _parsed(f"{file}: metadata {_KEY}", text)
    if text is not None:
        _parsed(f"{file}: metadata {_KEY}", text)
        raise BadInput(f"{file}: says its model and settings itself; leave --fingerprint out")
    try:
        return _parsed(f"--fingerprint: {fingerprint}", fingerprint.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--fingerprint: {fingerprint}: {error}") from error


def _parsed(place: str, text: str) -> MemoryRecord:
    try:
        document = json.loads(text)
        if not isinstance(document, dict):
            raise ValueError("expected an object")
        if document.get("format", _FORMAT) != _FORMAT:
            raise ValueError(f"format {document['format']!r}, this version reads {_FORMAT}")
        return _record(document)
    except (ValueError, RecursionError, InvalidRequest) as error:
        raise BadInput(f"{place}: {error}") from error


def _record(document: dict[str, Any]) -> MemoryRecord:
    missing = [name for name in ("fingerprint", "settings") if name not in document]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing, expected what `memory show` prints")
    fingerprint, settings = types_pb.ModelFingerprint(), types_pb.MemorySettings()
    parse_plain(document["fingerprint"], fingerprint)
    parse_plain(document["settings"], settings)
    if not (settings.kind and settings.similarity):
        raise ValueError("settings: kind or similarity missing")
    return MemoryRecord(
        str(document.get("memory", document.get("name", ""))),
        codec.decode_fingerprint(fingerprint),
        codec.decode_settings(settings),
        created_unix_ms=0,
    )


def require_same_entries(left: str, one: MemoryRecord, right: str, other: MemoryRecord) -> None:
    """Raises BadInput that names each difference; `left` and `right` say what the two are."""
    models = asdict(one.fingerprint), asdict(other.fingerprint)
    if model := _differences(left, models[0], right, models[1]):
        raise BadInput(
            f"{left} and {right} are of different models ({model}); entries help only the model that they were made for"
        )
    fixed_of = {name: _settings(one)[name] for name in ("kind", "similarity")}
    if fixed := _differences(left, fixed_of, right, _settings(other)):
        raise BadInput(f"{left} and {right} hold different entries ({fixed}); see: memory show")


def _require_same_settings(left: str, one: MemoryRecord, right: str, other: MemoryRecord) -> None:
    if differing := _differences(left, _settings(one), right, _settings(other)):
        raise BadInput(
            f"{right} is there already, with other settings ({differing}); pass --into to add to it, or --as NAME"
        )


def _settings(record: MemoryRecord) -> dict[str, Any]:
    return plain(codec.encode_settings(record.settings))


def _differences(left: str, one: dict[str, Any], right: str, other: dict[str, Any]) -> str:
    return "; ".join(
        f"{name}: {left} {shorten(value)}, {right} {shorten(other[name])}"
        for name, value in one.items()
        if value != other[name]
    )

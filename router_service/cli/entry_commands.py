"""`router-admin upsert`, `count` and `export`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from knnmoe.v1 import memory_admin_pb2 as pb

from router_service.cli.entry_files import FileError, format_of, open_reader
from router_service.cli.entry_transfer import Upload, download, shape_of
from router_service.cli.errors import BadInput
from router_service.cli.options import MemoryName
from router_service.cli.output import plain, table
from router_service.cli.session import session_of


def upsert(
    context: typer.Context,
    name: MemoryName,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Entries to write: FILE.jsonl, FILE.parquet or FILE.safetensors.",
            show_default=False,
        ),
    ],
    layer: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Write only this layer's entries; rows that name no layer are of it, e.g. 15.",
        ),
    ] = None,
    fsync: Annotated[
        bool,
        typer.Option(
            "--fsync",
            help="Acknowledge a batch when it would survive loss of power, not only of the service, "
            "e.g. upsert bible bible.parquet --fsync.",
        ),
    ] = False,
) -> None:
    """Write entries into a memory. An entry whose id is already there is replaced.

    The end of the file's name says its format (docs/formats.md has it in full):

    JSONL, Parquet: one row per entry
      key               list of hidden_size numbers: the router input
      value             list of num_experts numbers (logit_delta memories), or
      experts, weights  two lists of top_k numbers (assignment memories)
      layer             MoE layer, counted from 0 (or --layer)
      id                below 2^63; when left out, it is made from source, example and
                        position, so that the same entry always has the same id
      source, example, position, token, gain, created_unix_ms   optional
    safetensors: tensors per layer N
      layers.N.keys     [n, hidden_size]; f32, f16 or bf16
      layers.N.values   [n, num_experts], or layers.N.experts and layers.N.weights
      layers.N.ids      optional; metadata layers.N.provenance: JSON lists by field

    Batches are acknowledged one by one; after an error, those acknowledged are in the memory.

    Example:
      router-admin upsert bible bible.parquet
      router-admin upsert bible layer15.jsonl --layer 15 --fsync

    """
    session = session_of(context)
    format_of_file(file)
    memory = session.client.memory(name)
    started = time.monotonic()
    try:
        reader = open_reader(file, shape_of(memory), layer)
    except FileError as error:
        raise BadInput(str(error)) from error
    upload = Upload(session.client, memory, reader, fsync)
    with session.output.progress("writing", reader.total) as advance:
        upload.run(layer, advance)
    if not upload.written:
        raise BadInput(f"{file}: no entries" + (f" of layer {layer}" if layer is not None else ""))
    document = {
        "memory": name,
        "file": str(file),
        "entries": upload.written.total(),
        "layers": [{"layer": n, "entries": upload.written[n]} for n in sorted(upload.written)],
        "durability": "fsync" if fsync else "process",
        "elapsed_s": round(time.monotonic() - started, 3),
    }
    line = f"wrote {document['entries']} entries to {len(upload.written)} layer(s) of {name}"
    session.output.emit(document, lambda console: console.print(line))


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
    reply = session.client.unary(session.client.admin.Count, request)
    rows: list[list[object]] = [[item.layer, item.entries] for item in reply.layers]
    rows.append(["total", reply.total])
    session.output.emit(
        plain(reply), lambda console: console.print(table(("layer", "entries"), rows))
    )


def export(
    context: typer.Context,
    name: MemoryName,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="File to make: FILE.parquet, FILE.safetensors or FILE.jsonl.",
            show_default=False,
        ),
    ],
    layer: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="Only this layer; repeat it for more (--layer 14 --layer 15). All when not given.",
        ),
    ] = None,
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
    format_of_file(file)
    if file.exists() and not force:
        raise BadInput(f"{file}: already there; pass --force to replace it")
    memory = session.client.memory(name)
    entries_of = {item.layer: item.entries for item in memory.layers}
    layers = sorted(set(layer or entries_of))
    with session.output.progress("reading", sum(entries_of.get(n, 0) for n in layers)) as advance:
        counts = download(session.client, memory, layers, file, advance)
    document = {
        "memory": name,
        "file": str(file),
        "format": format_of(file).value,
        "entries": sum(counts.values()),
        "layers": [{"layer": n, "entries": counts[n]} for n in layers],
    }
    line = f"wrote {document['entries']} entries of {len(layers)} layer(s) to {file}"
    session.output.emit(document, lambda console: console.print(line, soft_wrap=True))


def format_of_file(file: Path) -> None:
    """Refuses a file name that says no format before the service is asked for anything. Raises BadInput."""
    try:
        format_of(file)
    except FileError as error:
        raise BadInput(str(error)) from error

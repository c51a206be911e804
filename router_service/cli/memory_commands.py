"""`router-admin memory`: list, show, create, set, delete, replace."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf import json_format
from google.protobuf.message import Message
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1 import routing_pb2 as routing_pb
from knnmoe.v1 import types_pb2 as types_pb
from rich.console import Console

from router_service.blending import Support
from router_service.cli.errors import BadInput
from router_service.cli.options import AdminTyper, MemoryName, Yes, complete_memory
from router_service.cli.output import Session, confirm, plain, session_of, table, utc
from router_service.memories.settings import Kind, Similarity

app = AdminTyper("Make, look at, change and remove memories.")


class Preset(StrEnum):
    """The presets of settings."""

    PAPER = "paper"
    PAPER_V2 = "paper-v2"
    RECOMMENDED = "recommended"
    BOOSTED = "boosted"


Neighbours = Annotated[
    int | None, typer.Option(help="K, the entries read per token, 1 to 1024, e.g. 32.")
]
Gamma = Annotated[
    list[float] | None,
    typer.Option(
        help="RBF bandwidth: once for every layer (--gamma 0.5), or repeated, one per MoE layer. "
        "`calibrate` measures it."
    ),
]
StepSize = Annotated[
    list[float] | None,
    typer.Option(
        help="Step size eta of a logit_delta memory: once for every layer (--step-size 2.25), or "
        "repeated, one per MoE layer."
    ),
]
NullWeight = Annotated[
    float | None,
    typer.Option(
        help="s0, the weight of the null neighbour that shrinks a logit_delta memory's answer, e.g. 0.5."
    ),
]
MinLambda = Annotated[
    float | None,
    typer.Option(help="A token whose lambda is not above this keeps its own routing, e.g. 0.05."),
]
SupportFlag = Annotated[
    Support | None,
    typer.Option(
        help="Experts of a blended assignment: union (model's and neighbours'), or top_k of them, "
        "e.g. --support top_k."
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        help="MoE layers that the memory speaks for, counted from 0, e.g. 0,2,11-15; list all to undo."
    ),
]
HnswEf = Annotated[
    int | None,
    typer.Option(
        help="Candidates of an indexed search, 4 K at least: more finds better neighbours, e.g. 128."
    ),
]
Oversampling = Annotated[
    float | None,
    typer.Option(
        help="How many times K candidates a quantized search rescores with the stored keys, e.g. 2."
    ),
]


@app.command("list")
def list_memories(context: typer.Context) -> None:
    """List the memories that the service holds.

    Example:
      router-admin memory list

    """
    session = session_of(context)
    reply = session.client.unary(session.client.admin.ListMemories, pb.ListMemoriesRequest())
    columns = (
        "name",
        "model",
        "kind",
        "similarity",
        "K",
        "layers",
        "entries",
        "indexed",
        "created",
    )
    session.output.table(plain(reply), columns, [_summary(memory) for memory in reply.memories])


@app.command("show")
def show(context: typer.Context, name: MemoryName) -> None:
    """Show a memory: the model it was made for, its settings, and the entries of each layer.

    Example:
      router-admin memory show bible
      router-admin --json memory show bible > bible.json

    """
    session = session_of(context)
    _emit(session, session.client.describe(name))


@app.command("create")
def create(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Name of the new memory: letters, digits, '.', '_' and '-', e.g. bible.",
            show_default=False,
        ),
    ],
    fingerprint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="The model's fingerprint, in place of the six flags that follow: a JSON object of the same "
            "names, or what `router-admin --json memory show` printed, e.g. olmoe.json.",
        ),
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="The model's type in transformers, e.g. olmoe.")
    ] = None,
    num_layers: Annotated[int | None, typer.Option(help="Number of MoE layers, e.g. 16.")] = None,
    hidden_size: Annotated[
        int | None, typer.Option(help="Width of the router input, e.g. 2048.")
    ] = None,
    num_experts: Annotated[int | None, typer.Option(help="Experts per layer, e.g. 64.")] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Experts that a token is sent to, e.g. 8.")
    ] = None,
    router_hash: Annotated[
        str | None,
        typer.Option(help="sha256 (hex) over the router weights, e.g. as model-runner prints it."),
    ] = None,
    preset: Annotated[
        Preset | None,
        typer.Option(
            help="Settings to start from: recommended (logit deltas, K = 32; the default), boosted (the same with "
            "null weight 4), paper (assignments, K = 1) or paper-v2 (logits, K = 1), e.g. --preset paper."
        ),
    ] = None,
    kind: Annotated[
        Kind | None,
        typer.Option(help="What the entries' values are; fixed from here on, e.g. assignment."),
    ] = None,
    similarity: Annotated[
        Similarity | None, typer.Option(help="The kernel; fixed from here on, e.g. rbf.")
    ] = None,
    neighbours: Neighbours = None,
    gamma: Gamma = None,
    step_size: StepSize = None,
    null_weight: NullWeight = None,
    min_lambda: MinLambda = None,
    support: SupportFlag = None,
    layers: Layers = None,
    hnsw_ef: HnswEf = None,
    oversampling: Oversampling = None,
) -> None:
    """Create an empty memory for one model.

    The memory answers only that model: every field of the fingerprint is compared. Settings that are
    not given come from the preset.

    Example:
      router-admin memory create bible --fingerprint olmoe.json --layers 11-15
      router-admin memory create bible --architecture olmoe --num-layers 16
        --hidden-size 2048 --num-experts 64 --top-k 8 --router-hash 9f2c... --preset paper

    """
    given = locals()
    session = session_of(context)
    request = pb.CreateMemoryRequest(
        name=name,
        fingerprint=_fingerprint_message(given, fingerprint),
        settings=_settings_message(given),
    )
    _emit(session, session.client.unary(session.client.admin.CreateMemory, request).memory)


@app.command("set")
def set_settings(
    context: typer.Context,
    name: MemoryName,
    neighbours: Neighbours = None,
    gamma: Gamma = None,
    step_size: StepSize = None,
    null_weight: NullWeight = None,
    min_lambda: MinLambda = None,
    support: SupportFlag = None,
    layers: Layers = None,
    hnsw_ef: HnswEf = None,
    oversampling: Oversampling = None,
) -> None:
    """Change how a memory is read, from the next lookup on.

    What is not given stays. Kind and similarity are fixed at creation.

    Example:
      router-admin memory set bible --neighbours 8 --null-weight 1

    """
    settings = _settings_message(locals())
    if not settings.ListFields():
        raise BadInput("nothing to set; give at least one option, e.g. --neighbours 8")
    session = session_of(context)
    request = pb.UpdateSettingsRequest(memory=name, settings=settings)
    _emit(
        session,
        session.client.unary(session.client.admin.UpdateSettings, request, repeat=True).memory,
    )


@app.command("delete")
def delete(context: typer.Context, name: MemoryName, yes: Yes = False) -> None:
    """Delete a memory and all its entries. Asks first.

    Example:
      router-admin memory delete bible
      router-admin memory delete bible --yes

    """
    session = session_of(context)
    if not yes:
        confirm("delete", lambda: f"{_deletion(session, name)}?")
    request = pb.DeleteMemoryRequest(memory=name)
    entries = session.client.unary(session.client.admin.DeleteMemory, request, long=True).entries
    document = {"deleted": name, "entries": entries}
    session.output.line(document, f"deleted {name} ({entries} entries)")


@app.command("replace")
def replace(
    context: typer.Context,
    name: MemoryName,
    by: Annotated[
        str,
        typer.Option(
            metavar="OTHER",
            help="Memory that is swapped in, e.g. law-2.",
            show_default=False,
            autocompletion=complete_memory,
        ),
    ],
    yes: Yes = False,
) -> None:
    """Swap a rebuilt memory in for another, from one lookup to the next. Asks first.

    NAME has the entries, settings and hit counts of OTHER then, whose name is gone; the entries that NAME
    had are removed. Both must be of the same model and kind.

    Example:
      router-admin memory replace law --by law-2
      router-admin memory replace law --by law-2 --yes

    """
    session = session_of(context)
    if not yes:
        confirm("replace", lambda: f"{_deletion(session, name)}, and name {by} {name}?")
    request = pb.ReplaceMemoryRequest(memory=name, by=by)
    reply = session.client.unary(session.client.admin.ReplaceMemory, request, long=True)
    entries = sum(layer.entries for layer in reply.memory.layers)
    document = {"memory": name, "by": by, "entries": entries, "removed": reply.removed}
    line = f"{by} is {name} now ({entries} entries; {reply.removed} removed)"
    session.output.line(document, line)


def _settings_message(flags: Mapping[str, Any]) -> types_pb.MemorySettings:
    """The settings that are given among `flags`. Raises BadInput."""
    given = _given(flags, types_pb.MemorySettings)
    if "layers" in given:
        given["layers"] = _parse_layers(given["layers"])
    for name, prefix in (
        ("kind", "MEMORY_KIND"),
        ("similarity", "SIMILARITY"),
        ("support", "SUPPORT"),
    ):
        if name in given:
            given[name] = f"{prefix}_{given[name].value.upper()}"
    try:
        return types_pb.MemorySettings(**given)
    except ValueError as error:
        raise BadInput(f"settings: {error}; whole numbers must be 0 or more") from error


def _given(flags: Mapping[str, Any], message: type[Message]) -> dict[str, Any]:
    """Of a command's parameters those that are fields of the message, and not None."""
    names = [field.name for field in message.DESCRIPTOR.fields]
    return {name: flags[name] for name in names if flags.get(name) is not None}


def _parse_layers(text: str) -> list[int]:
    """`0,2,11-15` as numbers. Raises BadInput."""
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        if found is None:
            raise BadInput(f"--layers: got {text!r}, expected numbers and ranges such as 0,2,11-15")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise BadInput(f"--layers: got {part.strip()!r}, expected the smaller number first")
        numbers += range(first, last + 1)
    return sorted(set(numbers))


def _fingerprint_message(flags: Mapping[str, Any], file: Path | None) -> types_pb.ModelFingerprint:
    """The fingerprint from one flag per field, or from a JSON file. Raises BadInput naming what is missing."""
    given = _given(flags, types_pb.ModelFingerprint)
    if file is not None:
        if given:
            raise BadInput("--fingerprint: give the file or the single flags, not both")
        return _fingerprint_file(file)
    names = [field.name for field in types_pb.ModelFingerprint.DESCRIPTOR.fields]
    missing = [f"--{name.replace('_', '-')}" for name in names if name not in given]
    if missing:
        raise BadInput(
            f"the model is not known: give {', '.join(missing)}, or --fingerprint FILE.json"
        )
    try:
        return types_pb.ModelFingerprint(**given)
    except ValueError as error:
        raise BadInput(f"fingerprint: {error}; counts must be 1 or more") from error


def _fingerprint_file(file: Path) -> types_pb.ModelFingerprint:
    """From the six fields, or from the `fingerprint` of what `memory show` prints with --json."""
    try:
        document = json.loads(file.read_text())
        fields = document.get("fingerprint", document) if isinstance(document, dict) else document
        message = json_format.ParseDict(fields, types_pb.ModelFingerprint())
    except OSError as error:
        raise BadInput(f"--fingerprint: {file}: {error.strerror}") from error
    except (ValueError, json_format.ParseError) as error:
        raise BadInput(f"--fingerprint: {file}: {error}") from error
    names = [field.name for field in message.DESCRIPTOR.fields]
    missing = [name for name in names if name not in fields]
    if missing:
        raise BadInput(f"--fingerprint: {file}: field {', '.join(missing)} missing")
    return message


def _deletion(session: Session, name: str) -> str:
    memory = session.client.describe(name)
    entries = sum(layer.entries for layer in memory.layers)
    return f"Delete memory {name} with {entries} entries"


def _summary(memory: routing_pb.MemoryDescription) -> list[object]:
    document = plain(memory)
    settings = document["settings"]
    return [
        memory.name,
        memory.fingerprint.architecture,
        settings["kind"],
        settings["similarity"],
        settings["neighbours"],
        memory.fingerprint.num_layers,
        sum(layer.entries for layer in memory.layers),
        sum(layer.indexed_entries for layer in memory.layers),
        utc(memory.created_unix_ms, seconds=False),
    ]


def _emit(session: Session, memory: routing_pb.MemoryDescription) -> None:
    document = plain(memory)

    def render(console: Console) -> None:
        identity = [("name", memory.name), ("created", utc(memory.created_unix_ms, seconds=False))]
        identity += [("model digest", memory.model_digest), ("version", str(memory.version))]
        console.print(table(("memory", ""), identity))
        console.print(table(("model", ""), list(document["fingerprint"].items())))
        # An empty list of layers is all of them, but of layers that are searched exactly it is none.
        settings = document["settings"] | {
            "exact_layers": document["settings"]["exact_layers"] or "none"
        }
        console.print(table(("setting", ""), list(settings.items())))
        columns = ("layer", "entries", "indexed_entries", "quantization")
        console.print(table(columns, document["layers"]))

    session.output.emit(document, render)

"""`router-admin memory`: list, show, create, set, delete, replace."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1 import routing_pb2 as routing_pb
from rich.console import Console

from router_service.cli import options as options
from router_service.cli.errors import BadInput
from router_service.cli.help_text import ExampleCommand
from router_service.cli.output import confirm, plain, table
from router_service.cli.session import Session, session_of

app = typer.Typer(
    help="Make, look at, change and remove memories.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("list", cls=ExampleCommand)
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
    rows = [_summary(memory) for memory in reply.memories]
    session.output.emit(plain(reply), lambda console: console.print(table(columns, rows)))


@app.command("show", cls=ExampleCommand)
def show(context: typer.Context, name: options.MemoryName) -> None:
    """Show a memory: the model it was made for, its settings, and the entries of each layer.

    Example:
      router-admin memory show bible
      router-admin --json memory show bible > bible.json

    """
    session = session_of(context)
    _emit(session, session.client.memory(name))


@app.command("create", cls=ExampleCommand)
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
        options.PresetName | None,
        typer.Option(
            help="Settings to start from: recommended (logit deltas, K = 32; the default) or paper "
            "(assignments, K = 1), e.g. --preset paper."
        ),
    ] = None,
    kind: Annotated[
        options.KindName | None,
        typer.Option(help="What the entries' values are; fixed from here on, e.g. assignment."),
    ] = None,
    similarity: Annotated[
        options.SimilarityName | None,
        typer.Option(help="The kernel; fixed from here on, e.g. rbf."),
    ] = None,
    neighbours: options.Neighbours = None,
    gamma: options.Gamma = None,
    step_size: options.StepSize = None,
    null_weight: options.NullWeight = None,
    min_lambda: options.MinLambda = None,
    support: options.SupportFlag = None,
    layers: options.Layers = None,
    hnsw_ef: options.HnswEf = None,
    oversampling: options.Oversampling = None,
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
        fingerprint=options.fingerprint_message(_pick(given, _FINGERPRINT), fingerprint),
        settings=options.settings_message(_pick(given, (*_FIXED, *_CHANGEABLE))),
    )
    _emit(session, session.client.unary(session.client.admin.CreateMemory, request).memory)


@app.command("set", cls=ExampleCommand)
def set_settings(
    context: typer.Context,
    name: options.MemoryName,
    neighbours: options.Neighbours = None,
    gamma: options.Gamma = None,
    step_size: options.StepSize = None,
    null_weight: options.NullWeight = None,
    min_lambda: options.MinLambda = None,
    support: options.SupportFlag = None,
    layers: options.Layers = None,
    hnsw_ef: options.HnswEf = None,
    oversampling: options.Oversampling = None,
) -> None:
    """Change how a memory is read, from the next lookup on.

    What is not given stays. Kind and similarity are fixed at creation.

    Example:
      router-admin memory set bible --neighbours 8 --null-weight 1

    """
    settings = options.settings_message(_pick(locals(), _CHANGEABLE))
    if not settings.ListFields():
        raise BadInput("nothing to set; give at least one option, e.g. --neighbours 8")
    session = session_of(context)
    request = pb.UpdateSettingsRequest(memory=name, settings=settings)
    _emit(session, session.client.unary(session.client.admin.UpdateSettings, request).memory)


@app.command("delete", cls=ExampleCommand)
def delete(
    context: typer.Context,
    name: options.MemoryName,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask; needed in scripts, e.g. --yes.")
    ] = False,
) -> None:
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
    session.output.emit(
        {"deleted": name, "entries": entries},
        lambda console: console.print(f"deleted {name} ({entries} entries)"),
    )


@app.command("replace", cls=ExampleCommand)
def replace(
    context: typer.Context,
    name: options.MemoryName,
    by: Annotated[
        str,
        typer.Option(
            metavar="OTHER", help="Memory that takes its place, e.g. law-2.", show_default=False
        ),
    ],
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask; needed in scripts, e.g. --yes.")
    ] = False,
) -> None:
    """Let a rebuilt memory take the place of another, from one lookup to the next. Asks first.

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
    session.output.emit(
        {"memory": name, "by": by, "entries": entries, "removed": reply.removed},
        lambda console: console.print(
            f"{by} is {name} now ({entries} entries; {reply.removed} removed)"
        ),
    )


_FINGERPRINT = ("architecture", "num_layers", "hidden_size", "num_experts", "top_k", "router_hash")
_FIXED = ("preset", "kind", "similarity")
_CHANGEABLE = (
    "neighbours",
    "gamma",
    "step_size",
    "null_weight",
    "min_lambda",
    "support",
    "layers",
    "hnsw_ef",
    "oversampling",
)


def _pick(given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: given[name] for name in names}


def _deletion(session: Session, name: str) -> str:
    memory = session.client.memory(name)
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
        _date(memory.created_unix_ms),
    ]


def _emit(session: Session, memory: routing_pb.MemoryDescription) -> None:
    document = plain(memory)

    def render(console: Console) -> None:
        identity = [("name", memory.name), ("created", _date(memory.created_unix_ms))]
        identity += [("model digest", memory.model_digest), ("version", str(memory.version))]
        console.print(table(("memory", ""), identity))
        console.print(table(("model", ""), list(document["fingerprint"].items())))
        console.print(table(("setting", ""), list(document["settings"].items())))
        columns = ("layer", "entries", "indexed_entries", "quantization")
        rows = [[layer[column] for column in columns] for layer in document["layers"]]
        console.print(table(columns, rows))

    session.output.emit(document, render)


def _date(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")

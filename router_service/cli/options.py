"""What modules of commands share: help with examples, the most common options, and those of a Qdrant server."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic_settings import BaseSettings
from typer.core import TyperCommand, TyperGroup

from router_service.backends.qdrant_server.options import WriteOrdering
from router_service.cli.errors import BadInput
from router_service.settings import QdrantSettings


class _Examples:
    """Marks the paragraphs of a help with indented lines: a backspace on a line of its own stops re-wrapping."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        paragraphs = (kwargs.get("help") or "").split("\n\n")
        marked = [f"\b\n{text}" if "\n  " in text else text for text in paragraphs]
        super().__init__(*args, **kwargs | {"help": "\n\n".join(marked)})


class ExampleCommand(_Examples, TyperCommand):
    """A command whose docstring shows examples."""


class ExampleGroup(_Examples, TyperGroup):
    """A group whose docstring shows examples."""


def command_group(help_text: str) -> typer.Typer:
    """A group of commands such as `router-admin memory`."""
    return typer.Typer(help=help_text, no_args_is_help=True, rich_markup_mode=None)


MemoryName = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the memory, e.g. bible.", show_default=False)
]

OnlyLayers = Annotated[
    list[int] | None,
    typer.Option(
        min=0,
        help="Only this layer; repeat it for more (--layer 14 --layer 15). All when not given.",
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask; needed in scripts, e.g. --yes.")]


def setting_help(settings: type[BaseSettings], name: str, prefix: str = "") -> str:
    """A setting's description, with its environment variable and its default."""
    field = settings.model_fields[name]
    default = "required" if field.is_required() else f"default: {field.get_default()}"
    return f"{field.description} [env var: ROUTER_SERVICE_{prefix}{name.upper()}; {default}]"


def environment_problem(invalid: ValidationError) -> BadInput:
    """The first setting of the environment that cannot be used."""
    problem = invalid.errors()[0]
    name = "_".join(str(part) for part in problem["loc"]).upper()
    return BadInput(f"environment: ROUTER_SERVICE_{name}: {problem['msg']}")


_PREFIX = "qdrant_"
_help = partial(setting_help, QdrantSettings, prefix="QDRANT_")

ApiKeyFile = Annotated[
    Path | None, typer.Option("--qdrant-api-key-file", help=_help("api_key_file"))
]
CaFile = Annotated[Path | None, typer.Option("--qdrant-ca-file", help=_help("ca_file"))]
Prefix = Annotated[str | None, typer.Option("--qdrant-prefix", help=_help("prefix"))]
ShardNumber = Annotated[
    int | None, typer.Option("--qdrant-shard-number", help=_help("shard_number"))
]
ReplicationFactor = Annotated[
    int | None, typer.Option("--qdrant-replication-factor", help=_help("replication_factor"))
]
WriteConsistencyFactor = Annotated[
    int | None,
    typer.Option("--qdrant-write-consistency-factor", help=_help("write_consistency_factor")),
]
OnDisk = Annotated[
    bool | None, typer.Option("--qdrant-on-disk/--no-qdrant-on-disk", help=_help("on_disk"))
]
Ordering = Annotated[
    WriteOrdering | None, typer.Option("--qdrant-write-ordering", help=_help("write_ordering"))
]
Wait = Annotated[bool | None, typer.Option("--qdrant-wait/--no-qdrant-wait", help=_help("wait"))]
Timeout = Annotated[float | None, typer.Option("--qdrant-timeout-s", help=_help("timeout_s"))]
Connections = Annotated[int | None, typer.Option("--qdrant-connections", help=_help("connections"))]


def qdrant_fields(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Of a command's parameters those named qdrant_... that were given, without that prefix."""
    return {
        name.removeprefix(_PREFIX): value
        for name, value in parameters.items()
        if name.startswith(_PREFIX) and value is not None
    }


def qdrant_settings(parameters: Mapping[str, Any]) -> QdrantSettings:
    """Of a command's parameters those named qdrant_...; what is None comes from the environment. Raises BadInput.

    A write is acknowledged when it can be read, whatever the environment says: what was written is read again.
    """
    try:
        return QdrantSettings(**qdrant_fields(parameters) | {"wait": True})
    except ValidationError as error:
        problem = error.errors()[0]
        flag = "-".join(str(part) for part in problem["loc"]).replace("_", "-")
        raise BadInput(f"--qdrant-{flag}: {problem['msg']}") from error

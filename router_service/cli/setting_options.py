"""What `serve` and `migrate` share: the options of a Qdrant server, and what is said of a setting."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic_settings import BaseSettings

from router_service.backends.qdrant_server.options import WriteOrdering
from router_service.cli.errors import BadInput
from router_service.settings import QdrantSettings


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

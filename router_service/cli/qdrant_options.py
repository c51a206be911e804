"""The flags that say how to use a Qdrant server, of every command that has them, and their environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from router_service.backends.qdrant_server.options import WriteOrdering
from router_service.cli.admin_errors import BadInput
from router_service.settings import QdrantSettings

_PREFIX = "qdrant_"


def _help(name: str) -> str:
    """The setting's description, with its default and its environment variable."""
    field = QdrantSettings.model_fields[name]
    variable = f"ROUTER_SERVICE_QDRANT_{name.upper()}"
    return f"{field.description} [env var: {variable}; default: {field.get_default()}]"


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
    bool | None,
    typer.Option("--qdrant-on-disk/--no-qdrant-on-disk", help=_help("on_disk")),
]
Ordering = Annotated[
    WriteOrdering | None, typer.Option("--qdrant-write-ordering", help=_help("write_ordering"))
]
Wait = Annotated[bool | None, typer.Option("--qdrant-wait/--no-qdrant-wait", help=_help("wait"))]
Timeout = Annotated[float | None, typer.Option("--qdrant-timeout-s", help=_help("timeout_s"))]
Connections = Annotated[int | None, typer.Option("--qdrant-connections", help=_help("connections"))]
RestPort = Annotated[int | None, typer.Option("--qdrant-rest-port", help=_help("rest_port"))]


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

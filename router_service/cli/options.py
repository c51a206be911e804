"""Options that several commands of `router-admin` share, and the messages they make."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf import json_format
from knnmoe.v1 import types_pb2 as types_pb
from pydantic import ValidationError

from router_service.backends.qdrant_server.options import WriteOrdering
from router_service.cli.errors import BadInput
from router_service.settings import QdrantSettings

MemoryName = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the memory, e.g. bible.", show_default=False)
]


class KindName(StrEnum):
    """MemoryKind, as a flag."""

    ASSIGNMENT = "assignment"
    LOGIT_DELTA = "logit_delta"


class SimilarityName(StrEnum):
    """Similarity, as a flag."""

    RBF = "rbf"
    COSINE = "cosine"


class SupportName(StrEnum):
    """Support, as a flag."""

    UNION = "union"
    TOP_K = "top_k"


class PresetName(StrEnum):
    """Presets of settings."""

    PAPER = "paper"
    RECOMMENDED = "recommended"


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
    SupportName | None,
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
    typer.Option(help="Candidates of an indexed search: more finds better neighbours, e.g. 128."),
]
Oversampling = Annotated[
    float | None,
    typer.Option(
        help="How many times K candidates a quantized search rescores with the stored keys, e.g. 2."
    ),
]


def settings_message(flags: Mapping[str, Any]) -> types_pb.MemorySettings:
    """The settings that are given among `flags` (None: not given)."""
    given = {name: value for name, value in flags.items() if value is not None}
    if "layers" in given:
        given["layers"] = parse_layers(given["layers"])
    for name, prefix in (
        ("kind", "MEMORY_KIND"),
        ("similarity", "SIMILARITY"),
        ("support", "SUPPORT"),
    ):
        if name in given:
            given[name] = f"{prefix}_{given[name].value.upper()}"
    if "preset" in given:
        given["preset"] = given["preset"].value
    try:
        return types_pb.MemorySettings(**given)
    except ValueError as error:
        raise BadInput(f"settings: {error}; whole numbers must be 0 or more") from error


def parse_layers(text: str) -> list[int]:
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


def fingerprint_message(flags: Mapping[str, Any], file: Path | None) -> types_pb.ModelFingerprint:
    """The fingerprint from one flag per field, or from a JSON file. Raises BadInput naming what is missing."""
    given = {name: value for name, value in flags.items() if value is not None}
    if file is not None:
        if given:
            raise BadInput("--fingerprint: give the file or the single flags, not both")
        return _fingerprint_file(file)
    missing = [f"--{name.replace('_', '-')}" for name in flags if name not in given]
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

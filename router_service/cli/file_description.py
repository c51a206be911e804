"""What an exported file says about itself: the memory that it came from. Kept as JSON in the file's metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knnmoe.v1 import routing_pb2 as routing_pb
from knnmoe.v1 import types_pb2 as types_pb

from router_service.cli.entry_files import FileError, read_metadata
from router_service.cli.errors import BadInput
from router_service.cli.output import parse_plain, plain

# The key in the file's metadata, and the version of what is found there.
KEY = "knnmoe"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class FileDescription:
    """The memory that a file's entries were made for; `name` is empty when nothing says it."""

    name: str
    fingerprint: types_pb.ModelFingerprint
    settings: types_pb.MemorySettings


def metadata_for(memory: routing_pb.MemoryDescription) -> dict[str, str]:
    """What goes into the metadata of a memory's file."""
    document = {
        "format": FORMAT,
        "memory": memory.name,
        "fingerprint": plain(memory.fingerprint),
        "settings": plain(memory.settings),
    }
    return {KEY: json.dumps(document)}


def description_of(file: Path) -> FileDescription | None:
    """What a file says about itself; None when it says nothing. Raises BadInput."""
    try:
        text = read_metadata(file).get(KEY)
    except FileError as error:
        raise BadInput(str(error)) from error
    return None if text is None else _parsed(f"{file}: metadata {KEY}", text)


def description_from(file: Path) -> FileDescription:
    """The same from what `router-admin --json memory show` printed. Raises BadInput."""
    try:
        return _parsed(f"--fingerprint: {file}", file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--fingerprint: {file}: {error}") from error


def _parsed(place: str, text: str) -> FileDescription:
    try:
        document = json.loads(text)
        if not isinstance(document, dict):
            raise ValueError("expected an object")
        if document.get("format", FORMAT) != FORMAT:
            raise ValueError(f"format {document['format']!r}, this version reads {FORMAT}")
        return _description(document)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{place}: {error}") from error


def _description(document: dict[str, Any]) -> FileDescription:
    missing = [name for name in ("fingerprint", "settings") if name not in document]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing, expected what `memory show` prints")
    fingerprint, settings = types_pb.ModelFingerprint(), types_pb.MemorySettings()
    parse_plain(document["fingerprint"], fingerprint)
    parse_plain(document["settings"], settings)
    if not (settings.kind and settings.similarity):
        raise ValueError("settings: kind or similarity missing")
    name = document.get("memory", document.get("name", ""))
    return FileDescription(str(name), fingerprint, settings)

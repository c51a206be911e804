"""The file that says what a snapshot holds: manifest.json, with a sum over itself.

`sha256` of a file is over its first `content_bytes` bytes; what follows up to `size_bytes` is zeros
(check by hand: head -c CONTENT_BYTES FILE | sha256sum).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from router_service import __version__, fingerprint
from router_service.backends.disk import Content, open_regular, write_atomically
from router_service.errors import InvalidField, NewerSnapshot, SnapshotInvalid, newer_format
from router_service.fingerprint import ModelFingerprint
from router_service.memories import settings
from router_service.memories.manifest import fields_of, is_later
from router_service.memories.memory import MemoryRecord
from router_service.memories.settings import MemorySettings, settings_from_json

FORMAT = 1
FILE_NAME = "manifest.json"
MAX_BYTES = 64 << 20
# A memory's or a snapshot's name: one safe part of a path.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

_LAYER = re.compile(r"layer-([0-9]{3,4})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DAMAGE = (OSError, ValueError, KeyError, TypeError, RecursionError, InvalidField)


@dataclass(frozen=True, slots=True)
class SnapshotManifest:
    """Everything but the files themselves. Times in milliseconds (since the epoch where they are points in time)."""

    name: str
    service_version: str
    created_unix_ms: int
    write_pause_ms: int
    record: MemoryRecord
    entries: tuple[int, ...]  # per layer
    files: Mapping[str, Content]  # by path relative to the snapshot, with '/'

    @property
    def total_bytes(self) -> int:
        """Bytes that the files hold, without the zeros that end them."""
        return sum(content.content_bytes for content in self.files.values())


def layer_directory(layer: int) -> str:
    """Where the files of a layer lie within a snapshot."""
    return f"layer-{layer:03d}"


def write_manifest(directory: Path, manifest: SnapshotManifest) -> None:
    """Raises StorageError."""
    text = to_json(manifest)
    write_atomically(directory / FILE_NAME, lambda file: file.write(text))


def read_manifest(directory: Path) -> SnapshotManifest:
    """Raises SnapshotInvalid when the file is missing, damaged, or of a newer version of the service."""
    path = directory / FILE_NAME
    try:
        with open_regular(path) as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SnapshotInvalid(
            f"{path} cannot be read ({error}); name the directory of a whole snapshot"
        ) from error
    return from_json(text, str(path))


def to_json(manifest: SnapshotManifest) -> bytes:
    """UTF-8 JSON, ending in the sum over the rest."""
    body: dict[str, Any] = {
        "format": FORMAT,
        "service_version": manifest.service_version,
        "name": manifest.name,
        "created_unix_ms": manifest.created_unix_ms,
        "write_pause_ms": manifest.write_pause_ms,
        "memory": fields_of(manifest.record),
        "layers": [{"layer": n, "entries": count} for n, count in enumerate(manifest.entries)],
        "files": [{"path": path, **asdict(content)} for path, content in manifest.files.items()],
        "total": {"entries": sum(manifest.entries), "content_bytes": manifest.total_bytes},
    }
    return json.dumps(body | {"sha256": _checksum(body)}, indent=1).encode()


def from_json(text: bytes, source: str) -> SnapshotManifest:
    """Inverse of to_json. Raises SnapshotInvalid that names `source`."""
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        body = json.loads(text)
        _require(type(body) is dict and type(body.get("format")) is int, "not a manifest")
    except _DAMAGE as error:
        raise _damaged(source, error) from error
    written_by = body.get("service_version")
    if is_later(body["format"], FORMAT):
        raise NewerSnapshot(newer_format(source, body["format"], FORMAT, written_by))
    whole = False
    try:
        stated = body.pop("sha256", None)
        _require(stated == _checksum(body), "its sha256 is not that of its content")
        whole = True
        return _manifest_of(body)
    except _DAMAGE as error:
        if whole and written_by != __version__:
            found = f"{FORMAT} with what is unknown here ({ascii(str(error))[1:300]})"
            raise NewerSnapshot(newer_format(source, found, FORMAT, written_by)) from error
        raise _damaged(source, error, written_by) from error


def _manifest_of(body: dict[str, Any]) -> SnapshotManifest:
    _require(body["format"] == FORMAT, f"format {body['format']}, this version reads {FORMAT}")
    memory = body["memory"]
    record = MemoryRecord(
        _name(memory["name"]),
        ModelFingerprint(**memory["fingerprint"]),
        settings_from_json(memory["settings"]),
        _count(memory["created_unix_ms"]),
    )
    _check_record(record)
    entries = tuple(_count(layer["entries"]) for layer in body["layers"])
    numbers = [layer["layer"] for layer in body["layers"]]
    _require(numbers == list(range(record.fingerprint.num_layers)), f"layers {numbers[:20]}")
    files = {_path(f["path"], len(entries)): _content(f) for f in body["files"]}
    _require(len(files) == len(body["files"]), "a file is listed twice")
    for number in range(len(entries)):
        _require(f"{layer_directory(number)}/CURRENT" in files, f"layer {number} has no CURRENT")
    manifest = SnapshotManifest(
        _name(body["name"]),
        str(body["service_version"]),
        _count(body["created_unix_ms"]),
        _count(body["write_pause_ms"]),
        record,
        entries,
        files,
    )
    total = {"entries": sum(entries), "content_bytes": manifest.total_bytes}
    _require(body["total"] == total, f"total {body['total']}, expected {total}")
    return manifest


def _check_record(record: MemoryRecord) -> None:
    _check_types(record.fingerprint, ModelFingerprint("", 1, 1, 1, 1, ""))
    _check_types(record.settings, MemorySettings())
    fingerprint.validate(record.fingerprint)
    settings.validate(record.settings, record.fingerprint.num_layers)


def _check_types(got: Any, example: Any) -> None:
    """JSON knows no types: 8.0 is no hidden size."""
    for field in fields(example):
        value, wanted = getattr(got, field.name), getattr(example, field.name)
        fits = type(value) is type(wanted) or (type(wanted) is float and type(value) is int)
        if type(wanted) is tuple:
            fits = all(type(item) in (int, float) for item in value)
        _require(fits, f"{field.name}: {value!r}")


def _path(path: Any, layers: int) -> str:
    """A relative path of plain parts that lies in the directory of a layer."""
    _require(type(path) is str and "\0" not in path and "\\" not in path, f"path {path!r}")
    parts = PurePosixPath(path).parts
    plain = "/".join(parts) == path and ".." not in parts and len(parts) > 1
    owner = _LAYER.fullmatch(parts[0]) if plain else None
    owned = owner is not None and int(owner[1]) < layers
    _require(owned, f"path {path!r}, expected one within a layer's directory")
    return str(path)


def _content(file: Mapping[str, Any]) -> Content:
    content = Content(_count(file["size_bytes"]), _count(file["content_bytes"]), file["sha256"])
    _require(content.content_bytes <= content.size_bytes, f"{file['path']}: more content than size")
    _require(bool(_SHA256.fullmatch(content.sha256)), f"{file['path']}: sha256 {content.sha256!r}")
    return content


def _name(name: Any) -> str:
    _require(type(name) is str and bool(NAME.fullmatch(name)), f"name {name!r}")
    return str(name)


def _count(value: Any) -> int:
    _require(
        type(value) is int and 0 <= value < 2**63, f"{value!r}, expected a number of 0 or more"
    )
    return int(value)


def _require(fits: bool, problem: str) -> None:
    if not fits:
        raise ValueError(problem)


def _checksum(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _damaged(source: str, error: Exception, version: object = "unknown") -> SnapshotInvalid:
    problem = ascii(str(error))[1:300]
    return SnapshotInvalid(
        f"{source} is damaged ({type(error).__name__}: {problem}); use another snapshot, or the version of "
        f"router-service that wrote it ({ascii(version)[:40]})"
    )

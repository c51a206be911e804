"""What a memory's directory holds.

    DATA/memories/NAME/memory.json            the manifest; replacing it is the moment of a change
    DATA/memories/NAME/CREATING               a creation that has not ended: holds nothing acknowledged
    DATA/memories/NAME/layer-LLL              the layers of a memory that was created here
    DATA/memories/NAME/restored-MS/layer-LLL  those of one that was restored; MS is its created_unix_ms in memory.json
    DATA/memories/NAME/restored-MS/CAME-FROM  while they are being swapped in: see unfinished_swaps
    .../hits-LLL.npz                          beside a layer: how often its entries were retrieved

A directory with neither manifest nor CREATING has lost its manifest and is never touched. Layers that the manifest does
not lead to are what a crash left behind, or what was replaced.
"""

from __future__ import annotations

import json
import shutil
import time
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from router_service import __version__
from router_service import fingerprint as identity
from router_service.backends.disk import (
    fsync_directory,
    remove_durably,
    remove_tree,
    storage_call,
    write_atomically,
)
from router_service.errors import CorruptMemory, InvalidField, NewerFormat, newer_format
from router_service.fingerprint import ModelFingerprint
from router_service.memories import settings as memory_settings
from router_service.memories.memory import MemoryRecord
from router_service.memories.settings import MemorySettings, settings_from_json

FORMAT = 1
FILE_NAME = "memory.json"
UNFINISHED = "CREATING"
_SINCE_0_1_0 = ("search_recall", "exact_layers", "rounds", "round_nll")


def begin_creation(directory: Path) -> None:
    """Makes the directory of a new memory, marked as unfinished. Raises StorageError, also when it is there."""
    with storage_call(f"create {directory}"):
        directory.mkdir()
        try:
            (directory / UNFINISHED).touch()
            fsync_directory(directory)
            fsync_directory(directory.parent)
        except OSError:
            shutil.rmtree(directory, ignore_errors=True)
            raise


def finish_creation(directory: Path, record: MemoryRecord) -> None:
    """Writes the first manifest; from here on the memory exists. Raises StorageError."""
    write_manifest(directory, record)
    remove_durably(directory / UNFINISHED)


def is_unfinished(directory: Path) -> bool:
    """Whether the creation of a memory ended before there was anything to keep."""
    return (directory / UNFINISHED).exists() and not (directory / FILE_NAME).exists()


def fields_of(record: MemoryRecord) -> dict[str, Any]:
    """A record as a JSON object; on disk names lead to where they always led, and are not in it.

    Settings that 0.1.0 refuses to read are there only where they say something, so that one may go back to it.
    """
    usual = MemorySettings().fields()
    settings = {
        name: value
        for name, value in record.settings.fields().items()
        if name not in _SINCE_0_1_0 or value != usual[name]
    }
    fields = asdict(record) | {"settings": settings}
    if not record.collections:
        del fields["collections"]
    return fields


def record_to_json(record: MemoryRecord) -> str:
    """A record as text, with the version that wrote it and a sum over the rest."""
    body = {"format": FORMAT, "service_version": __version__} | fields_of(record)
    return json.dumps(body | {"crc32": _sum(body)}, indent=2)


def _sum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def record_from_json(text: str, name: str, where: str) -> MemoryRecord:
    """Inverse of record_to_json. Raises CorruptMemory, that names `where`, unless it is a valid record of `name`.

    NewerFormat, which is one, where a later version has written it.
    """
    written_by = None
    try:
        body = json.loads(text)
        if is_later(body["format"], FORMAT):
            raise NewerFormat(
                newer_format(where, body["format"], FORMAT, body.get("service_version"))
            )
        written_by = _written_by(body)
        record = _record_of(body)
        identity.validate(record.fingerprint)
        memory_settings.validate(record.settings, record.fingerprint.num_layers)
    except (ValueError, KeyError, TypeError, RecursionError, InvalidField) as error:
        if written_by not in (None, __version__):
            found = f"{FORMAT} with what is unknown here ({error})"
            raise NewerFormat(newer_format(where, found, FORMAT, written_by)) from error
        raise CorruptMemory(f"{where} cannot be read ({type(error).__name__}: {error})") from error
    if record.name != name:
        raise CorruptMemory(
            f"{where} is the manifest of memory {record.name!r}, expected {name!r}; a copied memory "
            "cannot be opened under another name"
        )
    return record


def write_manifest(directory: Path, record: MemoryRecord) -> None:
    """Writes the manifest so that it is either the old or the new one after a crash. Raises StorageError."""
    text = record_to_json(record).encode()
    write_atomically(directory / FILE_NAME, lambda file: file.write(text))


def read_manifest(directory: Path) -> MemoryRecord:
    """Raises CorruptMemory on a file that is missing, of another format, or not what was written."""
    path = directory / FILE_NAME
    try:
        return record_from_json(path.read_text(), directory.name, str(path))
    except (OSError, UnicodeDecodeError) as error:
        problem = f"{path} cannot be read ({type(error).__name__}: {error})"
    except CorruptMemory as error:
        if isinstance(error, NewerFormat) or error.__cause__ is None:  # or another memory's
            raise
        problem = str(error)
    raise CorruptMemory(f"{problem}; restore it from a backup or move {directory} away")


def is_later(found: object, reads: int) -> bool:
    """Whether a format is one that a later version writes."""
    return type(found) is int and found > reads


def _written_by(body: dict[str, Any]) -> object:
    """The version that wrote a record; None: unknown. Raises ValueError when it is not what was written."""
    if body["format"] != FORMAT:
        raise ValueError(f"format {body['format']!r}, this version reads {FORMAT}")
    stated = body.pop("crc32", None)  # not in 0.1.0
    if stated is not None and stated != _sum(body):
        raise ValueError("its crc32 is not that of its content")
    return None if stated is None else body.get("service_version")


def _record_of(body: dict[str, Any]) -> MemoryRecord:
    fingerprint, settings = body["fingerprint"], body["settings"]
    if not isinstance(fingerprint, dict) or not isinstance(settings, dict):
        raise TypeError("fingerprint and settings must be objects")
    record = MemoryRecord(
        str(body["name"]),
        ModelFingerprint(**fingerprint),
        settings_from_json(settings),
        int(str(body["created_unix_ms"])),
        _collections_of(body.get("collections", [])),
    )
    if len(record.collections) not in (0, record.fingerprint.num_layers):
        raise ValueError(f"{len(record.collections)} collections, one per layer expected")
    return record


def _collections_of(names: object) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError("collections must be a list of names")
    return tuple(names)


# In layers that are moved into the place of others, until they have arrived: where they came from.
CAME_FROM = "CAME-FROM"


def restored_directory(memories: Path, record: MemoryRecord) -> Path:
    """Where the layers of a memory lie if it was restored."""
    return memories / record.name / f"restored-{record.created_unix_ms}"


def home_of(memories: Path | None, record: MemoryRecord) -> str:
    """What the names of a memory's collections begin with."""
    if memories is None or not (restored := restored_directory(memories, record)).is_dir():
        return record.name
    return f"{record.name}/{restored.name}"


def hits_file(layer: int) -> str:
    """Name of the file of a layer's hit counts, which lies beside its directory."""
    return f"hits-{layer:03d}.npz"


def stamped(memories: Path, record: MemoryRecord, present: MemoryRecord | None) -> MemoryRecord:
    """The record with a creation time of its own: now, and none that leads to layers that are there."""
    created = time.time_ns() // 1_000_000
    if present is not None:
        created = max(created, present.created_unix_ms + 1)
    record = replace(record, created_unix_ms=created)
    while restored_directory(memories, record).exists():
        record = replace(record, created_unix_ms=record.created_unix_ms + 1)
    return record


def is_stray(path: Path, restored: Path) -> bool:
    """Whether layers at `path` are nobody's: neither those in force nor in the middle of a swap."""
    return path != restored and not (path / CAME_FROM).exists()


def remove_strays(memories: Path, record: MemoryRecord) -> None:
    """Removes every layer of a memory that its manifest does not lead to; none of them may be open."""
    restored = restored_directory(memories, record)
    strays = [path for path in restored.parent.glob("restored-*") if is_stray(path, restored)]
    if restored.is_dir():
        strays += restored.parent.glob("layer-*")
        for path in restored.parent.glob("hits-*.npz"):
            remove_durably(path)
    for path in strays:
        remove_tree(path)

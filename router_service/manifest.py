"""The file that says what a memory is: DATA/memories/NAME/memory.json, replaced atomically.

A directory with the file CREATING and no manifest is a creation that never ended; it holds nothing that was
acknowledged. A directory with neither has lost its manifest and is never touched.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from router_service import identity, memory_settings
from router_service.backends.boundary import storage_call
from router_service.backends.disk import fsync_directory, remove_durably, write_atomically
from router_service.errors import CorruptMemory, InvalidField
from router_service.identity import ModelFingerprint
from router_service.memory_settings import settings_from_json
from router_service.routing_memory import MemoryRecord

FORMAT = 1
FILE_NAME = "memory.json"
UNFINISHED = "CREATING"


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


def record_to_json(record: MemoryRecord) -> str:
    """A record as text."""
    body = {
        "format": FORMAT,
        "name": record.name,
        "fingerprint": asdict(record.fingerprint),
        "settings": record.settings.fields(),
        "created_unix_ms": record.created_unix_ms,
    }
    return json.dumps(body, indent=2)


def record_from_json(text: str, name: str, where: str) -> MemoryRecord:
    """Inverse of record_to_json. Raises CorruptMemory, that names `where`, unless it is a valid record of `name`."""
    try:
        record = _record_of(json.loads(text))
        identity.validate(record.fingerprint)
        memory_settings.validate(record.settings, record.fingerprint.num_layers)
    except (ValueError, KeyError, TypeError, RecursionError, InvalidField) as error:
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
        if error.__cause__ is None:  # another memory's
            raise
        problem = str(error)
    raise CorruptMemory(f"{problem}; restore it from a backup or move {directory} away")


def _record_of(body: dict[str, object]) -> MemoryRecord:
    if body["format"] != FORMAT:
        raise ValueError(f"format {body['format']}, this version reads {FORMAT}")
    fingerprint, settings = body["fingerprint"], body["settings"]
    if not isinstance(fingerprint, dict) or not isinstance(settings, dict):
        raise TypeError("fingerprint and settings must be objects")
    return MemoryRecord(
        str(body["name"]),
        ModelFingerprint(**fingerprint),
        settings_from_json(settings),
        int(str(body["created_unix_ms"])),
    )

"""What a store of snapshots is: one keeps files of its own, another leaves them to the Qdrant server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from router_service.backends.base import Report
from router_service.memories.memory import MemoryRecord, RoutingMemory


@dataclass(frozen=True, slots=True)
class SnapshotRef:
    """The snapshot `name` of `memory`; or a directory or an archive at an absolute `path`."""

    memory: str = ""
    name: str = ""
    path: str = ""


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot in a list; `problem` says why one cannot be used, and the other fields are then empty.

    `path`: its directory, or the server that keeps it. `remark`: what is known less well, human-readable.
    """

    memory: str
    name: str
    path: Path | str
    created_unix_ms: int = 0
    write_pause_ms: int = 0
    entries: int = 0
    content_bytes: int = 0
    service_version: str = ""
    record: MemoryRecord | None = None
    problem: str = ""
    remark: str = ""


@dataclass(frozen=True, slots=True)
class PackedSnapshot:
    """A snapshot, and the archive that it was written to."""

    snapshot: SnapshotInfo
    archive: Path


class SnapshotStore(Protocol):
    """Makes snapshots of memories and memories of snapshots. Iterators yield one result at their end."""

    def create(self, memory: str, name: str, report: Report) -> Iterator[SnapshotInfo]:
        """Copies a memory; without a name, one is made of time and version.

        Raises MemoryNotFound, InvalidField, Busy or StorageError; then nothing is left behind.
        """
        ...

    def list(self, memory: str) -> list[SnapshotInfo]:
        """Those of a memory, or with an empty name of all; those that cannot be used say why."""
        ...

    def verify(self, ref: SnapshotRef, report: Report) -> Iterator[SnapshotInfo]:
        """Reads all of one. Raises SnapshotNotFound, SnapshotInvalid or StorageError."""
        ...

    def restore(
        self, ref: SnapshotRef, as_memory: str, replacing: bool, report: Report
    ) -> Iterator[RoutingMemory]:
        """Serves a copy as a memory, or in the place of one; that one serves until the copy has been checked.

        Raises SnapshotNotFound, SnapshotInvalid, MemoryExists, ModelMismatch, KindMismatch, InvalidField, Busy or
        StorageError; then nothing has changed.
        """
        ...

    def delete(self, memory: str, name: str) -> SnapshotInfo:
        """Raises SnapshotNotFound or StorageError."""
        ...


class Swept(SnapshotStore, Protocol):
    """A SnapshotStore that work which was killed may have left something in."""

    def sweep(self) -> None:
        """Removes what is left of it. Raises StorageError."""
        ...


@runtime_checkable
class Packing(Protocol):
    """A SnapshotStore whose snapshots are files that can be carried elsewhere."""

    def pack(self, memory: str, name: str, file: str, report: Report) -> Iterator[PackedSnapshot]:
        """Writes one to the new file of that name in the directory of archives, or of that path directly in it.

        Raises SnapshotNotFound, InvalidField or StorageError.
        """
        ...

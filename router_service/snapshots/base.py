"""What every place that keeps snapshots can do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from router_service.backends.base import Report
from router_service.memories.memory import RoutingMemory
from router_service.snapshots.files import SnapshotInfo


@dataclass(frozen=True, slots=True)
class SnapshotRef:
    """The snapshot `name` of `memory`; or a directory or an archive at an absolute `path`."""

    memory: str = ""
    name: str = ""
    path: str = ""


class Keeping(Protocol):
    """Makes snapshots of memories and looks after them. Iterators yield one result at their end."""

    def sweep(self) -> None:
        """Removes what work left that was killed. Raises StorageError."""
        ...

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

    def delete(self, memory: str, name: str) -> SnapshotInfo:
        """Raises SnapshotNotFound or StorageError."""
        ...


class Shelf(Keeping, Protocol):
    """Keeps snapshots and hands them out."""

    def restore(
        self, ref: SnapshotRef, as_memory: str, replacing: bool, report: Report
    ) -> Iterator[RoutingMemory]:
        """Serves a copy as a memory, or in the place of one; that one serves until the copy has been checked.

        Raises SnapshotNotFound, SnapshotInvalid, MemoryExists, ModelMismatch, KindMismatch, InvalidField, Busy or
        StorageError; then nothing has changed.
        """
        ...

    def pack(self, memory: str, name: str, archive: str, report: Report) -> Iterator[SnapshotInfo]:
        """Writes one to a new file. Raises SnapshotNotFound, InvalidField or StorageError."""
        ...

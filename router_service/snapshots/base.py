"""What is said about snapshots: which one is meant, and what there is to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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

    `path`: its directory, or the server that 0.1.0 left it on.
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


class Restored(NamedTuple):
    """A memory that was restored; `remark`: what is not as in the snapshot, human-readable."""

    memory: RoutingMemory
    remark: str = ""


@dataclass(frozen=True, slots=True)
class PackedSnapshot:
    """A snapshot, and the archive that it was written to."""

    snapshot: SnapshotInfo
    archive: Path

"""Where snapshots lie: named, listed, locked, and swept of what was never finished.

    SNAPSHOTS/MEMORY/NAME/manifest.json  what it holds, with sums
    SNAPSHOTS/MEMORY/NAME/layer-LLL/     the files of a layer, as under DATA/memories/MEMORY
    SNAPSHOTS/MEMORY/.partial-NAME       one that is being made, or was when the service was killed
    SNAPSHOTS/MEMORY/LOCK                held by whoever makes one

The names of MEMORY and NAME begin with a letter or digit: nothing else is ever listed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from router_service.backends.boundary import storage_call
from router_service.backends.disk import DirectoryLock, fsync_directory, fsync_tree, remove_tree
from router_service.errors import (
    Busy,
    DirectoryInUse,
    InvalidField,
    SnapshotInvalid,
    SnapshotNotFound,
    shorten,
)
from router_service.maintenance.snapshot_manifest import NAME, SnapshotManifest, read_manifest
from router_service.routing_memory import MemoryRecord

log = logging.getLogger(__name__)

_PARTIAL = ".partial-"
_LOCK = "LOCK"


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot in a list; `problem` says why one cannot be used, and the other fields are then empty.

    `path`: its directory, or the server that keeps it. `remark`: what is known less well, for people.
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


def list_snapshots(snapshots_dir: Path, memory_name: str | None = None) -> list[SnapshotInfo]:
    """Snapshots of one memory or of all, oldest first. Removes what was left by ones that never ended."""
    if memory_name is not None:
        require_name("memory", memory_name)
    with storage_call(f"list {snapshots_dir}"):
        found = sorted(snapshots_dir.glob(memory_name or "*"))
        homes = [path for path in found if path.is_dir() and NAME.fullmatch(path.name)]
        for home in homes:
            _sweep_unless_in_use(home)
        paths = [path for home in homes for path in home.iterdir() if path.is_dir()]
    infos = [describe(path) for path in paths if NAME.fullmatch(path.name)]
    return sorted(infos, key=lambda info: (info.memory, info.created_unix_ms, info.name))


def find(snapshots_dir: Path, memory_name: str, snapshot_name: str) -> Path:
    """The directory of a snapshot. Raises SnapshotNotFound when there is none of that name."""
    require_name("memory", memory_name)
    path = snapshots_dir / memory_name / snapshot_name
    if not NAME.fullmatch(snapshot_name) or not path.is_dir():
        have = [info.name for info in list_snapshots(snapshots_dir, memory_name)][-20:]
        known = ", ".join(have) or "none; make one first"
        raise SnapshotNotFound(
            f"snapshot {shorten(snapshot_name)} not found; memory {memory_name!r} has: {known}"
        )
    return path


def remove(path: Path) -> SnapshotInfo:
    """Removes a snapshot; after a crash all of it is there, or none of it is listed. Raises Busy or StorageError."""
    info = describe(path)
    with exclusive(path.parent) as home, storage_call(f"delete {path}"):
        doomed = home / f"{_PARTIAL}{path.name}"
        path.rename(doomed)
        fsync_directory(home)
        remove_tree(doomed)
    return info


@contextmanager
def exclusive(home: Path) -> Iterator[Path]:
    """The directory of a memory's snapshots, swept, for one maker at a time. Raises Busy."""
    with storage_call(f"open {home}"):
        home.mkdir(parents=True, exist_ok=True)
        try:
            lock = DirectoryLock(home)
        except DirectoryInUse as error:
            raise Busy(
                f"another snapshot of {home.name!r} is being made; try again when it is done"
            ) from error
    try:
        for leftover in home.glob(f"{_PARTIAL}*"):
            log.warning("removing %s: it was never finished", leftover)
            remove_tree(leftover)
        yield home
    finally:
        lock.release()


@contextmanager
def unfinished(home: Path, name: str) -> Iterator[Path]:
    """The directory of a snapshot that is not one yet: gone at the end, unless finish() made it one."""
    partial = home / f"{_PARTIAL}{name}"
    with storage_call(f"create {partial}"):
        partial.mkdir()
    try:
        yield partial
    finally:
        remove_tree(partial)


def finish(partial: Path, target: Path) -> None:
    """Makes the snapshot what it will be after loss of power, then gives it its name. Raises StorageError."""
    with storage_call(f"write {target}"):
        fsync_tree(partial)
        partial.rename(target)
        fsync_directory(target.parent)
        fsync_directory(target.parent.parent)


def _sweep_unless_in_use(home: Path) -> None:
    if any(home.glob(f"{_PARTIAL}*")):
        try:
            with exclusive(home):
                pass
        except Busy:  # then they are no leftovers
            return


def free_name(home: Path, asked: str | None, version: int) -> str:
    """The name asked for, or one of time and version. Raises InvalidField."""
    if asked is not None:
        require_name("snapshot", asked)
        if (home / asked).exists():
            raise InvalidField("snapshot", asked, "a name that no snapshot of the memory has")
        return asked
    name = base = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-v{version}"
    number = 1
    while (home / name).exists():
        number += 1
        name = f"{base}-{number}"
    return name


def require_name(field: str, name: str) -> None:
    """Raises InvalidField unless `name` is one safe part of a path."""
    if not NAME.fullmatch(name) or name == _LOCK:
        expected = "1 to 128 letters, digits, '.', '_' or '-', starting with a letter or digit"
        raise InvalidField(field, name, expected)


def info_of(path: Path, manifest: SnapshotManifest) -> SnapshotInfo:
    """What a list says about the snapshot at `path`."""
    return SnapshotInfo(
        manifest.record.name,
        path.name,
        path,
        manifest.created_unix_ms,
        manifest.write_pause_ms,
        sum(manifest.entries),
        manifest.total_bytes,
        manifest.service_version,
        manifest.record,
    )


def describe(path: Path) -> SnapshotInfo:
    """What a list says about whatever is at `path`."""
    try:
        return info_of(path, read_manifest(path))
    except SnapshotInvalid as error:
        return SnapshotInfo(path.parent.name, path.name, path, problem=str(error))

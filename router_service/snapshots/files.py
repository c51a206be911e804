"""The directories and files of snapshots: named, listed, locked, compared with the manifest, copied, and swept.

    SNAPSHOTS/MEMORY/NAME/manifest.json  what it holds, with sums
    SNAPSHOTS/MEMORY/NAME/layer-LLL/     the files of a layer, as under DATA/memories/MEMORY
    SNAPSHOTS/MEMORY/.partial-NAME       one that is being made, or was when the service was killed
    SNAPSHOTS/MEMORY/LOCK                held by whoever makes one

The names of MEMORY and NAME begin with a letter or digit: nothing else is ever listed.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from router_service.backends.disk import (
    Content,
    DirectoryLock,
    copy_file,
    fsync_directory,
    fsync_tree,
    read_content,
    remove_tree,
    storage_call,
)
from router_service.errors import (
    Busy,
    DirectoryInUse,
    InvalidField,
    SnapshotInvalid,
    SnapshotNotFound,
    StorageError,
    shorten,
)
from router_service.snapshots.base import SnapshotInfo
from router_service.snapshots.manifest import FILE_NAME, NAME, SnapshotManifest, read_manifest

log = logging.getLogger(__name__)

_PARTIAL = ".partial-"
_LOCK = "LOCK"


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
    directory = home / f"{_PARTIAL}{name}"
    with storage_call(f"create {directory}"):
        directory.mkdir()
    try:
        yield directory
    finally:
        remove_tree(directory)


def finish(made: Path, target: Path) -> None:
    """Makes the snapshot what it will be after loss of power, then gives it its name. Raises StorageError."""
    with storage_call(f"write {target}"):
        fsync_tree(made)
        made.rename(target)
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
        if asked.upper() == _LOCK:  # whether the file system tells them apart or not
            raise InvalidField("snapshot", asked, f"a name other than {_LOCK}, the service's own")
        if (home / asked).exists():
            raise InvalidField("snapshot", asked, "a name that no snapshot of the memory has")
        return asked
    return timed_name(version, lambda name: (home / name).exists())


def timed_name(version: int, taken: Callable[[str], bool]) -> str:
    """A name of time and version that is not taken."""
    name = base = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-v{version}"
    number = 1
    while taken(name):
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


# Called before each file with its path, and between the parts of a large one; what it raises ends the work.
OnFile = Callable[[str], None]

_MOST_NAMED = 20
# What a file of another directory may answer: there is none, or none that is plain, or none for us.
_NOT_THERE = (errno.ENOENT, errno.EACCES, errno.EINVAL, errno.ELOOP, errno.ENOTDIR)


def unwatched(path: str) -> None:
    """The OnFile of callers who do not watch."""


def files_of(directory: Path, below: Collection[str] | None = None) -> Iterator[str]:
    """Paths below a directory, in order, of everything that is not a directory.

    `below`: only these files and directories of it; others are not looked at, and may go away meanwhile.
    """
    with storage_call(f"list {directory}"):
        for parent, directories, names in os.walk(directory, onerror=_raise):
            if below is not None and Path(parent) == directory:
                directories[:] = [name for name in directories if name in below]
                names = [name for name in names if name in below]
            directories.sort()
            links = [name for name in directories if Path(parent, name).is_symlink()]
            for name in sorted(names + links):
                yield Path(parent, name).relative_to(directory).as_posix()


def check_listing(directory: Path, manifest: SnapshotManifest) -> None:
    """Raises SnapshotInvalid unless the files are those of the manifest, in name, kind and size."""
    try:
        found = set(files_of(directory)) - {FILE_NAME}
    except StorageError as error:
        if isinstance(error.__cause__, PermissionError):
            refuse(directory, [f"not all of it can be read ({error.__cause__.strerror})"])
        raise
    problems = [f"{path} is missing" for path in manifest.files.keys() - found]
    problems += [f"{path} is not in the manifest" for path in found - manifest.files.keys()]
    for path in found & manifest.files.keys():
        problems += _problems_of(directory / path, path, manifest.files[path])
    refuse(directory, problems)


def check_contents(
    directory: Path, manifest: SnapshotManifest, on_file: OnFile, *, named: Path | None = None
) -> None:
    """Raises SnapshotInvalid, about `named`, unless every file holds what the manifest says."""
    problems = []
    for path, expected in manifest.files.items():
        on_file(path)
        with storage_call(f"read {directory / path}"):
            try:
                if read_content(directory / path, partial(on_file, path)) != expected:
                    problems.append(f"{path} has other content than when the snapshot was made")
            except OSError as error:
                if error.errno not in _NOT_THERE:
                    raise
                problems.append(f"{path} cannot be read ({error.strerror})")
    refuse(named or directory, problems)


def contents_of(directory: Path, on_file: OnFile) -> dict[str, Content]:
    """What a manifest says about the files below a directory."""
    contents = {}
    for path in files_of(directory):
        on_file(path)
        with storage_call(f"read {directory / path}"):
            contents[path] = read_content(directory / path, partial(on_file, path))
    return contents


def copy_files(source: Path, paths: Iterable[str], target: Path, on_file: OnFile) -> None:
    """Copies files to the same paths below another directory, holes staying holes. Raises StorageError."""
    made = None
    for path in paths:
        on_file(path)
        with storage_call(f"copy {source / path}"):
            copy = target / path
            if copy.parent != made:
                made = copy.parent
                made.mkdir(parents=True, exist_ok=True)
            copy_file(source / path, copy, partial(on_file, path))


def refuse(source: Path, problems: list[str]) -> None:
    """Raises SnapshotInvalid if there are problems; names the first ones."""
    if problems:
        more = f" and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        named = "; ".join(ascii(problem)[1:-1] for problem in sorted(problems)[:_MOST_NAMED])
        raise SnapshotInvalid(f"{source} is damaged: {named}{more}; use another snapshot")


def _problems_of(file: Path, path: str, expected: Content) -> list[str]:
    with storage_call(f"inspect {file}"):
        status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        return [f"{path} is not a plain file"]
    if status.st_size != expected.size_bytes:
        return [f"{path} has {status.st_size} bytes, expected {expected.size_bytes}"]
    return []


def _raise(error: OSError) -> None:
    raise error

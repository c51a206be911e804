"""Files that survive a crash: atomic writes, fsync of trees, copies that keep holes, a lock on a directory."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from router_service.backends.boundary import storage_call
from router_service.errors import DirectoryInUse, DiskFull

_COPY_BYTES = 1 << 22
_GIB = 1 << 30


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Lets `write` fill a new file and puts it at `path`: after a crash the old or the new content is there, whole."""
    partial = path.with_name(path.name + ".partial")
    with storage_call(f"write {path}"):
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        fsync_directory(path.parent)


def remove_durably(path: Path) -> None:
    """Removes a file, if it is there, so that it stays away after loss of power."""
    with storage_call(f"remove {path}"):
        path.unlink(missing_ok=True)
        fsync_directory(path.parent)


def remove_tree(directory: Path) -> None:
    """Removes a directory and what is in it, if it is there."""
    with storage_call(f"remove {directory}"):
        if directory.exists():
            shutil.rmtree(directory)


def fsync_directory(directory: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_path(directory: Path, root: Path) -> None:
    """Makes the names that lead from `root` to a directory below it durable."""
    with storage_call(f"sync {directory}"):
        while directory != root:
            directory = directory.parent
            fsync_directory(directory)


def fsync_tree(directory: Path) -> None:
    """Makes every file and name under a directory durable."""
    for parent, _, files in os.walk(directory):
        for name in files:
            with Path(parent, name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_directory(Path(parent))


def copy_tree(source: Path, target: Path, never_changed: Collection[str] = ()) -> None:
    """Copies the regular files under `source` to the new directory `target`, holes staying holes.

    Files of a name in `never_changed` get another hard link instead.
    """
    with storage_call(f"copy {source}"):
        for parent, _, files in os.walk(source):
            copied = target / Path(parent).relative_to(source)
            copied.mkdir(parents=True)
            for name in files:
                if name in never_changed:
                    os.link(Path(parent, name), copied / name)
                else:
                    _copy_sparse(Path(parent, name), copied / name)


def _copy_sparse(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        size = os.fstat(reader.fileno()).st_size
        for start, stop in _data_ranges(reader.fileno(), size):
            while start < stop:
                start += _copy_range(reader.fileno(), writer.fileno(), start, stop)
        writer.truncate(size)


def _copy_range(reader: int, writer: int, start: int, stop: int) -> int:
    """Copies some bytes within the kernel, where there is such a call; returns how many."""
    size = min(stop - start, _COPY_BYTES)
    with suppress(OSError):  # not between these file systems
        if hasattr(os, "copy_file_range") and (
            copied := os.copy_file_range(reader, writer, size, start, start)
        ):
            return copied
    return os.pwrite(writer, os.pread(reader, size, start), start)


def _data_ranges(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that are not holes."""
    stop = 0
    while stop < size:
        try:
            start = os.lseek(descriptor, stop, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        stop = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, stop


def disk_bytes(directory: Path) -> int:
    """Bytes that a directory takes on disk, holes not counted; files that vanish meanwhile count as 0."""
    return sum(
        allocated_bytes(Path(parent, name))
        for parent, _, files in os.walk(directory)
        for name in files
    )


def allocated_bytes(path: Path) -> int:
    """Bytes that a file takes on disk, holes not counted; 0 when it is gone."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


class FreeSpace:
    """Refuses writes while the file system of a directory is nearly full."""

    def __init__(self, directory: Path, min_free_bytes: int | None = None) -> None:
        """`min_free_bytes`: default max(1 GiB, 5 % of the file system)."""
        self._directory = directory
        self._min_free_bytes = min_free_bytes

    def require(self, extra_bytes: int = 0) -> None:
        """Raises DiskFull unless the minimum stays free after `extra_bytes` more."""
        with storage_call(f"measure free space of {self._directory}"):
            usage = shutil.disk_usage(self._directory)
        minimum = self._min_free_bytes
        if minimum is None:
            minimum = max(_GIB, usage.total // 20)
        if usage.free - extra_bytes < minimum:
            raise DiskFull(
                f"{self._directory}: {usage.free} bytes free, {minimum + extra_bytes} needed; free some "
                "space or move the data directory"
            )


class DirectoryLock:
    """The exclusive right to a directory, until release() or the end of the process."""

    def __init__(self, directory: Path) -> None:
        """Raises DirectoryInUse when another holder has it."""
        self._file = (directory / "LOCK").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read(20).strip() or "unknown"
            self._file.close()
            raise DirectoryInUse(
                f"{directory} is in use by process {holder}; stop it, or choose another data directory"
            ) from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        """Gives the directory back. Releasing twice is allowed."""
        self._file.close()

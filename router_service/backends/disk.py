"""Files: errors of the file system and the engine as StorageErrors, durable writes, sparse copies, sizes, locks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from router_service.errors import (
    CorruptMemory,
    DirectoryInUse,
    DiskFull,
    NewerFormat,
    OutOfDescriptors,
    RoutingServiceError,
    StorageError,
    newer_format,
)

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
# An open that fails on one of these says nothing about the files themselves.
_NOT_DAMAGE = (errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EROFS)
# The engine's own words for files of a later version of itself.
_NEWER = re.compile(r"Data version (\S+) is newer than application version (\S+)\. ")
# The kernel does not copy between these two files by itself.
_NOT_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.EPERM)
_BLOCK_BYTES = 1 << 20
_ZEROS = bytes(_BLOCK_BYTES)
_GIB = 1 << 30
# Behind each part of a file with holes: more than a deletion writes there.
_AHEAD_BYTES = 64 << 10
# Of a large file, between which work on it can be ended.
_PART_BYTES = 64 << 20
_OTHERS = 0o077

# Called between the parts of a large file; what it raises ends the work.
OnPart = Callable[[], object]


def go_on() -> None:
    """The OnPart of callers who do not watch."""


@contextmanager
def storage_call(action: str, *, opening: bool = False) -> Iterator[None]:
    """Maps whatever fails inside to a StorageError that says what was attempted, e.g. "open /data/x".

    The engine raises bare Exceptions, and panics that are BaseExceptions and would pass any `except Exception`.
    `opening`: a failure without another cause means that the files are damaged.
    """
    try:
        yield
    except (RoutingServiceError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise _storage_error(error, action, opening) from error


@contextmanager
def exhaustion(action: str) -> Iterator[None]:
    """Maps an OSError for want of space or descriptors to DiskFull or OutOfDescriptors; others pass as they are."""
    try:
        yield
    except OSError as error:
        if error.errno in (*_FULL, *_NO_DESCRIPTORS):
            raise _storage_error(error, action, opening=False) from error
        raise


def _storage_error(error: BaseException, action: str, opening: bool) -> StorageError:
    text = f"cannot {action}: {type(error).__name__}: {error}"
    if "WouldBlock" in text:
        return DirectoryInUse(
            f"cannot {action}: another process has it open; stop it, or choose another directory"
        )
    if _has_errno(error, _FULL) or "No space left" in text or "StorageFull" in text:
        return DiskFull(text)
    if _has_errno(error, _NO_DESCRIPTORS) or "TooManyOpenFiles" in text:
        return OutOfDescriptors(
            f"{text}; raise the limit of open files (ulimit -n), or retry later"
        )
    if opening and (engine := _NEWER.search(text)):
        found, reads = (f"{version} of the engine" for version in engine.groups())
        return NewerFormat(newer_format(action.removeprefix("open "), found, reads, None))
    if opening and not _has_errno(error, _NOT_DAMAGE):
        return CorruptMemory(f"{text}; restore the memory from a snapshot")
    return StorageError(text)


def _has_errno(error: BaseException, numbers: tuple[int, ...]) -> bool:
    """Whether an OSError, or the engine's text of one, carries one of these numbers."""
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(f"os error {number})" in str(error) for number in numbers)


def private_directory(directory: Path) -> None:
    """Makes a directory that only its owner can enter, or takes what others may do from one of ours that is there.

    Raises OSError when it cannot be made; one that is somebody else's stays as it is.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_mode & _OTHERS and status.st_uid == os.geteuid():
        directory.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS)
        log.info("%s: other users can no longer enter it", directory)


def is_open_to_others(path: Path) -> bool:
    """Whether other users can read, write or enter; False when it is gone."""
    with suppress(FileNotFoundError):
        return bool(path.stat().st_mode & _OTHERS)
    return False


def open_regular(path: Path) -> IO[bytes]:
    """A regular file, to read; never waits for a FIFO or a device. Raises OSError: ELOOP on a symbolic link."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


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
                copy = os.link if name in never_changed else copy_file
                copy(Path(parent, name), copied / name)


def copy_file(source: Path, target: Path, on_part: OnPart = go_on) -> None:
    """Copies a regular file to the new file `target`, holes staying holes. Raises OSError."""
    with open_regular(source) as reader, target.open("xb") as writer:
        for start, stop in _data_ranges(reader.fileno()):
            for part in range(start, stop, _PART_BYTES):
                _copy_range(reader.fileno(), writer.fileno(), part, min(part + _PART_BYTES, stop))
                on_part()
        os.ftruncate(writer.fileno(), os.fstat(reader.fileno()).st_size)


def _copy_range(reader: int, writer: int, start: int, stop: int) -> None:
    """One call for all, so as not to wait for the GIL in between; where it can, the file system only shares."""
    while start < stop:
        copied = _copied_by_kernel(reader, writer, start, stop)
        if not copied:
            block = os.pread(reader, min(_BLOCK_BYTES, stop - start), start)
            copied = os.pwrite(writer, block, start)
        if not copied:
            raise OSError(errno.EIO, "the file became shorter while it was copied")
        start += copied


def _copied_by_kernel(reader: int, writer: int, start: int, stop: int) -> int:
    if not hasattr(os, "copy_file_range"):  # not Linux
        return 0
    try:
        return os.copy_file_range(reader, writer, stop - start, start, start)
    except OSError as error:
        if error.errno in _NOT_HERE:
            return 0
        raise


def _data_ranges(descriptor: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that are not holes."""
    stop = 0
    while True:
        try:
            start = os.lseek(descriptor, stop, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left, or nothing
                return
            raise
        stop = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, stop


@dataclass(frozen=True, slots=True)
class Content:
    """What a file holds: `content_bytes` bytes with this SHA-256 (hex), then zeros up to `size_bytes`."""

    size_bytes: int
    content_bytes: int
    sha256: str


def read_content(path: Path, on_part: OnPart = go_on) -> Content:
    """Reads a regular file to its end. Raises OSError."""
    digest, summed, reported = hashlib.sha256(), 0, _PART_BYTES
    with open_regular(path) as file:
        for offset, block in _data_blocks(file.fileno()):
            if offset >= reported:
                on_part()
                reported = offset + _PART_BYTES
            for _ in range((offset - summed) // _BLOCK_BYTES):
                digest.update(_ZEROS)
            digest.update(_ZEROS[: (offset - summed) % _BLOCK_BYTES])
            body = block.rstrip(b"\0")
            digest.update(body)
            summed = offset + len(body)
        size = os.fstat(file.fileno()).st_size
    return Content(size, summed, digest.hexdigest())


def _data_blocks(descriptor: int) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of the blocks that are not all zeros."""
    for start, stop in _data_ranges(descriptor):
        while block := os.pread(descriptor, min(_BLOCK_BYTES, stop - start), start):
            if block != _ZEROS[: len(block)]:
                yield start, block
            start += len(block)


def disk_bytes(directory: Path) -> int:
    """Bytes that a directory takes on disk, holes not counted; files that vanish meanwhile count as 0."""
    return sum(map(allocated_bytes, _files_below(directory)))


def _files_below(
    directory: Path, on_error: Callable[[OSError], None] | None = None
) -> Iterator[Path]:
    """What there is of them. on_error: is told of directories that cannot be listed; None: they have no files."""
    for parent, _, files in os.walk(directory, onerror=on_error):
        yield from (Path(parent, name) for name in files)


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def allocated_bytes(path: Path) -> int:
    """Bytes that a file takes on disk, holes not counted; 0 when it is gone."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def keep_room(directory: Path) -> None:
    """Blocks for the next writes into the files with holes below a directory. Raises DiskFull.

    The engine writes through mapped memory, where a hole that the disk has no block for ends the process by SIGBUS.
    """
    with storage_call(f"keep room for the next writes below {directory}"):
        for path in _files_below(directory, _unless_gone):
            with suppress(FileNotFoundError):  # the engine makes files anew
                status = path.stat()
                if stat.S_ISREG(status.st_mode) and status.st_blocks * 512 < status.st_size:
                    _keep_room(path, status.st_size)


def _keep_room(path: Path, size: int) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for hole in (0, *(stop for _, stop in _data_ranges(descriptor))):
            if hole < size:
                os.posix_fallocate(descriptor, hole, min(_AHEAD_BYTES, size - hole))
    finally:
        os.close(descriptor)


class FreeSpace:
    """Refuses writes while the file system of a directory is nearly full."""

    def __init__(self, directory: Path, min_free_bytes: int | None = None) -> None:
        """`min_free_bytes`: default max(1 GiB, 5 % of the file system)."""
        self._directory = directory
        self._min_free_bytes = min_free_bytes

    def measured(self) -> tuple[int, int]:
        """Bytes that are free, and below how many writes are refused. Raises StorageError."""
        with storage_call(f"measure free space of {self._directory}"):
            usage = shutil.disk_usage(self._directory)
        minimum = self._min_free_bytes
        return usage.free, max(_GIB, usage.total // 20) if minimum is None else minimum

    def is_short(self) -> bool:
        """Whether less is free than the minimum. Raises StorageError."""
        free, minimum = self.measured()
        return free < minimum

    def require(self, extra_bytes: int = 0) -> None:
        """Raises DiskFull unless the minimum stays free after `extra_bytes` more."""
        free, minimum = self.measured()
        if free - extra_bytes < minimum:
            raise DiskFull(
                f"{self._directory}: {free} bytes free, {minimum + extra_bytes} needed; free some "
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

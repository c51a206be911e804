"""The file of a service's unfinished writes: records one after the other, each with a sum.

Nothing is synced: it survives SIGKILL of the service, not loss of power.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from router_service.backends.disk import private_directory, storage_call
from router_service.backends.qdrant_server.options import UNFINISHED, ServerOptions
from router_service.errors import DirectoryInUse

log = logging.getLogger(__name__)

# Kinds of records: a request that finishes a write (its message), and how it ended: acknowledged, or nothing was done.
UPSERT, DELETE, DONE, VOID = 1, 2, 3, 4
_HEAD = struct.Struct("<BQII")  # kind, number, bytes that follow, CRC-32 of all of these
Record = tuple[int, int, bytes]


class WriteLog:
    """The file: records one after the other. Not for several threads at once."""

    def __init__(self, directory: Path, options: ServerOptions) -> None:
        # Not by the URL: that of a cluster may come to name more of its nodes, or others.
        self.path = directory / f"{UNFINISHED}{options.prefix}"
        with storage_call(f"write {self.path}"):
            private_directory(directory)
            self._file = _locked(self.path)
        self.size_bytes = os.fstat(self._file).st_size

    def read(self) -> Iterator[Record]:
        """What was written; a record that a kill cut short is the last, and was never sent."""
        with storage_call(f"read {self.path}"):
            content, at = self.path.read_bytes(), 0
            while at + _HEAD.size <= len(content):
                kind, number, length, crc = _HEAD.unpack_from(content, at)
                body = content[at + _HEAD.size : at + _HEAD.size + length]
                if crc != _crc(kind, number, body):
                    break
                yield kind, number, body
                at += _HEAD.size + length
        if at < len(content):
            log.warning("%s: the last %d bytes are no whole record", self.path, len(content) - at)

    def append(self, *records: Record) -> None:
        """All of them, or none. Raises DiskFull or StorageError."""
        packed = b"".join(map(_packed, records))
        with storage_call(f"write {self.path}"):
            try:
                _write(self._file, packed)
            except OSError:
                os.ftruncate(self._file, self.size_bytes)
                raise
        self.size_bytes += len(packed)

    def clear(self) -> None:
        """Nothing is unfinished."""
        with storage_call(f"write {self.path}"):
            os.ftruncate(self._file, 0)
        self.size_bytes = 0

    def rewrite(self, records: Iterable[Record]) -> None:
        """Leaves only these."""
        partial = self.path.with_name(f"{self.path.name}.partial")
        with storage_call(f"write {self.path}"):
            partial.unlink(missing_ok=True)
            file = _locked(partial)
            try:
                for record in records:
                    _write(file, _packed(record))
                partial.replace(self.path)
            except BaseException:
                os.close(file)
                raise
        self.close()
        self._file, self.size_bytes = file, os.fstat(file).st_size

    def close(self) -> None:
        """Closes the file and leaves it there."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _packed(record: Record) -> bytes:
    kind, number, body = record
    return _HEAD.pack(kind, number, len(body), _crc(kind, number, body)) + body


def _crc(kind: int, number: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(struct.pack("<BQ", kind, number)))


def _locked(path: Path) -> int:
    """A descriptor of a file that no other process writes to. Raises OSError."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise DirectoryInUse(
            f"{path} is another service's: give each service a --data of its own"
        ) from None
    return file


def _write(file: int, record: bytes) -> None:
    left = memoryview(record)
    while left:
        left = left[os.write(file, left) :]

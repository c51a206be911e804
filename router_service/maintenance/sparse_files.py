"""Files with holes: copied so that the holes stay, checked by a sum that holes and stored zeros have in common.

An engine file of 32 MiB often holds some KiB, then nothing: summing the nothing would take longer than all the rest.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK_BYTES = 1 << 20
_ZEROS = bytes(_BLOCK_BYTES)
# The kernel does not copy between these two files by itself.
_NOT_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.EPERM)


@dataclass(frozen=True, slots=True)
class Content:
    """What a file holds: `content_bytes` bytes with this SHA-256 (hex), then zeros up to `size_bytes`."""

    size_bytes: int
    content_bytes: int
    sha256: str


def copy_file(source: Path, target: Path) -> None:
    """Copies a file to the new file `target`, holes staying holes. Raises OSError."""
    with source.open("rb") as reader, target.open("xb") as writer:
        for start, stop in _data_ranges(reader.fileno()):
            _copy_range(reader.fileno(), writer.fileno(), start, stop)
        os.ftruncate(writer.fileno(), os.fstat(reader.fileno()).st_size)


def read_content(path: Path) -> Content:
    """Reads a file to its end. Raises OSError."""
    digest, summed = hashlib.sha256(), 0
    with path.open("rb") as file:
        for offset, block in _data_blocks(file.fileno()):
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


def _data_ranges(descriptor: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that are not holes."""
    stop = 0
    while (start := _next_data(descriptor, stop)) is not None:
        stop = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, stop


def _next_data(descriptor: int, offset: int) -> int | None:
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # only a hole is left, or nothing
            return None
        raise


def _copy_range(reader: int, writer: int, start: int, stop: int) -> None:
    """One call for all of it, so as not to wait for the GIL in between; where it can, the file system only shares."""
    while start < stop:
        try:
            copied = os.copy_file_range(reader, writer, stop - start, start, start)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            copied = 0
        if not copied:
            block = os.pread(reader, min(_BLOCK_BYTES, stop - start), start)
            copied = os.pwrite(writer, block, start)
        if not copied:
            raise OSError(errno.EIO, "the file became shorter while it was copied")
        start += copied

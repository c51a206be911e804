"""One file for a snapshot, to carry it to another machine: an uncompressed tar that GNU tar reads too.

The manifest comes first, so that unpacking knows what may follow: only its files, each once, of its size.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import secrets
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO

from router_service.backends.disk import (
    Content,
    FreeSpace,
    OnPart,
    open_regular,
    private_directory,
    storage_call,
)
from router_service.errors import InvalidField, RoutingServiceError, SnapshotInvalid
from router_service.snapshots import files
from router_service.snapshots.base import SnapshotInfo
from router_service.snapshots.files import OnFile, exclusive, finish, info_of, unfinished, unwatched
from router_service.snapshots.manifest import (
    FILE_NAME,
    MAX_BYTES,
    SnapshotManifest,
    from_json,
    read_manifest,
)

# Apparent size of all files of an archive: 4 TiB, which no memory on one machine needs.
MAX_UNPACKED_BYTES = 1 << 42

_COPY_BYTES = 1 << 20
# Of a large file, between which packing and unpacking can be ended.
_PART_BYTES = 64 << 20
_MAX_EXTENDED_HEADER_BYTES = 1 << 16


# Archives while they are written; locked by whoever writes.
_PACKING = ".packing-"
# What file systems without hard links answer.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


def pack(path: Path, archive: Path, *, on_file: OnFile = unwatched) -> None:
    """Writes the snapshot at `path` to the new file `archive`, whose directory is made when it is not there.

    No file that is there is opened, followed or removed. Raises SnapshotInvalid, InvalidField or StorageError; then
    nothing is left behind.
    """
    manifest = read_manifest(path)
    files.check_listing(path, manifest)
    files.check_contents(path, manifest, on_file)
    with _directory(archive.parent) as directory:
        if _is_there(archive.name, directory):
            raise _taken(archive)
        with _new_file(directory) as (name, file):
            with storage_call(f"write {archive}"):
                _write(path, manifest, file, on_file)
                file.flush()
                os.fsync(file.fileno())
            with storage_call(f"write {archive}"):
                _publish(name, archive, directory)
                os.fsync(directory)


def sweep_packed(directory: Path) -> None:
    """Removes the archives of a directory that were never finished. Raises StorageError."""
    with storage_call(f"sweep {directory}"):
        for path in directory.glob(f"{_PACKING}*"):
            with suppress(OSError), open_regular(path) as file:  # not one of ours, or it is gone
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    """A descriptor of the directory, so that no name on its way can change meanwhile."""
    with storage_call(f"open {path}"):
        if not path.is_dir():
            private_directory(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _new_file(directory: int) -> Iterator[tuple[str, IO[bytes]]]:
    """A new file and its name, which is gone at the end."""
    name = _PACKING + secrets.token_hex(8)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with storage_call("write an archive"):
        descriptor = os.open(name, flags, 0o600, dir_fd=directory)
    with os.fdopen(descriptor, "wb") as file, storage_call("write an archive"):
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield name, file
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)


def _publish(name: str, archive: Path, directory: int) -> None:
    """Gives a new file its name, and never that of another. Raises InvalidField or OSError."""
    try:
        try:
            # A link, unlike a rename, takes no other file's place.
            os.link(name, archive.name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            os.close(os.open(archive.name, os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory))
            os.rename(name, archive.name, src_dir_fd=directory, dst_dir_fd=directory)
    except FileExistsError:
        raise _taken(archive) from None


def _is_there(name: str, directory: int) -> bool:
    with suppress(FileNotFoundError):
        os.stat(name, dir_fd=directory, follow_symlinks=False)
        return True
    return False


def _taken(archive: Path) -> InvalidField:
    return InvalidField(
        "path", str(archive), "the name of a new file; remove it, or choose another"
    )


def unpack(
    archive: Path,
    snapshots_dir: Path,
    *,
    min_free_bytes: int | None = None,
    max_unpacked_bytes: int = MAX_UNPACKED_BYTES,
    on_file: OnFile = unwatched,
) -> SnapshotInfo:
    """Makes the snapshot that `archive` holds one of `snapshots_dir`, under its own name.

    Raises SnapshotInvalid, InvalidField when a snapshot of that name is there, DiskFull, Busy or StorageError; then
    nothing is left behind.
    """
    with _open(archive) as tar:
        manifest, text = _read_manifest(tar, archive)
        if sum(c.size_bytes for c in manifest.files.values()) > max_unpacked_bytes:
            problem = f"its files have more than {max_unpacked_bytes} bytes"
            raise SnapshotInvalid(
                f"{archive} is refused: {problem}; raise the limit if they should"
            )
        with exclusive(snapshots_dir / manifest.record.name) as home:
            target = home / manifest.name
            if target.exists():
                raise InvalidField(
                    "archive", str(archive), f"a snapshot that is not there: {target}"
                )
            FreeSpace(home, min_free_bytes).require(manifest.total_bytes)
            with unfinished(home, target.name) as made:
                with storage_call(f"write {made}"):
                    (made / FILE_NAME).write_bytes(text)
                _extract(tar, archive, manifest, made, on_file)
                files.check_contents(made, manifest, on_file, named=archive)
                finish(made, target)
    return info_of(target, manifest)


def _write(path: Path, manifest: SnapshotManifest, file: IO[bytes], on_file: OnFile) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        text = (path / FILE_NAME).read_bytes()
        tar.addfile(_member(f"{manifest.name}/{FILE_NAME}", len(text)), io.BytesIO(text))
        for name, content in manifest.files.items():
            on_file(name)
            with open_regular(path / name) as source:
                _add(
                    tar,
                    f"{manifest.name}/{name}",
                    content,
                    _Watched(source, partial(on_file, name)),
                )


def _add(tar: tarfile.TarFile, name: str, content: Content, source: _Watched) -> None:
    """A file without the zeros that end it: GNU sparse format 1.0, one extent of data and then the end."""
    if content.content_bytes == content.size_bytes:
        tar.addfile(_member(name, content.size_bytes), source)
        return
    numbers = (2, 0, content.content_bytes, content.size_bytes, 0)
    extents = "".join(f"{number}\n" for number in numbers).encode().ljust(tarfile.BLOCKSIZE, b"\0")
    member = _member(name, len(extents) + content.content_bytes)
    member.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": name,
        "GNU.sparse.realsize": str(content.size_bytes),
    }
    tar.addfile(member, _Joined(extents, source))


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    return member


class _Watched(io.RawIOBase):
    """A file that can be stopped between two blocks."""

    def __init__(self, file: IO[bytes], on_part: OnPart) -> None:
        self._file, self._on_part, self._left = file, on_part, _PART_BYTES

    def read(self, size: int = -1) -> bytes:
        """As of the file."""
        if self._left <= 0:
            self._on_part()
            self._left = _PART_BYTES
        found = self._file.read(size)
        self._left -= len(found)
        return found


class _Joined(io.RawIOBase):
    """Some bytes, then a file."""

    def __init__(self, head: bytes, tail: _Watched) -> None:
        self._head, self._tail = io.BytesIO(head), tail

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; fewer only at the end."""
        head = self._head.read(size)
        return head + self._tail.read(size - len(head) if size >= 0 else -1)


class _CheckedMember(tarfile.TarInfo):
    """A member whose header cannot make tarfile loop (CVE-2025-8194) or read an extended header of any size into RAM.

    The methods are tarfile's own, not public: tests hold that they are still called.
    """

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        extended = not self.isreg() and self.type not in (tarfile.DIRTYPE, tarfile.SYMTYPE)
        if extended and self.size > _MAX_EXTENDED_HEADER_BYTES:
            raise tarfile.HeaderError(f"an extended header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.HeaderError(f"a size of {count} bytes")
        return super()._block(count)  # type: ignore[misc]


@contextmanager
def _open(archive: Path) -> Iterator[tarfile.TarFile]:
    """The archive. Raises StorageError when there is no regular file, SnapshotInvalid when it is no tar."""
    with storage_call(f"read {archive}"):
        file = open_regular(archive)
    if not os.fstat(
        file.fileno()
    ).st_size:  # files of /proc too, of which some keep their reader waiting
        file.close()
        raise _refused(archive, "it is empty")
    with (
        file,
        _reading(archive),
        tarfile.open(fileobj=file, mode="r:", tarinfo=_CheckedMember) as tar,
    ):
        yield tar


@contextmanager
def _reading(archive: Path) -> Iterator[None]:
    """Whatever tarfile makes of a damaged archive becomes SnapshotInvalid."""
    try:
        yield
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        problem = f"{type(error).__name__}: {ascii(str(error))[1:200]}"
        raise _refused(archive, f"not a whole tar ({problem})") from error


def _read_manifest(tar: tarfile.TarFile, archive: Path) -> tuple[SnapshotManifest, bytes]:
    first = tar.next()
    if first is None or not first.isreg() or not first.name.endswith(f"/{FILE_NAME}"):
        raise _refused(archive, f"it does not begin with {FILE_NAME}")
    if first.size > MAX_BYTES:
        raise _refused(archive, f"its {FILE_NAME} has {first.size} bytes")
    with _data_of(tar, first) as file:
        text = file.read()
    manifest = from_json(text, f"{archive}: {FILE_NAME}")
    if first.name != f"{manifest.name}/{FILE_NAME}":
        raise _refused(archive, f"it is not named after its snapshot, {manifest.name}")
    return manifest, text


def _extract(
    tar: tarfile.TarFile, archive: Path, manifest: SnapshotManifest, target: Path, on_file: OnFile
) -> None:
    """The files of the manifest, and nothing else: no links, devices, directories, strangers or repetitions."""
    expected = dict(manifest.files)
    while (member := tar.next()) is not None:
        path = member.name.removeprefix(f"{manifest.name}/")
        content = expected.pop(path, None) if member.isreg() and path != member.name else None
        if content is None:
            raise _refused(archive, f"{ascii(member.name)[:200]} is not a file of its manifest")
        if member.size != content.size_bytes:
            raise _refused(archive, f"{path} has {member.size} bytes, not {content.size_bytes}")
        on_file(path)
        with _data_of(tar, member) as source, storage_call(f"write {target / path}"):
            _write_file(archive, source, target / path, content, partial(on_file, path))
    files.refuse(archive, [f"{path} is missing" for path in expected])


def _data_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(member)
    if file is None:
        raise tarfile.ReadError(f"{member.name} has no data")
    return file


def _write_file(
    archive: Path, source: IO[bytes], target: Path, content: Content, on_part: OnPart
) -> None:
    """Writes a file without the zeros that end it; whether it is the right one is for the caller to check."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        while left := content.content_bytes - (done := file.tell()):
            if done and not done % _PART_BYTES:
                on_part()
            with _reading(archive):
                block = source.read(min(left, _COPY_BYTES))
            if not block:
                break
            file.write(block)
        file.truncate(content.size_bytes)


def _refused(archive: Path, problem: str) -> RoutingServiceError:
    return SnapshotInvalid(f"{archive} is refused: {problem}; use another archive")

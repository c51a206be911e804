"""Snapshots as files: whole copies of a memory, all layers at one moment, that can be checked, moved and restored.

The functions work on any store of memories and any directory; LocalSnapshotStore is a service's own.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from router_service import __version__, checks
from router_service.backends.base import FileCollection, FrozenFiles, Report
from router_service.backends.disk import (
    DirectoryLock,
    FreeSpace,
    disk_bytes,
    fsync_tree,
    private_directory,
    remove_tree,
    storage_call,
)
from router_service.errors import (
    CorruptMemory,
    DirectoryInUse,
    InvalidField,
    KeysNotFound,
    SnapshotInvalid,
    SnapshotNotFound,
    shorten,
)
from router_service.memories.memory import MemoryRecord, RoutingMemory
from router_service.memories.store import MemoryStore
from router_service.memories.swap import RETIRE_AFTER_S, require_room, retire, staging, swap_in
from router_service.snapshots.archive import pack, sweep_packed, unpack
from router_service.snapshots.base import PackedSnapshot, Restored, SnapshotInfo, SnapshotRef
from router_service.snapshots.files import (
    OnFile,
    check_contents,
    check_listing,
    contents_of,
    copy_files,
    describe,
    exclusive,
    files_of,
    find,
    finish,
    free_name,
    info_of,
    list_snapshots,
    remove,
    unfinished,
    unwatched,
)
from router_service.snapshots.manifest import (
    NAME,
    SnapshotManifest,
    layer_directory,
    read_manifest,
    write_manifest,
)

log = logging.getLogger(__name__)


def create(
    store: MemoryStore,
    memory_name: str,
    snapshots_dir: Path,
    snapshot_name: str | None = None,
    *,
    min_free_bytes: int | None = None,
    on_file: OnFile = unwatched,
) -> SnapshotInfo:
    """Copies a memory as it is at one moment. Writes to it wait while its files are copied, lookups go on.

    `min_free_bytes` stays free: default max(1 GiB, 5 % of the file system). `on_file` is called before each file, and
    ends the work by raising. Raises MemoryNotFound, InvalidField, DiskFull, Busy (another snapshot of the memory, or an
    optimize of a layer, is under way) or StorageError; then nothing is left behind.
    """
    memory = store.get(memory_name)
    collections = _collections_of(memory)
    needed = sum(layer.info().disk_bytes or 0 for layer in memory.layers)

    def copy(partial: Path, name: str) -> SnapshotManifest:
        return _copy(memory, collections, partial, name, on_file)

    return make(memory, snapshots_dir, snapshot_name, copy, needed, min_free_bytes)


def make(
    memory: RoutingMemory,
    snapshots_dir: Path,
    snapshot_name: str | None,
    copy: Callable[[Path, str], SnapshotManifest],
    needed_bytes: int,
    min_free_bytes: int | None,
) -> SnapshotInfo:
    """What `copy` makes in an empty directory becomes the snapshot of a name, or of one of time and version.

    Raises as create(), and what `copy` raises; then nothing is left behind.
    """
    with exclusive(snapshots_dir / memory.record.name) as home:
        target = home / free_name(home, snapshot_name, memory.version)
        FreeSpace(home, min_free_bytes).require(needed_bytes)
        with unfinished(home, target.name) as partial:
            manifest = copy(partial, target.name)
            write_manifest(partial, manifest)
            finish(partial, target)
    pause_ms, entries = manifest.write_pause_ms, sum(manifest.entries)
    log.info("snapshot %s: %d entries, writes waited %d ms", target, entries, pause_ms)
    return info_of(target, manifest)


def verify(path: Path, *, on_file: OnFile = unwatched) -> SnapshotInfo:
    """Reads all of a snapshot. Raises SnapshotInvalid that names what is missing, added, cut or changed."""
    manifest = read_manifest(path)
    check_listing(path, manifest)
    check_contents(path, manifest, on_file)
    return info_of(path, manifest)


def restore(
    store: MemoryStore,
    path: Path,
    as_name: str,
    *,
    replacing: bool = False,
    min_free_bytes: int | None = None,
    retire_after_s: float = RETIRE_AFTER_S,
    on_file: OnFile = unwatched,
) -> RoutingMemory:
    """Serves a copy of the snapshot at `path` as a memory; the snapshot itself stays as it is.

    `replacing` puts it in the place of the memory of that name, which serves until the copy has been checked and
    opened, and `retire_after_s` longer to lookups that had begun. Settings are those of the snapshot; the creation
    time is now. Raises SnapshotInvalid, MemoryExists, ModelMismatch, KindMismatch, InvalidField, DiskFull, Busy,
    KeysNotFound or another StorageError; then nothing has changed.
    """
    manifest = read_manifest(path)
    record = replace(manifest.record, name=as_name)
    require_room(store, record, replacing=replacing)
    check_listing(path, manifest)
    with staging(store, as_name) as staged:
        FreeSpace(staged, min_free_bytes).require(disk_bytes(path))
        copy_files(path, manifest.files, staged, on_file)
        # The copy is what will be read: when it is right, so was the snapshot.
        check_contents(staged, manifest, on_file, named=path)
        with storage_call(f"sync {staged}"):
            fsync_tree(staged)
        old = _swap_in(store, path, staged, record, manifest, replacing)
    if old is not None:
        time.sleep(retire_after_s)
        retire(store, old)
    return store.get(as_name)


def _copy(
    memory: RoutingMemory,
    collections: Sequence[FileCollection],
    partial: Path,
    name: str,
    on_file: OnFile,
) -> SnapshotManifest:
    for layer in memory.layers:  # so that little is left to be flushed in the pause
        layer.collection.flush()
    started = time.monotonic()
    with ExitStack() as pause:
        frozen = [pause.enter_context(each.paused_for_copy()) for each in collections]
        record, created = memory.record, time.time_ns() // 1_000_000
        for number, files in enumerate(frozen):
            _copy_layer(files, partial / layer_directory(number), on_file)
    pause_ms = round(1000 * (time.monotonic() - started))
    for number, files in enumerate(frozen):
        files.complete(partial / layer_directory(number))
    contents = contents_of(partial, on_file)
    entries = tuple(files.entries for files in frozen)
    return SnapshotManifest(name, __version__, created, pause_ms, record, entries, contents)


def _copy_layer(files: FrozenFiles, target: Path, on_file: OnFile) -> None:
    # What an index replaced is being removed beside them.
    copy_files(files.directory, files_of(files.directory, files.names), target, on_file)


def _swap_in(
    store: MemoryStore,
    path: Path,
    staged: Path,
    record: MemoryRecord,
    manifest: SnapshotManifest,
    replacing: bool,
) -> RoutingMemory | None:
    try:
        return swap_in(store, staged, record, manifest.entries, replacing=replacing)
    except KeysNotFound:  # not the snapshot's fault
        raise
    except CorruptMemory as error:
        raise SnapshotInvalid(
            f"{path} is whole but cannot be opened ({error}); use another snapshot, or the version of router-service "
            f"that wrote it ({manifest.service_version})"
        ) from error


def _collections_of(memory: RoutingMemory) -> Sequence[FileCollection]:
    collections = [each.collection for each in memory.layers]
    files = [each for each in collections if isinstance(each, FileCollection)]
    if len(files) != len(collections):
        wanted = "a memory of the embedded backend, whose entries are files"
        raise InvalidField("memory", memory.record.name, wanted)
    return files


# What archives are unpacked in, and layers are read in; no memory's name begins with a dot.
_UNPACKING = ".unpacking-"


_PACK_DIR = "start the service with --pack-dir DIR (ROUTER_SERVICE_PACK_DIR)"


class LocalSnapshotStore:
    """Makes snapshots of memories and memories of snapshots, in one directory that services may share.

    Without a directory every call raises InvalidField. Iterators yield one result at their end.
    """

    def __init__(
        self,
        store: MemoryStore,
        directory: Path | None,
        min_free_bytes: int | None = None,
        pack_dir: Path | None = None,
    ) -> None:
        """`min_free_bytes`: see create.

        `pack_dir`: the only directory that archives are written to; with None there is none.
        """
        self._store, self._directory, self._min_free_bytes = store, directory, min_free_bytes
        self._pack_dir = None if pack_dir is None else pack_dir.absolute()

    def sweep(self) -> None:
        """Removes what is left of work that was killed. Raises StorageError."""
        if self._directory is not None and self._directory.is_dir():
            with storage_call(f"open {self._directory}"):
                private_directory(self._directory)
            for leftover in self._directory.glob(f"{_UNPACKING}*"):
                _remove_unless_in_use(leftover)
        if self._pack_dir is not None:
            sweep_packed(self._pack_dir)

    def create(self, memory: str, name: str, report: Report) -> Iterator[SnapshotInfo]:
        """Copies a memory; without a name, one is made of time and version.

        Raises MemoryNotFound, InvalidField, Busy or StorageError; then nothing is left behind.
        """
        yield create(
            self._store,
            memory,
            self.home(),
            name or None,
            min_free_bytes=self._min_free_bytes,
            on_file=counting(report),
        )

    def list(self, memory: str) -> list[SnapshotInfo]:
        """Those of a memory, or with an empty name of all; those that cannot be used say why."""
        return list_snapshots(self.home(), memory or None)

    def verify(self, ref: SnapshotRef, report: Report) -> Iterator[SnapshotInfo]:
        """Reads all of one. Raises SnapshotNotFound, SnapshotInvalid or StorageError."""
        with self.opened(ref, report) as path:
            info = verify(path, on_file=counting(report))
            yield replace(info, path=Path(ref.path or path))  # an archive's own directory goes away

    def restore(
        self, ref: SnapshotRef, as_memory: str, replacing: bool, report: Report
    ) -> Iterator[Restored]:
        """Serves a copy as a memory, or in the place of one; that one serves until the copy has been checked.

        Raises SnapshotNotFound, SnapshotInvalid, MemoryExists, ModelMismatch, KindMismatch, InvalidField, Busy or
        StorageError; then nothing has changed.
        """
        with self.opened(ref, report) as path:
            memory = restore(
                self._store,
                path,
                as_memory,
                replacing=replacing,
                min_free_bytes=self._min_free_bytes,
                on_file=counting(report),
            )
            yield Restored(memory)

    def pack(self, memory: str, name: str, file: str, report: Report) -> Iterator[PackedSnapshot]:
        """Writes one to the new file of that name in the directory of archives, or of that path directly in it.

        Raises SnapshotNotFound, InvalidField or StorageError.
        """
        path = self.find(memory, name)
        target = self._packed(file)
        pack(path, target, on_file=counting(report))
        yield PackedSnapshot(describe(path), target)

    def _packed(self, file: str) -> Path:
        """The archive that a client names: directly in the directory of archives."""
        checks.require_text("path", file)
        if self._pack_dir is None:
            raise InvalidField(
                "path", file, f"a service that has a directory of archives: {_PACK_DIR}"
            )
        path = self._pack_dir / file
        if path.parent != self._pack_dir or not NAME.fullmatch(path.name):
            raise InvalidField(
                "path",
                file,
                f"the name of a file in {self._pack_dir}, e.g. monday.tar: letters, digits, '.', '_' or '-'; to pack "
                f"into another directory {_PACK_DIR}",
            )
        return path

    def delete(self, memory: str, name: str) -> SnapshotInfo:
        """Raises SnapshotNotFound or StorageError."""
        return remove(self.find(memory, name))

    def find(self, memory: str, name: str) -> Path:
        """The directory of a snapshot. Raises SnapshotNotFound."""
        return find(self.home(), memory, name)

    def home(self) -> Path:
        """The directory, there and private."""
        if self._directory is None:
            expected = (
                "edge: memories that are kept in RAM have no snapshots; start the service with --backend edge, or with "
                "the URL of a Qdrant server"
            )
            raise InvalidField("backend", "exact", expected)
        with storage_call(f"create {self._directory}"):
            private_directory(self._directory)
        return self._directory

    @contextmanager
    def opened(self, ref: SnapshotRef, report: Report) -> Iterator[Path]:
        """The directory of a snapshot; that of an archive is gone at the end."""
        home = self.home()
        if not ref.path:
            yield self.find(ref.memory, ref.name)
            return
        path = _absolute(ref.path)
        if stat.S_ISDIR(_mode(path)):
            yield path
            return
        with scratch(home) as unpacked:
            yield self._unpack(path, unpacked, report)

    def _unpack(self, packed: Path, target: Path, report: Report) -> Path:
        on_file = counting(report, "unpack ")
        info = unpack(packed, target, min_free_bytes=self._min_free_bytes, on_file=on_file)
        return Path(info.path)


@contextmanager
def scratch(home: Path) -> Iterator[Path]:
    """A directory below that of the snapshots, gone at the end; services that share it leave each other's alone."""
    while True:
        with storage_call(f"create a directory in {home}"):
            directory = Path(tempfile.mkdtemp(prefix=_UNPACKING, dir=home))
        with suppress(FileNotFoundError, DirectoryInUse):  # a sweep came just then
            lock = DirectoryLock(directory)
            break
    try:
        with storage_call(f"create {directory}"):
            (inner := directory / "files").mkdir()
        yield inner
    finally:
        lock.release()
        remove_tree(directory)


def _remove_unless_in_use(directory: Path) -> None:
    with storage_call(f"sweep {directory}"), suppress(DirectoryInUse, FileNotFoundError):
        DirectoryLock(directory).release()
        remove_tree(directory)


def _absolute(text: str) -> Path:
    checks.require_text("path", text)
    path = Path(text)
    if not path.is_absolute():
        raise InvalidField("path", text, "an absolute path on the service's machine")
    return path


def _mode(path: Path) -> int:
    """Kind of the file or directory that a client names. Raises InvalidField on any other, SnapshotNotFound."""
    expected = "a snapshot's directory, or an archive that is a regular file"
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise InvalidField("path", str(path), f"{expected}, not a symbolic link")
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise InvalidField("path", str(path), f"{expected}, not a FIFO, a device or a socket")
        if not os.access(path, os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)):
            raise PermissionError(errno.EACCES, "Permission denied")
    except (FileNotFoundError, NotADirectoryError):
        raise SnapshotNotFound(
            f"{shorten(str(path))}: nothing there, on the service's machine"
        ) from None
    except OSError as error:  # too long a name, a directory that is closed to us
        raise InvalidField(
            "path", str(path), f"{expected} and can be read ({error.strerror})"
        ) from error
    return mode


def counting(report: Report, verb: str = "") -> OnFile:
    """Reports each file, and how many came before it."""
    before, done = "", -1

    def on_file(path: str) -> None:
        nonlocal before, done
        done += path != before  # else it is a large one, in the middle
        before = path
        report(f"{verb}{path}", done, 0)

    return on_file

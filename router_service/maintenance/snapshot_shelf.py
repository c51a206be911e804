"""The snapshots of a service, as operations: in its own directory, and brought to its machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from router_service import checks
from router_service.backends.base import Report
from router_service.backends.boundary import storage_call
from router_service.backends.disk import remove_tree
from router_service.errors import InvalidField, SnapshotNotFound, shorten
from router_service.maintenance import snapshots
from router_service.maintenance.shelf import SnapshotRef
from router_service.maintenance.snapshots import SnapshotInfo
from router_service.memory_store import MemoryStore
from router_service.routing_memory import RoutingMemory

# Archives while they are unpacked; no memory's name begins with a dot.
_UNPACKING = ".unpacking-"


class SnapshotShelf:
    """See Shelf: snapshots in one directory. Without one (memories in RAM) every call raises InvalidField."""

    def __init__(
        self, store: MemoryStore, directory: Path | None, min_free_bytes: int | None = None
    ) -> None:
        """`min_free_bytes`: see snapshots.create."""
        self._store, self._directory, self._min_free_bytes = store, directory, min_free_bytes

    def sweep(self) -> None:
        """Removes what archives left that were being unpacked when the service was killed. Raises StorageError."""
        if self._directory is not None and self._directory.is_dir():
            for leftover in self._directory.glob(f"{_UNPACKING}*"):
                remove_tree(leftover)

    def create(self, memory: str, name: str, report: Report) -> Iterator[SnapshotInfo]:
        """See snapshots.create; without a name, it is made of time and version."""
        yield snapshots.create(
            self._store,
            memory,
            self._shelf(),
            name or None,
            min_free_bytes=self._min_free_bytes,
            report=_files(report),
        )

    def list(self, memory: str) -> list[SnapshotInfo]:
        """See snapshots.list_snapshots; of all memories without a name."""
        return snapshots.list_snapshots(self._shelf(), memory or None)

    def verify(self, ref: SnapshotRef, report: Report) -> Iterator[SnapshotInfo]:
        """See snapshots.verify."""
        with self._opened(ref, report) as path:
            info = snapshots.verify(path, report=_files(report))
            yield replace(info, path=Path(ref.path or path))  # an archive's own directory goes away

    def restore(
        self, ref: SnapshotRef, as_memory: str, replacing: bool, report: Report
    ) -> Iterator[RoutingMemory]:
        """See snapshots.restore."""
        with self._opened(ref, report) as path:
            yield snapshots.restore(
                self._store,
                path,
                as_memory,
                replacing=replacing,
                min_free_bytes=self._min_free_bytes,
                report=_files(report),
            )

    def pack(self, memory: str, name: str, archive: str, report: Report) -> Iterator[SnapshotInfo]:
        """See snapshot_archive.pack."""
        target = _absolute(archive)
        path = snapshots.find(self._shelf(), memory, name)
        snapshots.pack(path, target, report=_files(report))
        yield snapshots.describe(path)

    def delete(self, memory: str, name: str) -> SnapshotInfo:
        """See snapshot_directories.remove."""
        return snapshots.remove(snapshots.find(self._shelf(), memory, name))

    def _shelf(self) -> Path:
        if self._directory is None:
            expected = (
                "edge: memories that are kept in RAM have no snapshots; start the service with --backend edge, or with "
                "the URL of a Qdrant server"
            )
            raise InvalidField("backend", "exact", expected)
        with storage_call(f"create {self._directory}"):
            self._directory.mkdir(parents=True, exist_ok=True)
        return self._directory

    @contextmanager
    def _opened(self, ref: SnapshotRef, report: Report) -> Iterator[Path]:
        """The directory of a snapshot; that of an archive is gone at the end."""
        shelf = self._shelf()
        if not ref.path:
            yield snapshots.find(shelf, ref.memory, ref.name)
            return
        path = _absolute(ref.path)
        if not path.exists():
            raise SnapshotNotFound(f"{shorten(ref.path)}: nothing there, on the service's machine")
        if path.is_dir():
            yield path
            return
        with tempfile.TemporaryDirectory(prefix=_UNPACKING, dir=shelf) as unpacked:
            yield self._unpack(path, Path(unpacked), report)

    def _unpack(self, archive: Path, target: Path, report: Report) -> Path:
        on_file = _files(report, "unpack ")
        least = self._min_free_bytes
        info = snapshots.unpack(archive, target, min_free_bytes=least, report=on_file)
        return Path(info.path)


def _absolute(text: str) -> Path:
    checks.require_text("path", text)
    path = Path(text)
    if not path.is_absolute():
        raise InvalidField("path", text, "an absolute path on the service's machine")
    return path


def _files(report: Report, verb: str = "") -> Callable[[str], None]:
    """Counts the files that snapshots report."""
    done = 0

    def on_file(path: str) -> None:
        nonlocal done
        report(f"{verb}{path}", done, 0)
        done += 1

    return on_file

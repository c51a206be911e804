"""The snapshots of memories on a Qdrant server: the server keeps the files, and a record says which belong together.

Each layer is copied at a moment of its own, while lookups and writes go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from router_service import __version__
from router_service.backends.base import Report
from router_service.backends.qdrant_server.backend import ServerBackend
from router_service.backends.qdrant_server.snapshot_book import ServerSnapshot, SnapshotBook
from router_service.backends.qdrant_server.snapshots import CollectionSnapshots
from router_service.errors import CorruptMemory, InvalidField
from router_service.maintenance.server_making import discard_files, left_to_the_next_sweep, making
from router_service.maintenance.server_restore import Restorer
from router_service.maintenance.shelf import SnapshotRef
from router_service.maintenance.snapshot_directories import SnapshotInfo, require_name
from router_service.memory_layers import collection_names
from router_service.memory_store import MemoryStore
from router_service.routing_memory import RoutingMemory

log = logging.getLogger(__name__)

# Qdrant names a snapshot by the second, and a second one within it would take its place.
_APART_S = 1.1


class ServerShelf:
    """See Shelf. Several services may share the server, and so its snapshots."""

    def __init__(self, store: MemoryStore, backend: ServerBackend) -> None:
        self._store, self._backend = store, backend
        self._snapshots = CollectionSnapshots(backend.connection)
        self._book = SnapshotBook(backend.connection)
        self._restorer = Restorer(store, backend, self._snapshots, self._book)
        self._made: dict[str, float] = {}  # when the last one of a memory was

    def sweep(self) -> None:
        """See Shelf.sweep. What cannot be removed now is logged, and left to the next time."""
        self._restorer.sweep()
        for snapshot in self._book.unfinished()[0]:
            log.warning("removing %s: its creation or deletion never ended", snapshot)
            with left_to_the_next_sweep(snapshot):
                discard_files(self._book, self._snapshots, snapshot)
                self._book.remove(snapshot)

    def create(self, memory: str, name: str, report: Report) -> Iterator[SnapshotInfo]:
        """See Shelf.create. Raises BackendMisconfigured on a cluster of which a node does not hold all shards."""
        served = self._store.get(memory)
        self.sweep()
        collections = self._collections_of(served)
        for collection in collections:
            self._snapshots.require_whole(collection)
        with self._apart(memory):
            snapshot = self._make(served, name, collections, report)
        yield self._info(snapshot)

    def list(self, memory: str) -> list[SnapshotInfo]:
        """See Shelf.list. Whether the server still has the files is for verify()."""
        if memory:
            require_name("memory", memory)
        self.sweep()
        whole, broken = self._book.snapshots(memory)
        infos = [self._info(each) for each in whole]
        infos += [
            SnapshotInfo(owner, name, self._book.place, problem=why)
            for (owner, name), why in broken.items()
        ]
        return sorted(infos, key=lambda info: (info.memory, info.created_unix_ms, info.name))

    def verify(self, ref: SnapshotRef, report: Report) -> Iterator[SnapshotInfo]:
        """See Shelf.verify. What the server lists is compared, and every byte that it hands out."""
        snapshot = self._find(ref)
        for number, layer in enumerate(snapshot.layers):
            told = _told_bytes(report, f"read layer {number}", layer.file.content_bytes)
            with self._snapshots.reachable(layer.file.collection):
                self._snapshots.require_listed(layer.file)
                self._snapshots.read(layer.file, told)
        yield self._info(snapshot)

    def restore(
        self, ref: SnapshotRef, as_memory: str, replacing: bool, report: Report
    ) -> Iterator[RoutingMemory]:
        """See Shelf.restore. Writes that come while it is under way are lost."""
        self.sweep()
        yield self._restorer.restore(self._find(ref), as_memory, replacing, report)

    def pack(self, memory: str, name: str, archive: str, report: Report) -> Iterator[SnapshotInfo]:
        """Raises InvalidField, always: the files are the server's."""
        raise _not_files(archive)
        yield  # the protocol's

    def delete(self, memory: str, name: str) -> SnapshotInfo:
        """See Shelf.delete."""
        snapshot = self._book.find(memory, name)
        self._book.keep(snapshot)  # from here on it is gone
        discard_files(self._book, self._snapshots, snapshot)
        self._book.remove(snapshot)
        return self._info(snapshot)

    @contextmanager
    def _apart(self, memory: str) -> Iterator[None]:
        """Begins in another second than the last one of a memory ended, however that was."""
        last = self._made.get(memory, -_APART_S)
        time.sleep(max(0.0, last + _APART_S - time.monotonic()))
        try:
            yield
        finally:
            self._made[memory] = time.monotonic()

    def _make(
        self, memory: RoutingMemory, name: str, collections: Sequence[str], report: Report
    ) -> ServerSnapshot:
        now, name = time.time_ns() // 1_000_000, self._free_name(memory, name)
        started = ServerSnapshot(name, memory.record, __version__, now)
        with making(self._book, self._snapshots, started) as draft:
            for number, collection in enumerate(collections):
                draft.add(memory, collection, _told(report, "layers", number, len(collections)))
        return draft.snapshot

    def _find(self, ref: SnapshotRef) -> ServerSnapshot:
        if ref.path:
            raise _not_files(ref.path)
        return self._book.find(ref.memory, ref.name)

    def _collections_of(self, memory: RoutingMemory) -> Sequence[str]:
        """Those that the names of a memory's layers lead to."""
        names = collection_names(memory.record)
        led = self._backend.behind(names)
        if missing := [name for name in names if name not in led]:
            raise CorruptMemory(f"the server has no collection for {', '.join(missing)}")
        return [led[name] for name in names]

    def _free_name(self, memory: RoutingMemory, asked: str) -> str:
        """The name asked for, or one of time and version."""
        if asked:
            require_name("snapshot", asked)
            return asked
        taken = {each.name for each in self._book.snapshots(memory.record.name)[0]}
        base, number = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-v{memory.version}", 2
        name = base
        while name in taken:
            name, number = f"{base}-{number}", number + 1
        return name

    def _info(self, snapshot: ServerSnapshot) -> SnapshotInfo:
        return SnapshotInfo(
            snapshot.record.name,
            snapshot.name,
            self._book.place,
            snapshot.created_unix_ms,
            0,
            sum(layer.entries for layer in snapshot.layers),
            sum(layer.file.content_bytes for layer in snapshot.layers),
            snapshot.service_version,
            snapshot.record,
            remark=_remark(snapshot),
        )


def _told(report: Report, stage: str, done: int, total: int) -> Callable[[], None]:
    return lambda: report(stage, done, total)


def _told_bytes(report: Report, stage: str, total: int) -> Callable[[int], None]:
    return lambda done: report(stage, done, total)


def _remark(snapshot: ServerSnapshot) -> str:
    """What is known less well about it."""
    unsure = [number for number, layer in enumerate(snapshot.layers) if not layer.exact]
    unsummed = [number for number, layer in enumerate(snapshot.layers) if not layer.file.sha256]
    said = []
    if unsure:
        said.append(
            f"entries came or went while layers {_listed(unsure)} were copied: about so many"
        )
    if unsummed:
        said.append(
            f"the server gave no checksum of layers {_listed(unsummed)}: only their sizes are known"
        )
    return "; ".join(said)


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _not_files(path: str) -> InvalidField:
    return InvalidField(
        "path",
        path,
        "the name of a snapshot: those of a Qdrant server are the server's, not files of this service; to carry a "
        "memory elsewhere use `router-admin export` or `router-admin migrate`",
    )

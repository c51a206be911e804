"""Snapshots that a Qdrant server keeps: made layer by layer, read, and restored beside what serves, then switched to.

Before each step the intent is written down in the book (see server_book) and renewed while it lasts, so that whoever
comes after a kill knows what to finish or to undo.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

from typing_extensions import override

from router_service import __version__
from router_service.backends.base import Report, Versions
from router_service.backends.qdrant_server.backend import ServerBackend
from router_service.backends.qdrant_server.rest import SnapshotFile
from router_service.backends.qdrant_server.snapshots import CollectionSnapshots, Tick
from router_service.backends.qdrant_server.unwritten import UnwrittenCollection
from router_service.errors import (
    BackendUnavailable,
    Busy,
    Cancelled,
    ForeignCollection,
    InvalidField,
    MemoryExists,
    RoutingServiceError,
    SnapshotInvalid,
    StorageError,
)
from router_service.memories.layer import LayerMemory
from router_service.memories.memory import (
    MemoryRecord,
    RoutingMemory,
    collection_name,
    collection_names,
    spec_of,
)
from router_service.memories.server_catalogue import ServerCatalogue
from router_service.memories.store import MemoryStore, check_name
from router_service.memories.swap import RETIRE_AFTER_S, require_same_model
from router_service.snapshots.base import SnapshotInfo, SnapshotRef, Swept
from router_service.snapshots.files import require_name, timed_name
from router_service.snapshots.server_book import (
    LEFT,
    RENEW_S,
    LayerSnapshot,
    Restoring,
    ServerSnapshot,
    SnapshotBook,
)

log = logging.getLogger(__name__)

# As Qdrant names them: COLLECTION-PEER-2026-01-31-23-59-59.snapshot, in UTC.
_MOMENT = re.compile(r"-(\d{4}(?:-\d{2}){5})\.snapshot")
# How far the clocks of service and server may be apart.
_CLOCKS_S = 60.0


class SnapshotDraft:
    """A snapshot that is being made, layer by layer."""

    def __init__(
        self, book: SnapshotBook, snapshots: CollectionSnapshots, started: ServerSnapshot
    ) -> None:
        self._book, self._snapshots, self.snapshot = book, snapshots, started
        self._kept = time.monotonic()

    def add(self, memory: RoutingMemory, collection: str, report: Tick) -> None:
        """The next layer. Raises StorageError, Busy, and what `report` raises."""
        before = tuple(file.name for file in self._snapshots.list(collection))
        now = time.time_ns() // 1_000_000
        self._keep(replace(self.snapshot, making=collection, making_since_ms=now, before=before))
        version, entries = memory.version, self._snapshots.count(collection)
        file = self._snapshots.create(collection, lambda: self._tick(report))
        if file.name in before:
            raise Busy(
                f"the server has put it in the place of {file.name!r}, made in the same second; make it again"
            )
        after = self._snapshots.count(collection)
        layer = LayerSnapshot(file, after, exact=(version, entries) == (memory.version, after))
        self._keep(
            replace(self.snapshot, layers=(*self.snapshot.layers, layer), making="", before=())
        )

    def _keep(self, snapshot: ServerSnapshot) -> None:
        self._book.keep(snapshot)
        self.snapshot, self._kept = snapshot, time.monotonic()

    def _tick(self, report: Tick) -> None:
        report()
        if time.monotonic() > self._kept + RENEW_S:
            self._keep(self.snapshot)


@contextmanager
def making(
    book: SnapshotBook, snapshots: CollectionSnapshots, started: ServerSnapshot
) -> Iterator[SnapshotDraft]:
    """A snapshot that is whole at the end; when something is raised inside, nothing is left of it."""
    book.begin(started)
    draft = SnapshotDraft(book, snapshots, started)
    try:
        yield draft
        book.commit(draft.snapshot)
    except BaseException as error:
        with left_to_the_next_sweep(started):
            discard_files(book, snapshots, draft.snapshot)
            if outcome_unknown(error):
                book.leave(draft.snapshot)
            else:
                book.remove(draft.snapshot)
        raise


def discard_files(
    book: SnapshotBook, snapshots: CollectionSnapshots, snapshot: ServerSnapshot
) -> None:
    """Removes what the server keeps of a snapshot. Raises StorageError."""
    for layer in snapshot.layers:
        with snapshots.reachable(layer.file.collection):
            snapshots.delete(layer.file.collection, layer.file.name)
    if snapshot.making:
        known = book.files(but=snapshot)
        with snapshots.reachable(snapshot.making):
            for file in snapshots.list(snapshot.making):
                if file not in known and _is_stray(file, snapshot):
                    snapshots.delete(file.collection, file.name)


@contextmanager
def left_to_the_next_sweep(what: object) -> Iterator[None]:
    """Logs what cannot be removed now."""
    try:
        yield
    except StorageError as error:
        log.warning("what is left of %s stays for now: %s", what, error)


def outcome_unknown(error: BaseException) -> bool:
    """Whether the server may still be at work on what failed here."""
    return isinstance(error, BackendUnavailable | Cancelled) or not isinstance(
        error, RoutingServiceError
    )


def _is_stray(file: SnapshotFile, snapshot: ServerSnapshot) -> bool:
    """Whether a file is what the server made when the service did not hear of it, and not another program's."""
    moment = _MOMENT.search(file.name)
    if file.name in snapshot.before or moment is None:
        return False
    made = datetime.strptime(moment[1], "%Y-%m-%d-%H-%M-%S").replace(tzinfo=UTC)
    return abs(made.timestamp() - snapshot.making_since_ms / 1000) < _CLOCKS_S


class Restorer:
    """Of one server. What was killed is finished when its names were switched already, else undone: by sweep()."""

    def __init__(
        self,
        store: MemoryStore,
        backend: ServerBackend,
        snapshots: CollectionSnapshots,
        book: SnapshotBook,
    ) -> None:
        self._store, self._backend, self._snapshots, self._book = store, backend, snapshots, book
        self._catalogue = ServerCatalogue(backend)

    def restore(
        self, snapshot: ServerSnapshot, as_memory: str, replacing: bool, report: Report
    ) -> RoutingMemory:
        """As SnapshotStore.restore."""
        record = replace(snapshot.record, name=as_memory, collections=())
        self._require_room(record, replacing)
        with self._under_way(record) as draft:
            for number, layer in enumerate(snapshot.layers):
                self._fill(draft, number, layer, report)
            self._publish(draft, replacing)
        self._retire(draft.restoring)
        return self._store.get(as_memory)

    def sweep(self) -> None:
        """Finishes or undoes what was killed. Raises StorageError."""
        _, killed = self._book.unfinished()
        for restoring in self._book.restores():
            if restoring in killed:
                log.warning("%s was never finished", restoring)
                with left_to_the_next_sweep(restoring):
                    self._settle(restoring)
                    self._book.remove_restore(restoring)
            elif self._is_led_to(restoring):  # another service may be about to do this itself
                self._commit(restoring)

    def _require_room(self, record: MemoryRecord, replacing: bool) -> MemoryRecord | None:
        """The record of the memory that is to be replaced, if there is one."""
        check_name(record.name)
        self._store.refresh()
        if record.name not in self._store.names() and record.name not in self._store.broken:
            return None
        if not replacing:
            raise MemoryExists(record.name)
        present = self._catalogue.find(record.name)
        if present is not None:
            remedy = f"restore it under a name other than {record.name!r}"
            require_same_model(present, record, "memory", "snapshot", remedy)
        return present

    @contextmanager
    def _under_way(self, record: MemoryRecord) -> Iterator[_Draft]:
        draft = _Draft(self._book, Restoring(secrets.token_hex(4), record))
        self._book.begin_restore(draft.restoring)
        try:
            yield draft
        except BaseException as error:
            with left_to_the_next_sweep(draft.restoring):
                self._settle(draft.restoring)
                if outcome_unknown(error):
                    self._book.keep_restore(draft.restoring, LEFT)
                else:
                    self._book.remove_restore(draft.restoring)
            if isinstance(error, BackendUnavailable):
                self._store.unfinished.append(partial(self._finish, draft.restoring))
            raise

    def _fill(self, draft: _Draft, number: int, layer: LayerSnapshot, report: Report) -> None:
        """A collection with the entries of a layer, checked."""
        file, record = layer.file, draft.restoring.record
        target = self._backend.fresh_name(collection_name(record.name, number))
        draft.keep(collections=(*draft.restoring.collections, target))

        def tick(done: int = 0) -> None:
            _report_bytes(report, f"restore layer {number}", file, done)
            draft.renew()

        with self._snapshots.reachable(file.collection):
            self._snapshots.require_listed(file)
            self._snapshots.restore(file, target, tick)
        self._backend.connection.wait_for(target)
        self._snapshots.require_whole(target)
        try:
            self._backend.require_spec(target, spec_of(record))
        except ForeignCollection as error:
            raise SnapshotInvalid(f"layer {number} is not what its record says: {error}") from error
        self._backend.index_fields(target)
        if layer.exact:
            self._snapshots.require_count(target, layer.entries, tick)

    def _publish(self, draft: _Draft, replacing: bool) -> None:
        """From here on it is the memory, for this service and all others."""
        with self._store.exclusive():
            present = self._require_room(draft.restoring.record, replacing)
            record = _pinned(draft.restoring, present)
            names = collection_names(record)
            led = self._backend.behind(names)
            draft.keep(record=record, replaced=tuple(led.get(name, "") for name in names))
            if present is None and record.name not in self._store.broken:
                self._catalogue.begin(record)
            self._backend.publish(dict(zip(names, record.collections, strict=True)))
            self._catalogue.commit(record)  # with which lookups change over
            if record.name in self._store.names():
                self._store.serve(self._successor(record))
            self._store.broken.pop(record.name, None)
            self._store.refresh()

    def _successor(self, record: MemoryRecord) -> RoutingMemory:
        """The restored memory in the place of the one that serves: versions go on, what was counted stays counted."""
        old, model, layers = self._store.get(record.name), record.fingerprint, []
        for number, before in enumerate(old.layers):
            name, own = collection_names(record)[number], record.collections[number]
            collection = self._backend.open_behind(name, spec_of(record), own)
            layer = LayerMemory(number, collection, model.num_experts, model.top_k, before.hits)
            layer.counters = before.counters
            layers.append(layer)
        return RoutingMemory(record, layers, Versions(old.version + 1))

    def _retire(self, restoring: Restoring) -> None:
        if any(restoring.replaced):
            time.sleep(RETIRE_AFTER_S)
        with left_to_the_next_sweep(restoring):
            if self._catalogue.find(restoring.record.name) is not None:
                self._write_down(
                    restoring
                )  # again, should others have changed its settings just then
            self._drop(restoring.replaced)
            self._book.remove_restore(restoring)

    def _settle(self, restoring: Restoring) -> None:
        """Either all names lead to the new collections, and the others go; or none does, and the new ones go."""
        if self._is_led_to(restoring):
            self._commit(restoring)
            self._drop(restoring.replaced)
            return
        self._lead_back(restoring)
        self._drop(restoring.collections)
        announced = restoring.replaced and not any(restoring.replaced)
        if announced and self._catalogue.find(restoring.record.name) is None:
            self._catalogue.remove(restoring.record)

    def _is_led_to(self, restoring: Restoring) -> bool:
        names = collection_names(restoring.record)
        led = self._backend.behind(names)
        return [led.get(name) for name in names] == list(restoring.collections)

    def _finish(self, restoring: Restoring) -> None:
        """Nothing but the record may be missing: then writes are refused until it is there."""
        if self._is_led_to(restoring):
            self._write_down(restoring)

    def _commit(self, restoring: Restoring) -> None:
        self._write_down(restoring)
        self._store.refresh()

    def _write_down(self, restoring: Restoring) -> None:
        """Unless it was done, or the memory has changed since."""
        record = replace(restoring.record, collections=restoring.collections)
        present = self._catalogue.find(record.name)
        if present is None or present.created_unix_ms < record.created_unix_ms:
            self._catalogue.commit(record)

    def _lead_back(self, restoring: Restoring) -> None:
        """Undoes a switch of which the server did a part only."""
        names = collection_names(restoring.record)
        led = self._backend.behind(names)
        before = dict(zip(names, restoring.replaced, strict=False))
        for name in names:
            if led.get(name) in restoring.collections:
                if before.get(name):
                    self._backend.publish({name: before[name]})
                else:
                    self._backend.drop(name)

    def _drop(self, collections: tuple[str, ...]) -> None:
        for collection in self._backend.unled(filter(None, collections)):
            self._backend.drop_unnamed(collection)


class _Draft:
    """How far a restore is, and its record on the server."""

    def __init__(self, book: SnapshotBook, restoring: Restoring) -> None:
        self._book, self.restoring = book, restoring
        self._kept = time.monotonic()

    def keep(self, **changes: object) -> None:
        """Writes down what is about to be done."""
        self.restoring = replace(self.restoring, **changes)  # type: ignore[arg-type]
        self._book.keep_restore(self.restoring)
        self._kept = time.monotonic()

    def renew(self) -> None:
        """Shows now and then that it is alive."""
        if time.monotonic() > self._kept + RENEW_S:
            self.keep()


def _pinned(restoring: Restoring, present: MemoryRecord | None) -> MemoryRecord:
    """The record of what is restored, created now, and after the memory that it replaces."""
    earliest = 0 if present is None else present.created_unix_ms + 1
    created = max(time.time_ns() // 1_000_000, earliest)
    return replace(restoring.record, created_unix_ms=created, collections=restoring.collections)


# Qdrant names a snapshot by the second, and a second one within it would take its place.
_APART_S = 1.1


class ServerSnapshotStore(Swept):
    """Several services may share the server, and so its snapshots."""

    def __init__(self, store: MemoryStore, backend: ServerBackend) -> None:
        self._store, self._backend = store, backend
        self._snapshots = CollectionSnapshots(backend.connection)
        self._book = SnapshotBook(backend.connection)
        self._restorer = Restorer(store, backend, self._snapshots, self._book)
        self._made: dict[str, float] = {}  # when the last one of a memory was

    @override
    def sweep(self) -> None:
        """What cannot be removed now is logged, and left to the next time."""
        self._restorer.sweep()
        for snapshot in self._book.unfinished()[0]:
            log.warning("removing %s: its creation or deletion never ended", snapshot)
            with left_to_the_next_sweep(snapshot):
                discard_files(self._book, self._snapshots, snapshot)
                self._book.remove(snapshot)

    @override
    def create(self, memory: str, name: str, report: Report) -> Iterator[SnapshotInfo]:
        """Raises BackendMisconfigured on a cluster of which a node does not hold all shards."""
        self.sweep()
        self._store.refresh()
        served = self._store.get(memory)
        collections = served.record.collections
        for layer in served.layers:  # Qdrant has no snapshot of what is not there
            if isinstance(layer.collection, UnwrittenCollection):
                layer.collection.make()
        for collection in collections:
            self._snapshots.require_whole(collection)
        with self._apart(memory):
            snapshot = self._make(served, name, collections, report)
        yield self._info(snapshot)

    @override
    def list(self, memory: str) -> list[SnapshotInfo]:
        """Whether the server still has the files is for verify()."""
        if memory:
            require_name("memory", memory)
        self.sweep()
        whole, broken = self._book.snapshots(memory)
        infos = [self._info(each) for each in whole]
        infos += [
            SnapshotInfo(owner, name, self._book.location, problem=why)
            for (owner, name), why in broken.items()
        ]
        return sorted(infos, key=lambda info: (info.memory, info.created_unix_ms, info.name))

    @override
    def verify(self, ref: SnapshotRef, report: Report) -> Iterator[SnapshotInfo]:
        """What the server lists is compared, and every byte that it hands out."""
        snapshot = self._find(ref)
        for number, layer in enumerate(snapshot.layers):
            tick = partial(_report_bytes, report, f"read layer {number}", layer.file)
            with self._snapshots.reachable(layer.file.collection):
                self._snapshots.require_listed(layer.file)
                self._snapshots.read(layer.file, tick)
        yield self._info(snapshot)

    @override
    def restore(
        self, ref: SnapshotRef, as_memory: str, replacing: bool, report: Report
    ) -> Iterator[RoutingMemory]:
        """Writes that come while it is under way are lost."""
        self.sweep()
        yield self._restorer.restore(self._find(ref), as_memory, replacing, report)

    @override
    def delete(self, memory: str, name: str) -> SnapshotInfo:
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
                tick = partial(report, "layers", number, len(collections))
                draft.add(memory, collection, tick)
        return draft.snapshot

    def _find(self, ref: SnapshotRef) -> ServerSnapshot:
        if ref.path:
            raise InvalidField(
                "path",
                ref.path,
                "the name of a snapshot: those of a Qdrant server are the server's, not files of this service; to "
                "carry a memory elsewhere use `router-admin export` or `router-admin migrate`",
            )
        return self._book.find(ref.memory, ref.name)

    def _free_name(self, memory: RoutingMemory, asked: str) -> str:
        """The name asked for, or one of time and version."""
        if asked:
            require_name("snapshot", asked)
            return asked
        taken = {each.name for each in self._book.snapshots(memory.record.name)[0]}
        return timed_name(memory.version, taken.__contains__)

    def _info(self, snapshot: ServerSnapshot) -> SnapshotInfo:
        return SnapshotInfo(
            snapshot.record.name,
            snapshot.name,
            self._book.location,
            snapshot.created_unix_ms,
            0,
            sum(layer.entries for layer in snapshot.layers),
            sum(layer.file.content_bytes for layer in snapshot.layers),
            snapshot.service_version,
            snapshot.record,
            remark=_remark(snapshot),
        )


def _report_bytes(report: Report, stage: str, file: SnapshotFile, done: int) -> None:
    report(stage, done, file.content_bytes)


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

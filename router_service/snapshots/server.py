"""Snapshots of memories on a Qdrant server: the files of the embedded backend, made and read entry by entry.

A restore writes new collections beside what serves, and lets the names lead to them when they are right. Before each
step the intent is written down on the server (see server_book) and renewed while it lasts, so that whoever comes after
a kill knows what to finish or to undo.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from typing_extensions import override

from router_service import __version__
from router_service.arrays import U64, rest_digests
from router_service.backends.base import CollectionReader, Compression, Report, Versions, pages
from router_service.backends.disk import FreeSpace, disk_bytes, remove_tree
from router_service.backends.edge.backend import ISOLATE_ABOVE_BYTES, EdgeBackend
from router_service.backends.qdrant_server.backend import ServerBackend
from router_service.backends.qdrant_server.collection import ServerCollection
from router_service.backends.qdrant_server.snapshots import remove_snapshot
from router_service.errors import (
    BackendUnavailable,
    Busy,
    Cancelled,
    CollectionClosed,
    CorruptMemory,
    InvalidField,
    MemoryExists,
    RoutingServiceError,
    SnapshotInvalid,
    SnapshotNotFound,
    StorageError,
)
from router_service.memories.known_keys import require_found
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
from router_service.snapshots.base import Restored, SnapshotInfo, SnapshotRef
from router_service.snapshots.copying import Tick, bytes_of, copy_memory, side_by_side
from router_service.snapshots.files import (
    check_contents,
    check_listing,
    contents_of,
    copy_files,
)
from router_service.snapshots.local import LocalSnapshotStore, counting, make, scratch
from router_service.snapshots.manifest import SnapshotManifest, layer_directory, read_manifest
from router_service.snapshots.server_book import (
    LEFT,
    RENEW_S,
    EarlierSnapshot,
    Restoring,
    SnapshotBook,
)

log = logging.getLogger(__name__)

_PAGE_ENTRIES = 1024
_QUANTIZE = "`router-admin quantize` builds what it has"
_EARLIER = (
    "made by router-service 0.1.0, and kept by the Qdrant server as files of its own: restore it with that version, or "
    "by Qdrant's own means, and make another one; `snapshot delete` removes it from the server"
)


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


class Restorer:
    """Of one server. What was killed is finished when its names were switched already, else undone: by sweep()."""

    def __init__(self, store: MemoryStore, backend: ServerBackend, book: SnapshotBook) -> None:
        self._store, self._backend, self._book = store, backend, book
        catalogue = store.catalogue
        assert isinstance(catalogue, ServerCatalogue)  # noqa: S101  # as for any store on a server
        self._catalogue = catalogue

    def restore(
        self, path: Path, files: Path, as_memory: str, replacing: bool, report: Report
    ) -> Restored:
        """As LocalSnapshotStore.restore(), of the snapshot at `path`. `files`: an empty directory, for copies."""
        manifest = read_manifest(path)
        record = replace(manifest.record, name=as_memory, collections=())
        self._require_room(record, replacing)
        check_listing(path, manifest)
        check_contents(path, manifest, counting(report, "check "))
        with self._under_way(record) as draft:
            own = [self._backend.fresh_name(name) for name in collection_names(record)]
            draft.keep(collections=tuple(own))
            layers = [
                _LayerFill(self._backend, record, own[n], path, files / str(n), manifest, n)
                for n in range(len(own))
            ]

            def tick() -> None:
                draft.renew()
                report("copy entries", sum(each.done for each in layers), sum(manifest.entries))

            side_by_side([layer.run for layer in layers], tick)
            self._publish(draft, replacing)
        self._retire(draft.restoring)
        remark = "; ".join(filter(None, (each.lacks for each in layers)))
        if remark:
            remark += (
                f": this server does not have that, and searches the keys themselves; {_QUANTIZE}"
            )
        return Restored(self._store.get(as_memory), remark)

    def sweep(self) -> None:
        """Finishes or undoes what was killed. Raises StorageError."""
        killed = self._book.killed()
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
            with left_to_the_next_sweep(draft.restoring):
                self._backend.forget_lost(() if present is None else present.collections)

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
                # Again, should others have changed its settings just then.
                self._write_down(restoring)
            self._complete(restoring)
            self._book.remove_restore(restoring)

    def _settle(self, restoring: Restoring) -> None:
        """Either the memory has the new collections, and the others go; or it has not, and the new ones go."""
        if self._is_done(restoring):
            self._commit(restoring)
            self._complete(restoring)
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

    def _is_done(self, restoring: Restoring) -> bool:
        """Whether the record names the new collections, or all names lead there, which comes before."""
        return self._is_recorded(restoring) or self._is_led_to(restoring)

    def _is_recorded(self, restoring: Restoring) -> bool:
        record = self._catalogue.due(restoring.record.name)
        return record is not None and record.collections == restoring.collections != ()

    def _complete(self, restoring: Restoring) -> None:
        """Removes what was replaced; also what a first write made meanwhile, which took a name for itself."""
        taken: list[str] = []
        if self._is_recorded(restoring) and not self._is_led_to(restoring):
            names = collection_names(restoring.record)
            taken = self._backend.publish(dict(zip(names, restoring.collections, strict=True)))
        self._drop((*restoring.replaced, *taken))

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
        """Those that no alias leads to, and no memory's record names."""
        for collection in self._backend.unled(filter(None, collections)):
            if not self._backend.named(collection):
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


class _LayerFill:
    """A layer of a snapshot on its way into a collection that no name leads to."""

    def __init__(
        self,
        backend: ServerBackend,
        record: MemoryRecord,
        collection: str,
        path: Path,
        files: Path,
        manifest: SnapshotManifest,
        number: int,
    ) -> None:
        self._backend, self._record, self._collection = backend, record, collection
        self._path, self._files, self._manifest = path, files, manifest
        self._name, self._number = layer_directory(number), number
        self.done = 0  # entries that were written
        self.lacks = ""  # what the server does not have

    def run(self, tick: Tick) -> None:
        """Raises SnapshotInvalid, CorruptMemory or StorageError."""
        self._copy_files(tick)
        spec = spec_of(self._record)
        large = self._manifest.entries[self._number] * 4 * spec.dimension > ISOLATE_ABOVE_BYTES
        engine = EdgeBackend(
            self._files, min_free_bytes=0, isolate_above_bytes=-1 if large else ISOLATE_ABOVE_BYTES
        )
        try:
            try:
                source = engine.open(self._name, spec)
                compression, entries = source.info().compression, source.info().entries
                if entries != self._manifest.entries[self._number]:
                    raise CorruptMemory(f"it has {entries} entries")
            except CorruptMemory as error:
                raise SnapshotInvalid(
                    f"{self._path} is whole but layer {self._number} cannot be opened ({error}); use another snapshot, "
                    f"or the version of router-service that wrote it ({self._manifest.service_version})"
                ) from error
            self._backend.create_unnamed(self._collection, spec)
            name = collection_name(self._record.name, self._number)
            target = self._backend.unopened(name, spec, self._collection)
            self._require_same(self._written(source, target, tick), target, tick)
        finally:
            engine.close()
            remove_tree(self._files)
        self._quantize(target, compression)
        # What it replaces may be indexed, and be asked more than a search of all entries can answer.
        target.optimize(report=lambda *_: tick())
        require_found(target, f"layer {self._number} of memory {self._record.name!r}")

    def _copy_files(self, tick: Tick) -> None:
        """The engine writes to what it opens, so the snapshot's own files are never opened."""
        own = {p: c for p, c in self._manifest.files.items() if p.startswith(f"{self._name}/")}

        def on_file(_: str) -> None:
            tick()

        copy_files(self._path, own, self._files, on_file)
        part = replace(self._manifest, files=own)
        check_contents(self._files, part, on_file, named=self._path)

    def _written(
        self, source: CollectionReader, target: ServerCollection, tick: Tick
    ) -> tuple[U64, U64]:
        """Writes every entry; returns ids and digests of all but the keys."""
        ids, digests = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        for page in pages(source, target.entries_per_page, with_keys=True):
            tick()
            target.fill(page)
            ids.append(page.ids)
            digests.append(rest_digests(page))
            self.done += len(page)
        return np.concatenate(ids), np.concatenate(digests)

    def _require_same(self, written: tuple[U64, U64], target: ServerCollection, tick: Tick) -> None:
        """Raises CorruptMemory unless a collection lists what was written, and nothing else."""
        ids, digests = written
        start = 0
        for page in pages(target, _PAGE_ENTRIES, with_keys=False):
            tick()
            rows = slice(start, start + len(page))
            same = np.array_equal(ids[rows], page.ids)
            if not same or not np.array_equal(digests[rows], rest_digests(page)):
                raise self._differs(start, len(ids))
            start += len(page)
        if start < len(ids):
            raise self._differs(start, len(ids))

    def _differs(self, right: int, written: int) -> CorruptMemory:
        return CorruptMemory(
            f"the server's collection {self._collection!r} does not hold what was written to it: of {written} entries "
            f"the first {right} are right; look at the server's disks and log, and restore again"
        )

    def _quantize(self, target: ServerCollection, wanted: Compression) -> None:
        """As the layer was, if the server can."""
        if wanted.apart or not target.quantize(wanted):
            self.lacks = f"layer {self._number} was quantized as {wanted.label}"


class ServerSnapshotStore(LocalSnapshotStore):
    """Files like those of the embedded backend; and what version 0.1.0 left on the server, to be seen and removed."""

    def __init__(
        self,
        store: MemoryStore,
        backend: ServerBackend,
        directory: Path | None,
        min_free_bytes: int | None = None,
        pack_dir: Path | None = None,
    ) -> None:
        super().__init__(store, directory, min_free_bytes, pack_dir)
        self._book = SnapshotBook(backend.connection)
        self.backend = backend
        self._restorer = Restorer(store, backend, self._book)

    @override
    def sweep(self) -> None:
        """What cannot be removed now is logged, and left to the next time."""
        super().sweep()
        self._restorer.sweep()

    @override
    def home(self) -> Path:
        if self._directory is None:
            expected = (
                "a directory for snapshots: start the service with --snapshot-dir DIR (ROUTER_SERVICE_SNAPSHOT_DIR), "
                "or with --data DIR, whose directory `snapshots` it is then"
            )
            raise InvalidField("--snapshot-dir", "nothing", expected)
        return super().home()

    @override
    def create(self, memory: str, name: str, report: Report) -> Iterator[SnapshotInfo]:
        """Writes wait for the last listing only, and not at all while none come."""
        home = self.home()
        self._restorer.sweep()
        self._store.refresh()
        served = self._store.get(memory)
        entries = sum(layer.info().entries for layer in served.layers)

        def current() -> MemoryRecord:
            self._store.refresh()
            if self._store.get(memory) is not served:
                raise Busy(
                    f"memory {memory!r} was replaced or deleted while it was copied; make the snapshot again"
                )
            return served.record

        def copy(directory: Path, snapshot: str) -> SnapshotManifest:
            try:
                made = copy_memory(served, directory, current, report, self._min_free_bytes)
            except CollectionClosed:
                current()  # says so better
                raise
            return SnapshotManifest(
                snapshot,
                __version__,
                made.created_unix_ms,
                made.write_pause_ms,
                replace(made.record, collections=()),
                made.entries,
                contents_of(directory, counting(report, "sum ")),
            )

        needed = bytes_of(served.record, entries)
        yield make(served, home, name or None, copy, needed, self._min_free_bytes)

    @override
    def list(self, memory: str) -> list[SnapshotInfo]:
        infos = super().list(memory)
        self._restorer.sweep()
        infos += [
            SnapshotInfo(each.memory, each.name, self._book.location, problem=_EARLIER)
            for each in self._book.earlier(memory)
        ]
        return sorted(infos, key=lambda info: (info.memory, info.created_unix_ms, info.name))

    @override
    def restore(
        self, ref: SnapshotRef, as_memory: str, replacing: bool, report: Report
    ) -> Iterator[Restored]:
        """Writes that come while it is under way are lost."""
        self._restorer.sweep()
        with self.opened(ref, report) as path, scratch(self.home()) as files:
            FreeSpace(files, self._min_free_bytes).require(disk_bytes(path))
            yield self._restorer.restore(path, files, as_memory, replacing, report)

    @override
    def delete(self, memory: str, name: str) -> SnapshotInfo:
        earlier = self._earlier(memory, name)
        if earlier is None or name in (each.name for each in super().list(memory)):
            return super().delete(memory, name)
        for collection, file in earlier.files:
            remove_snapshot(self.backend.connection, collection, file)
        self._book.remove(earlier)
        return SnapshotInfo(memory, name, self._book.location, problem=_EARLIER)

    def _earlier(self, memory: str, name: str) -> EarlierSnapshot | None:
        return next((each for each in self._book.earlier(memory) if each.name == name), None)

    @override
    def find(self, memory: str, name: str) -> Path:
        try:
            return super().find(memory, name)
        except SnapshotNotFound:
            if self._earlier(memory, name) is None:
                raise
        raise SnapshotInvalid(f"snapshot {name!r} of memory {memory!r} was {_EARLIER}")

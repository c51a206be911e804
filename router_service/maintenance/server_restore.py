"""Makes memories of the snapshots that a Qdrant server keeps: new collections first, then one switch of all layers."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from router_service.backends.base import Report
from router_service.backends.qdrant_server.backend import ServerBackend
from router_service.backends.qdrant_server.catalogue import ServerCatalogue
from router_service.backends.qdrant_server.snapshot_book import (
    LEFT,
    RENEW_S,
    LayerSnapshot,
    Restoring,
    ServerSnapshot,
    SnapshotBook,
)
from router_service.backends.qdrant_server.snapshots import CollectionSnapshots
from router_service.errors import ForeignCollection, MemoryExists, SnapshotInvalid
from router_service.layer_memory import LayerMemory
from router_service.maintenance.adoption import require_same_model
from router_service.maintenance.server_making import left_to_the_next_sweep, outcome_unknown
from router_service.maintenance.snapshots import RETIRE_AFTER_S
from router_service.memory_layers import collection_name, collection_names, spec_of
from router_service.memory_store import MemoryStore, check_name
from router_service.routing_memory import MemoryRecord, RoutingMemory

log = logging.getLogger(__name__)


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
        self._catalogue = ServerCatalogue(backend.connection)

    def restore(
        self, snapshot: ServerSnapshot, as_memory: str, replacing: bool, report: Report
    ) -> RoutingMemory:
        """See Shelf.restore."""
        record = replace(snapshot.record, name=as_memory)
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
            raise

    def _fill(self, draft: _Draft, number: int, layer: LayerSnapshot, report: Report) -> None:
        """A collection with the entries of a layer, checked."""
        file, record = layer.file, draft.restoring.record
        target = self._backend.fresh_name(collection_name(record.name, number))
        draft.keep(collections=(*draft.restoring.collections, target))

        def tick(done: int = 0) -> None:
            report(f"restore layer {number}", done, file.content_bytes)
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
            record = _stamped(draft.restoring.record, present)
            names = collection_names(record)
            led = self._backend.behind(names)
            with self._backend.held(led):  # lookups go on there until the settings change too
                draft.keep(record=record, replaced=tuple(led.get(name, "") for name in names))
                if present is None and record.name not in self._store.broken:
                    self._catalogue.begin(record)
                self._backend.publish(dict(zip(names, draft.restoring.collections, strict=True)))
                self._catalogue.commit(record)
            if record.name in self._store.names():
                self._store.serve(self._successor(record))
            self._store.broken.pop(record.name, None)
            self._store.refresh()

    def _successor(self, record: MemoryRecord) -> RoutingMemory:
        """The restored memory in the place of the one that serves: versions go on, what was counted stays counted."""
        old, model, layers = self._store.get(record.name), record.fingerprint, []
        for number, before in enumerate(old.layers):
            collection = self._backend.opened_anew(
                collection_names(record)[number], spec_of(record)
            )
            layer = LayerMemory(number, collection, model.num_experts, model.top_k, before.hits)
            layer.counters = before.counters
            layers.append(layer)
        memory = RoutingMemory(record, layers)
        memory.version = old.version + 1
        return memory

    def _retire(self, restoring: Restoring) -> None:
        if any(restoring.replaced):
            time.sleep(RETIRE_AFTER_S)
        with left_to_the_next_sweep(restoring):
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

    def _commit(self, restoring: Restoring) -> None:
        """Unless it was done, or the memory has changed since."""
        record = restoring.record
        present = self._catalogue.find(record.name)
        if present is None or present.created_unix_ms < record.created_unix_ms:
            self._catalogue.commit(record)
            self._store.refresh()

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


def _stamped(record: MemoryRecord, present: MemoryRecord | None) -> MemoryRecord:
    """Created now, and after the memory that it replaces."""
    earliest = 0 if present is None else present.created_unix_ms + 1
    return replace(record, created_unix_ms=max(time.time_ns() // 1_000_000, earliest))

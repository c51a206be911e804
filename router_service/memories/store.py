"""Every memory of a service: makes, finds and removes them, on disk, on a server, or in RAM."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from router_service import fingerprint as identity
from router_service.backends.base import Backend, Collection, Pinning, Versions
from router_service.errors import (
    Busy,
    CollectionClosed,
    CorruptMemory,
    ForeignCollection,
    InvalidField,
    MemoryExists,
    MemoryNotFound,
    NewerFormat,
    StorageError,
)
from router_service.fingerprint import ModelFingerprint
from router_service.memories import settings as memory_settings
from router_service.memories.catalogue import DOOMED, Catalogue, FileCatalogue, RamCatalogue
from router_service.memories.hit_counts import HitCounter
from router_service.memories.layer import LayerMemory
from router_service.memories.manifest import hits_file, home_of, remove_strays
from router_service.memories.memory import (
    MemoryRecord,
    RoutingMemory,
    are_read_alike,
    close_all,
    collection_name,
    collection_names,
    forget_hits,
    spec_of,
)
from router_service.memories.settings import MemorySettings
from router_service.memories.unfinished_swaps import NameSwaps, finish_file_swaps

log = logging.getLogger(__name__)

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Some file systems do not tell capitals from small letters.
_RESERVED = re.compile(rf"(?i:LOCK|CURRENT|gen-.*|.*{re.escape(DOOMED)})")
# Between two looks at a shared catalogue for a name that is not known.
_LOOK_AGAIN_S = 0.2
# Layers of a new memory that are made side by side, and of an old one that are removed.
_MADE_TOGETHER, _DROPPED_TOGETHER = 8, 64


class MemoryStore:
    """Memories by name. Safe to call from several threads."""

    def __init__(
        self,
        backend: Backend,
        directory: Path | None,
        *,
        shared: Catalogue | None = None,
        hits: Path | None = None,
    ) -> None:
        """Memories under a directory, or with None in RAM, or those of a catalogue that other services share.

        `hits`: where a shared memory's hit counts of this service lie; None: they end with it.
        """
        self._backend = backend
        self._directory = directory
        self._shared, self._looked = shared is not None, -_LOOK_AGAIN_S
        self._catalogue: Catalogue = shared or (
            FileCatalogue(directory) if directory is not None else RamCatalogue()
        )
        self._hits = hits if directory is None else directory
        self.swaps = NameSwaps(backend, self._catalogue)
        # What this service began, and a server that went away kept it from ending: tried again by refresh().
        self.unfinished: list[Callable[[], None]] = []
        self._memories: dict[str, RoutingMemory] = {}
        # Memories that could not be opened, with the reason: named in errors, never deleted.
        self.broken: dict[str, StorageError] = {}  # why they do not serve
        self._closed = False
        self._in_the_making: set[str] = set()  # by create(), which does not hold the lock meanwhile
        self._lock = threading.RLock()

    @property
    def directory(self) -> Path | None:
        """Where the memories lie; None when they are in RAM or on a server."""
        return self._directory

    @property
    def location(self) -> str:
        """Where the memories are, human-readable."""
        return self._catalogue.location

    @property
    def catalogue(self) -> Catalogue:
        """Where it is written down which memories there are."""
        return self._catalogue

    def away(self) -> list[str]:
        """Nodes of the storage that get no work at this moment, and why."""
        return self._catalogue.away()

    def at_risk(self) -> str:
        """What the loss of one node of the storage makes unreadable, and the remedy. Raises StorageError."""
        return self._catalogue.at_risk()

    def exclusive(self) -> AbstractContextManager[bool]:
        """Inside, no other thread makes or removes a memory; lookups and writes go on."""
        return self._lock

    def open_all(self) -> None:
        """Opens what there is; a memory that is corrupt is set aside with its reason, the others serve.

        Raises ForeignCollection where a collection is not this service's: then it must not serve at all.
        """
        if self._directory is not None:
            finish_file_swaps(self._directory)
        found = self.swaps.finished(self._let_go)
        for name, reason in found.broken.items():
            self._set_aside(name, reason)
        for record in found.leftovers:
            self._sweep(record)
        for record in found.records:
            self._open_one(record)

    def refresh(self) -> None:
        """Follows what other services changed of shared memories. Raises StorageError."""
        if not self._shared:
            return
        with self._lock:
            self._try_again()
            found = self.swaps.finished(self._let_go, stale_only=True)
            known = {record.name: record for record in found.records}
            for name in set(self._memories) - set(known):
                self._let_go(name)
            self.broken = {name: why for name, why in self.broken.items() if name in known}
            self.broken |= found.broken
            for record in found.records:
                if record.name not in self._in_the_making:
                    self._follow(record)

    def names(self) -> list[str]:
        """Names of the memories that serve, sorted."""
        return sorted(self._memories)

    def memories(self) -> list[RoutingMemory]:
        """The memories that serve, by name."""
        return [memory for _, memory in sorted(self._memories.items())]

    def latest(self) -> list[RoutingMemory]:
        """memories(), with what other services changed until now. Raises StorageError."""
        self.refresh()
        return self.memories()

    def get(self, name: str) -> RoutingMemory:
        """Raises MemoryNotFound, or CorruptMemory (NewerFormat) for one that was set aside."""
        memory = self._memories.get(name)
        if memory is None and self._shared and time.monotonic() > self._looked + _LOOK_AGAIN_S:
            self._looked = time.monotonic()
            self.refresh()  # it may be another service's, and new
            memory = self._memories.get(name)
        if memory is None:
            if name in self.broken:
                why = self.broken[name]
                error = NewerFormat if isinstance(why, NewerFormat) else CorruptMemory
                raise error(f"memory {name!r} was set aside at start: {why}")
            raise MemoryNotFound(name, self.names())
        return memory

    def asked(self, name: str, ask: Callable[[RoutingMemory], T]) -> T:
        """What `ask` gets of a memory, or of the one that has come into its place while it was asked.

        Raises as get(), and what `ask` raises.
        """
        memory = self.get(name)
        while True:
            try:
                return ask(memory)
            except CollectionClosed:
                if self._closed:
                    raise
                if self._shared:
                    with self._lock:  # of many who ask one looks
                        if self._memories.get(name) is memory:
                            self.refresh()
                before, memory = memory, self.get(name)
                if memory is before:
                    raise

    def create(
        self,
        name: str,
        fingerprint: ModelFingerprint,
        settings: MemorySettings,
        check: Callable[[], None] = lambda: None,
    ) -> RoutingMemory:
        """An empty memory. Raises InvalidField, MemoryExists, Busy or StorageError; then nothing is left behind.

        `check` is called now and then; what it raises ends the creation.
        """
        check_name(name)
        identity.validate(fingerprint)
        memory_settings.validate(settings, fingerprint.num_layers)
        with self._lock:
            self.refresh()
            if name in self._memories:
                raise MemoryExists(name)
            if name in self.broken:
                self.get(name)
            self.require_not_in_the_making(name)
            self._in_the_making.add(name)
        try:
            record = MemoryRecord(name, fingerprint, settings, time.time_ns() // 1_000_000)
            memory = self._build(record, check)
            with self._lock:
                self._memories[name] = memory
        finally:
            self._in_the_making.discard(name)
        return memory

    def require_not_in_the_making(self, name: str) -> None:
        """Raises Busy while a memory of that name is being created."""
        if name in self._in_the_making:
            raise Busy(f"memory {name!r} is being created; try again soon")

    def delete(self, name: str) -> int:
        """Removes a memory and its files; returns the entries it held."""
        with self._lock:
            self.refresh()
            memory = self.get(name)
            entries = sum(layer.info().entries for layer in memory.layers)
            self.release(name)
            self._discard(memory)
        return entries

    def change_settings(
        self, name: str, changes: dict[str, Any], measured: RoutingMemory | None = None
    ) -> RoutingMemory:
        """Stores changed settings, then reads by them. Raises InvalidField; then nothing changes.

        `measured`: the memory that the changes were measured on; Busy when another one has come into its place.
        """
        with self._lock:
            self.refresh()  # else the settings of a memory that was replaced would come back
            memory = self.get(name)
            if measured not in (None, memory):
                raise Busy(f"memory {name!r} was replaced while it was measured; measure it again")
            settings = memory_settings.changed(memory.record.settings, changes)
            memory_settings.validate(settings, memory.record.fingerprint.num_layers)
            record = replace(memory.record, settings=settings)
            self._catalogue.commit(record)
            memory.change_settings(record)
        return memory

    def serve(self, memory: RoutingMemory) -> None:
        """Lets lookups go to a memory, and no longer to the one that had its name."""
        before = self._memories.get(memory.record.name)
        self._memories[memory.record.name] = memory
        self.broken.pop(memory.record.name, None)
        if before is not None:
            before.changes.wake()

    def release(self, name: str) -> RoutingMemory | None:
        """Lets no lookup go to a memory any more; it stays open."""
        memory = self._memories.pop(name, None)
        if memory is not None:
            memory.changes.wake()
        return memory

    def serves(self, memory: RoutingMemory) -> bool:
        """Whether it has its name still."""
        return self._memories.get(memory.record.name) is memory

    def hits_path(self, home: str, layer: int) -> Path | None:
        """Where the hit counts of a layer are kept; `home` as in home_of()."""
        return None if self._hits is None else self._hits / home / hits_file(layer)

    def open_layers(self, record: MemoryRecord) -> list[LayerMemory]:
        """Every layer of a memory on disk, several at a time. Raises StorageError; then none is open."""
        home = home_of(self._directory, record)

        def opened(number: int) -> LayerMemory:
            name, spec = collection_name(home, number), spec_of(record)
            if record.collections and isinstance(self._backend, Pinning):
                own = record.collections[number]
                return self._layer(record, home, number, self._backend.open_behind(name, spec, own))
            return self._layer(record, home, number, self._backend.open(name, spec))

        with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="open") as pool:
            layers = [pool.submit(opened, n) for n in range(record.fingerprint.num_layers)]
        if failures := [error for layer in layers if (error := layer.exception())]:
            close_all([layer.result() for layer in layers if layer.exception() is None])
            raise failures[0]
        return [layer.result() for layer in layers]

    def discard_layers(self, home: str, layers: Sequence[LayerMemory]) -> None:
        """Closes layers and removes their files; `home` as in home_of()."""
        close_all(layers)
        self._drop(home, layers)

    def flush(self) -> None:
        """Makes every acknowledged write survive loss of power.

        Raises the first StorageError after it has tried every layer: one that cannot be flushed holds up no other.
        """
        failures = []
        for memory in self.memories():
            for layer in memory.layers:
                try:
                    with suppress(CollectionClosed):  # deleted meanwhile
                        layer.collection.flush()
                    with self._lock:  # not while it is being deleted
                        if self._memories.get(memory.record.name) is memory:
                            layer.hits.save()
                except StorageError as error:
                    failures.append(error)
        if failures:
            raise failures[0]

    def close(self) -> None:
        """Flushes and closes every collection. Raises the first StorageError after it has tried them all."""
        with self._lock:
            layers = [layer for memory in self._memories.values() for layer in memory.layers]
            self._closed = True
            self._memories.clear()
            failures = close_all(layers)
        if failures:
            raise failures[0]

    def _build(self, record: MemoryRecord, check: Callable[[], None]) -> RoutingMemory:
        """Collections first, several at a time, the manifest last; or the record, and collections as needed."""
        check()
        if isinstance(self._backend, Pinning):
            record = replace(record, collections=self._backend.planned(collection_names(record)))
            planned = self.open_layers(record)
            try:
                # With that the memory is there: what can fail was done before.
                self._catalogue.begin(record, whole=True)
            except BaseException:
                close_all(planned)
                raise
            return RoutingMemory(record, planned)

        def make(number: int, name: str) -> None:
            check()
            made = self._backend.create(name, spec_of(record))
            layers.append(self._layer(record, record.name, number, made))

        layers: list[LayerMemory] = []
        self._catalogue.begin(record)
        try:
            with ThreadPoolExecutor(_MADE_TOGETHER, thread_name_prefix="create") as pool:
                making = [pool.submit(make, *each) for each in enumerate(collection_names(record))]
            for each in making:
                each.result()
            check()
            layers.sort(key=lambda layer: layer.layer)
            self._catalogue.commit(record)
        except BaseException:
            self.discard_layers(record.name, layers)
            self._catalogue.remove(record)
            raise
        return RoutingMemory(record, layers)

    def _open_one(self, record: MemoryRecord) -> None:
        try:
            opened = self.open_layers(record)
            if self._directory is not None:
                remove_strays(self._directory, record)  # only now: what serves is there
        except StorageError as error:
            if isinstance(error, ForeignCollection) or not isinstance(error, CorruptMemory):
                raise
            self._set_aside(record.name, error)
            return
        before = self._memories.get(record.name)
        versions = None if before is None else Versions(before.version + 1)
        self.serve(RoutingMemory(record, opened, versions))

    def _set_aside(self, name: str, reason: StorageError) -> None:
        self.release(name)
        if str(self.broken.get(name)) != str(reason):
            log.error("memory %s is set aside: %s", name, reason)
        self.broken[name] = reason

    def _follow(self, record: MemoryRecord) -> None:
        """Reads a shared memory as its record says now: entries and settings from one lookup to the next.

        One that was set aside is tried again: a node of a cluster that comes back does not know every collection at
        first.
        """
        memory = self._memories.get(record.name)
        if memory is not None and are_read_alike(memory.record, record):
            if memory.record != record:
                memory.change_settings(record)
            return
        if memory is not None:  # deleted and created again, or replaced
            forget_hits(memory.layers)
        try:
            self._open_one(record)
        except ForeignCollection as error:
            self._set_aside(record.name, error)
        if memory is not None:
            close_all(memory.layers)

    def _try_again(self) -> None:
        for finish in tuple(self.unfinished):
            try:
                finish()
            except StorageError as error:
                log.warning("tried again at the next look: %s", error)
            else:
                self.unfinished.remove(finish)

    def _let_go(self, name: str) -> None:
        if (memory := self.release(name)) is not None:
            close_all(memory.layers)

    def _sweep(self, record: MemoryRecord) -> None:
        log.warning("removing memory %s: its deletion or creation never ended", record.name)
        self._drop_collections(collection_names(record))
        self._catalogue.remove(record)

    def _discard(self, memory: RoutingMemory) -> None:
        home = home_of(self._directory, memory.record)
        close_all(memory.layers)
        # The moment of deletion; what follows is repeated at the next start after a crash.
        self._catalogue.retire(memory.record)
        self._drop(home, memory.layers)
        self._catalogue.remove(memory.record)

    def _drop(self, home: str, layers: Sequence[LayerMemory]) -> None:
        self._drop_collections([collection_name(home, layer.layer) for layer in layers])
        for layer in layers:
            layer.hits.remove()

    def _drop_collections(self, names: Sequence[str]) -> None:
        """Side by side: a cluster takes a while for each."""
        with ThreadPoolExecutor(_DROPPED_TOGETHER, thread_name_prefix="drop") as pool:
            for _ in pool.map(self._backend.drop, names):
                pass

    def _layer(
        self, record: MemoryRecord, home: str, number: int, collection: Collection
    ) -> LayerMemory:
        model = record.fingerprint
        hits = HitCounter.load(self.hits_path(home, number))
        return LayerMemory(number, collection, model.num_experts, model.top_k, hits)


def check_name(name: str) -> None:
    """Raises InvalidField on a name that no new memory can have."""
    if not _NAME.fullmatch(name) or _RESERVED.fullmatch(name):
        expected = (
            "1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit, and no file of the service's "
            f"own (LOCK, CURRENT, gen-..., ...{DOOMED}, in capitals or not)"
        )
        raise InvalidField("name", name, expected)

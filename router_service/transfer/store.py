"""Memories that this process holds open itself, in a MemoryStore: of a data directory, or of a Qdrant server."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator

from typing_extensions import override

from router_service.arrays import U64, Entries
from router_service.backends.base import Compression, Report, pages
from router_service.errors import CorruptMemory, InvalidField, KeysNotFound, MemoryNotFound
from router_service.fingerprint import ModelFingerprint
from router_service.memories.deletion import delete_entries
from router_service.memories.known_keys import require_all_found
from router_service.memories.memory import MemoryRecord, RoutingMemory
from router_service.memories.settings import MemorySettings
from router_service.memories.store import MemoryStore
from router_service.transfer.endpoints import Batch, Endpoint, EntryShape, LayerState, MemoryEntries


class StoreEndpoint(Endpoint):
    """The memories of an opened store. Raises RoutingServiceError."""

    def __init__(self, label: str, store: MemoryStore) -> None:
        super().__init__(label)
        self._store = store

    @override
    def names(self) -> list[str]:
        # Not silently less than all: the others can be named.
        for name, reason in self._store.broken.items():
            raise CorruptMemory(f"memory {name!r} cannot be opened ({reason}); name the others")
        return self._store.names()

    @override
    def find(self, name: str) -> MemoryRecord | None:
        try:
            return self._store.get(name).record
        except MemoryNotFound:
            return None

    @override
    def create(self, name: str, fingerprint: ModelFingerprint, settings: MemorySettings) -> None:
        self._store.create(name, fingerprint, settings)

    @override
    def delete(self, name: str) -> None:
        self._store.delete(name)

    @override
    def change_settings(self, name: str, settings: MemorySettings) -> None:
        self._store.change_settings(name, settings.fields())

    @override
    def entries(self, name: str) -> MemoryEntries:
        return StoreEntries(self._store.get(name))


class StoreEntries(MemoryEntries):
    """The entries of an opened memory. Raises RoutingServiceError."""

    def __init__(self, memory: RoutingMemory) -> None:
        self._memory = memory

    @override
    def pages(self, layer: int, *, with_keys: bool = True) -> Generator[Entries, None, None]:
        size = EntryShape.of(self._memory.record).batch_entries
        yield from pages(self._memory.layer(layer).collection, size, with_keys=with_keys)

    @override
    def write(self, batches: Iterable[Batch]) -> Iterator[int]:
        digest = self._memory.record.fingerprint.digest()
        for batch in batches:
            self._memory.upsert(batch.layer, digest, batch.entries)
            yield len(batch)

    @override
    def delete(self, layer: int, ids: U64) -> int:
        done = delete_entries(self._memory, [self._memory.layer(layer)], ids)
        return sum(part.deleted for part in done)

    @override
    def state(self, layer: int) -> LayerState:
        info = self._memory.layer(layer).info()
        return LayerState(info.entries, info.indexed_entries, info.compression)

    @override
    def optimize(self, layer: int, compression: Compression, report: Report) -> str:
        try:
            self._memory.layer(layer).optimize(compression, report)
        except InvalidField as refusal:
            return str(refusal)
        return ""

    @override
    def unfound(self) -> str:
        record = self._memory.record
        try:
            require_all_found(record.name, self._memory.layers, record.settings)
        except KeysNotFound as error:
            return str(error)
        return ""

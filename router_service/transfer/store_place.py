"""Memories that this process holds open itself: of a data directory, or of a Qdrant server."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator

from router_service.arrays import U64, Entries
from router_service.backends.base import Compression, Report, pages
from router_service.errors import CorruptMemory, InvalidField, MemoryNotFound
from router_service.fingerprint import ModelFingerprint
from router_service.memories.deletion import delete_entries
from router_service.memories.memory import MemoryRecord, RoutingMemory
from router_service.memories.settings import MemorySettings
from router_service.memories.store import MemoryStore
from router_service.transfer.sides import LayerState, page_entries


class StorePlace:
    """A Place over an opened MemoryStore. Raises RoutingServiceError."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    def names(self) -> list[str]:
        """See Place.names. Raises CorruptMemory when one of them cannot be opened."""
        for name, reason in self._store.broken.items():
            raise CorruptMemory(f"memory {name!r} cannot be opened ({reason}); name the others")
        return self._store.names()

    def record(self, name: str) -> MemoryRecord | None:
        """See Place.record."""
        try:
            return self._store.get(name).record
        except MemoryNotFound:
            return None

    def create(self, name: str, fingerprint: ModelFingerprint, settings: MemorySettings) -> None:
        """See Place.create."""
        self._store.create(name, fingerprint, settings)

    def change_settings(self, name: str, settings: MemorySettings) -> None:
        """See Place.change_settings."""
        self._store.change_settings(name, settings.fields())

    def side(self, name: str) -> StoreSide:
        """See Place.side."""
        return StoreSide(self._store.get(name))


class StoreSide:
    """A Side over an opened memory. Raises RoutingServiceError."""

    def __init__(self, memory: RoutingMemory) -> None:
        self._memory = memory

    def pages(self, layer: int) -> Generator[Entries, None, None]:
        """See Side.pages."""
        size = page_entries(self._memory.record)
        yield from pages(self._memory.layer(layer).collection, size, with_keys=True)

    def write(self, layer: int, batches: Iterable[Entries]) -> Iterator[int]:
        """See Side.write."""
        digest = self._memory.record.fingerprint.digest()
        for batch in batches:
            self._memory.upsert(layer, digest, batch)
            yield len(batch)

    def delete(self, layer: int, ids: U64) -> int:
        """See Side.delete."""
        done = delete_entries(self._memory, [self._memory.layer(layer)], ids)
        return sum(part.deleted for part in done)

    def state(self, layer: int) -> LayerState:
        """See Side.state."""
        info = self._memory.layer(layer).info()
        return LayerState(info.entries, info.indexed_entries, info.compression)

    def optimize(self, layer: int, compression: Compression, report: Report) -> str:
        """See Side.optimize."""
        try:
            self._memory.layer(layer).optimize(compression, report)
        except InvalidField as refusal:
            return str(refusal)
        return ""

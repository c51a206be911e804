"""What a migration needs of the places that it moves memories between."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from router_service.arrays import U64, Entries
from router_service.backends.base import Compression, Report
from router_service.fingerprint import ModelFingerprint
from router_service.memories.memory import MemoryRecord
from router_service.memories.settings import MemorySettings

# Bytes of keys and values in one page, and its most entries: what one message holds.
_PAGE_BYTES = 4 * 1024 * 1024
_PAGE_ENTRIES = 512


@dataclass(frozen=True, slots=True)
class LayerState:
    """Entries of a layer, those that an index covers, and its search keys' compression."""

    entries: int
    indexed_entries: int
    compression: Compression


class Side(Protocol):
    """The entries of one memory in one place. Raises what the place raises."""

    def pages(self, layer: int) -> Generator[Entries, None, None]:
        """Every entry in the order of ids, with keys, a few MiB at a time; no empty page."""
        ...

    def write(self, layer: int, batches: Iterable[Entries]) -> Iterator[int]:
        """Writes batches, replacing entries of the same id; yields the entries of each as it is acknowledged."""
        ...

    def delete(self, layer: int, ids: U64) -> int:
        """Removes the entries of these ids [n]; returns how many were there."""
        ...

    def state(self, layer: int) -> LayerState:
        """What the layer holds now."""
        ...

    def optimize(self, layer: int, compression: Compression, report: Report) -> str:
        """Builds index and search keys; returns why the place cannot have such search keys, or "".

        What `report` raises ends it.
        """
        ...


class Place(Protocol):
    """Memories by name: a service, a directory, a Qdrant server. Raises what the place raises."""

    def names(self) -> list[str]:
        """Every memory, sorted."""
        ...

    def record(self, name: str) -> MemoryRecord | None:
        """What a memory is; None when there is none of that name."""
        ...

    def create(self, name: str, fingerprint: ModelFingerprint, settings: MemorySettings) -> None:
        """An empty memory."""
        ...

    def change_settings(self, name: str, settings: MemorySettings) -> None:
        """Stores all settings; kind, similarity and preset are those that it has."""
        ...

    def side(self, name: str) -> Side:
        """The entries of a memory that is there."""
        ...


def page_entries(record: MemoryRecord) -> int:
    """Entries of one page of a memory."""
    width = record.fingerprint.hidden_size + record.value_width
    return max(1, min(_PAGE_ENTRIES, _PAGE_BYTES // (4 * width)))


class Untouched:
    """A Side that lets nothing through to the one behind it; None: a memory that is not there yet."""

    def __init__(self, behind: Side | None) -> None:
        self._behind = behind

    def pages(self, layer: int) -> Generator[Entries, None, None]:
        """See Side.pages."""
        if self._behind is not None:
            yield from self._behind.pages(layer)

    def write(self, layer: int, batches: Iterable[Entries]) -> Iterator[int]:
        """Only counts."""
        return map(len, batches)

    def delete(self, layer: int, ids: U64) -> int:
        """Only counts."""
        return len(ids)

    def state(self, layer: int) -> LayerState:
        """See Side.state."""
        if self._behind is None:
            return LayerState(0, 0, Compression())
        return self._behind.state(layer)

    def optimize(self, layer: int, compression: Compression, report: Report) -> str:
        """Does nothing."""
        return ""

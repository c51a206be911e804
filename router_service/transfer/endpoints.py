"""What a copy needs of its two endpoints: a source gives batches of entries, a sink takes them.

A file is a source or a sink. A memory is both, and can say what it holds: it is what MemoryEntries describes. Where
memories are, by name, is an Endpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Protocol

from typing_extensions import override

from router_service.arrays import U64, Entries
from router_service.backends.base import Compression, Report
from router_service.errors import RoutingServiceError, shorten
from router_service.fingerprint import ModelFingerprint
from router_service.memories.memory import MemoryRecord
from router_service.memories.settings import Kind, MemorySettings

# Bytes of keys and values in one batch, and its most entries: one message holds them, and few batches are in RAM.
BATCH_BYTES = 4 * 1024 * 1024
BATCH_ENTRIES = 512
_NAMES_SHOWN = 20

Advance = Callable[[int], None]
# A stage of the work and its number of entries, as a bar; yields the function that advances it. That is called between
# writes: what it raises ends the work where it is sound.
Progress = Callable[[str, int | None], AbstractContextManager[Advance]]


@dataclass(frozen=True, slots=True)
class EntryShape:
    """What a memory's entries look like."""

    kind: Kind
    hidden_size: int
    num_experts: int
    top_k: int

    @staticmethod
    def of(record: MemoryRecord) -> EntryShape:
        """The shape of a memory's entries."""
        model = record.fingerprint
        return EntryShape(record.settings.kind, model.hidden_size, model.num_experts, model.top_k)

    @property
    def value_width(self) -> int:
        """Numbers in a value row; see Kind."""
        return self.kind.value_width(self.num_experts, self.top_k)

    @property
    def batch_entries(self) -> int:
        """Entries of one batch."""
        return max(
            1, min(BATCH_ENTRIES, BATCH_BYTES // (4 * (self.hidden_size + self.value_width)))
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Entries of one layer; rows[i] is where entry i is in its file, counted from 1 (none: it is of no file)."""

    layer: int
    entries: Entries
    rows: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def slice(self, start: int, stop: int) -> Batch:
        """Entries [start, stop)."""
        return Batch(self.layer, self.entries.slice(start, stop), self.rows[start:stop])


class Source(Protocol):
    """Entries to copy. Raises what the endpoint raises."""

    @abstractmethod
    def total(self, layers: Sequence[int]) -> int:
        """How many entries batches() gives, or more when that is not known."""

    @abstractmethod
    def batches(self, layers: Sequence[int]) -> Generator[Batch, None, None]:
        """The entries of these layers, a few MiB at a time; of all layers when none is named."""


class Sink(Protocol):
    """Where entries are written to. Raises what the endpoint raises."""

    @abstractmethod
    def write(self, batches: Iterable[Batch]) -> Iterator[int]:
        """Writes batches, replacing entries of the same id; yields the entries of each as it is acknowledged."""

    @abstractmethod
    def pages(self, layer: int, *, with_keys: bool = True) -> Generator[Entries, None, None]:
        """Every entry of a layer in the order of ids, a few MiB at a time; no empty page."""

    @abstractmethod
    def delete(self, layer: int, ids: U64) -> int:
        """Removes the entries of these ids [n]; returns how many were there."""

    def holds_any(self, layer: int, ids: U64) -> bool:
        """False when none of these ids [n] is there, where that is known without reading the entries."""
        return True


@dataclass(frozen=True, slots=True)
class LayerState:
    """Entries of a layer, those that an index covers, and its search keys' compression."""

    entries: int
    indexed_entries: int
    compression: Compression


class MemoryEntries(Source, Sink):
    """The entries of one memory at an endpoint: a source, in the order of layers and ids, and a sink."""

    @abstractmethod
    def state(self, layer: int) -> LayerState:
        """What the layer holds now."""

    @abstractmethod
    def optimize(self, layer: int, compression: Compression, report: Report) -> str:
        """Builds index and search keys; returns why the endpoint cannot have such search keys, or "".

        What `report` raises ends it.
        """

    @abstractmethod
    def unfound(self) -> str:
        """What lookups do not find though it is there, and why; "" when a sample of each layer's keys is found."""

    @override
    def total(self, layers: Sequence[int]) -> int:
        return sum(self.state(layer).entries for layer in layers)

    @override
    def batches(self, layers: Sequence[int]) -> Generator[Batch, None, None]:
        for layer in layers:
            with closing(self.pages(layer)) as pages:
                for page in pages:
                    yield Batch(layer, page)


class MemoryGone(RoutingServiceError):
    """A memory that a copy needs is not at its endpoint."""


class Endpoint(ABC):
    """Memories by name: a service, a directory, a Qdrant server. Raises what the endpoint raises.

    `label` is what the user calls it.
    """

    def __init__(self, label: str) -> None:
        self.label = label

    @abstractmethod
    def names(self) -> list[str]:
        """Every memory, sorted."""

    @abstractmethod
    def find(self, name: str) -> MemoryRecord | None:
        """What a memory is; None when there is none of that name."""

    @abstractmethod
    def create(self, name: str, fingerprint: ModelFingerprint, settings: MemorySettings) -> None:
        """An empty memory."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Removes a memory and its entries."""

    @abstractmethod
    def change_settings(self, name: str, settings: MemorySettings) -> None:
        """Stores all settings; kind, similarity and preset are those that it has."""

    @abstractmethod
    def entries(self, name: str) -> MemoryEntries:
        """The entries of a memory that is there."""

    def record(self, name: str) -> MemoryRecord:
        """What a memory is. Raises MemoryGone."""
        record = self.find(name)
        if record is None:
            known = ", ".join(self.names()[:_NAMES_SHOWN]) or "none"
            raise MemoryGone(
                f"memory {shorten(name)} not found in {shorten(self.label)}, which has: {known}"
            )
        return record


class Untouched(Sink):
    """Lets nothing through to the sink behind it, for a dry run; None: a memory that is not there yet."""

    def __init__(self, behind: Sink | None) -> None:
        self._behind = behind

    @override
    def write(self, batches: Iterable[Batch]) -> Iterator[int]:
        return map(len, batches)

    @override
    def pages(self, layer: int, *, with_keys: bool = True) -> Generator[Entries, None, None]:
        if self._behind is not None:
            yield from self._behind.pages(layer, with_keys=with_keys)

    @override
    def delete(self, layer: int, ids: U64) -> int:
        return len(ids)

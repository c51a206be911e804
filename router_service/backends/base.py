"""What the service needs of a storage engine. Every backend passes tests/congruence against the NumPy one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol, runtime_checkable

from router_service.arrays import F32, U64, Entries, ExampleRef, Neighbours, Provenance


class Metric(StrEnum):
    """Distance between keys."""

    EUCLID = "euclid"  # reported squared
    COSINE = "cosine"  # reported as 1 - cosine; keys are stored normalised


class Quantization(StrEnum):
    """How the search keys are compressed. Distances always come from the stored keys."""

    NONE = "none"
    INT8 = "int8"


# Called now and then by long work with its stage, how much of it is done and how much there is (0: not known); what it
# raises ends the work, and nothing has changed.
Report = Callable[[str, int, int], None]


def say_nothing(stage: str, done: int, total: int) -> None:
    """The Report of callers who do not watch."""


@dataclass(frozen=True, slots=True)
class CollectionSpec:
    """What a collection holds."""

    dimension: int
    metric: Metric
    value_width: int


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How an indexed collection is searched; an unindexed one is searched exactly."""

    hnsw_ef: int = 64
    oversampling: float = 2.0


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """State of a collection: exact number of entries, those an index covers, the search keys' compression."""

    entries: int
    indexed_entries: int
    quantization: Quantization
    disk_bytes: int


class Collection(Protocol):
    """The entries of one layer. Safe to call from several threads.

    Callers pass validated arrays: finite f32, right widths, ids below 2^63. Every engine failure surfaces as a
    StorageError.
    """

    def search(
        self,
        queries: F32,
        k: int,
        options: SearchOptions,
        exclude: Sequence[ExampleRef] = (),
    ) -> Neighbours:
        """The k nearest entries of each query [T, d]. `exclude`: none, one for all tokens, or one per token.

        Entries at the same distance come in any order; one whose distance overflows f32 is no neighbour.
        Raises InvalidField on a zero vector under cosine.
        """
        ...

    def upsert(self, entries: Entries, *, fsync: bool = False) -> None:
        """Writes entries, replacing those with the same id. On return they survive SIGKILL (fsync: loss of power).

        Raises InvalidField on a zero vector under cosine, DiskFull when too little disk is free.
        """
        ...

    def delete(self, ids: U64, *, fsync: bool = False) -> int:
        """Removes the entries of these ids and returns how many were there; ids that are not there count for nothing.

        On return they stay away after SIGKILL (fsync: after loss of power).
        """
        ...

    def scroll(self, after: int | None, limit: int, *, with_keys: bool = True) -> Entries:
        """Up to `limit` entries with ids above `after`, in the order of ids."""
        ...

    def provenance(self, ids: U64) -> dict[int, Provenance]:
        """Where the entries of these ids came from; ids that are not there are left out."""
        ...

    def info(self) -> CollectionInfo:
        """Exact state, without a search."""
        ...

    def optimize(self, quantization: Quantization, report: Report = say_nothing) -> None:
        """Builds the HNSW index and quantized keys of all entries; searches and writes go on meanwhile.

        Raises Busy while another optimize() of the collection runs, and what `report` raises.
        """
        ...

    def flush(self) -> None:
        """Makes every acknowledged write survive loss of power."""
        ...

    def close(self) -> None:
        """Flushes and releases the files. Closing twice is allowed."""
        ...


@dataclass(frozen=True, slots=True)
class FrozenFiles:
    """The files of a collection while nothing writes to them."""

    directory: Path
    names: tuple[str, ...]  # files and directories in it that a copy needs
    entries: int
    # Adds to a copy of the directory what only RAM holds; also after the pause.
    complete: Callable[[Path], None]


@runtime_checkable
class FileCollection(Protocol):
    """A Collection whose entries are files that can be copied, and opened elsewhere."""

    def paused_for_copy(self) -> AbstractContextManager[FrozenFiles]:
        """Writes wait inside, searches go on. Raises Busy during optimize()."""
        ...


class Backend(Protocol):
    """Makes and finds collections. `name` is a relative path of safe characters, e.g. `bible/layer-003`."""

    def create(self, name: str, spec: CollectionSpec) -> Collection:
        """A new, empty collection. Raises StorageError when one is there."""
        ...

    def open(self, name: str, spec: CollectionSpec) -> Collection:
        """An existing collection. Raises CorruptMemory when it is missing or does not match `spec`."""
        ...

    def drop(self, name: str) -> None:
        """Removes a collection and its files; it must be closed. No error when it is not there."""
        ...

    def close(self) -> None:
        """Closes every collection and gives the storage back. Closing twice is allowed."""
        ...

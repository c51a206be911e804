"""What a backend is: collections of entries, how they are searched, written and compressed, and what all do alike."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from router_service.arrays import (
    F32,
    U64,
    Entries,
    ExampleRef,
    Neighbours,
    Provenance,
    combined_digests,
    digests_of,
)
from router_service.errors import Cancelled, DeadlineTooShort, InvalidField


class Metric(StrEnum):
    """Distance between keys."""

    EUCLID = "euclid"  # reported squared
    COSINE = "cosine"  # reported as 1 - cosine; keys are stored normalised


class Quantization(StrEnum):
    """How the numbers of the search keys are compressed."""

    NONE = "none"
    FLOAT16 = "float16"
    INT8 = "int8"
    TURBO4 = "turbo4"  # 4 bits per number, after a random rotation
    TURBO2 = "turbo2"
    TURBO1 = "turbo1"
    BINARY = "binary"  # the sign
    PRODUCT = "product"  # 1 byte for 4 numbers: the nearest of 256 centroids


class Projection(StrEnum):
    """How the dimension of the search keys is reduced."""

    PCA = "pca"
    RANDOM = "random"


# Times K candidates that are rescored. Where a search misses K = 32 neighbours at a factor, see docs/quantization.md.
_OVERSAMPLING = {
    Quantization.NONE: 2.0,
    Quantization.FLOAT16: 2.0,
    Quantization.INT8: 2.0,
    Quantization.TURBO4: 2.0,
    Quantization.TURBO2: 8.0,
    Quantization.TURBO1: 8.0,
    Quantization.BINARY: 16.0,
    Quantization.PRODUCT: 4.0,
}
_OVERSAMPLING_OF_PROJECTION = {Projection.PCA: 2.0, Projection.RANDOM: 4.0}
# Of int8: numbers beyond it are cut off, so that a few huge keys or coordinates do not take the resolution of the rest.
INT8_QUANTILE = 0.99
_LABEL = re.compile(
    r"(?:(?P<projection>pca|random)(?P<dimension>[1-9]\d{0,6}))?\+?(?P<quantization>[a-z]+\d*)?"
)


@dataclass(frozen=True, slots=True)
class Compression:
    """How the search keys are made of the stored keys. Distances always come from the stored keys."""

    quantization: Quantization = Quantization.NONE
    search_dimension: int = 0  # 0: that of the key
    projection: Projection = Projection.PCA  # counts when search_dimension is not 0

    @property
    def label(self) -> str:
        """In a word: `none`, `int8`, `pca64`, `random32+turbo4`."""
        if not self.search_dimension:
            return self.quantization.value
        reduced = f"{self.projection}{self.search_dimension}"
        return (
            reduced if self.quantization is Quantization.NONE else f"{reduced}+{self.quantization}"
        )

    @property
    def apart(self) -> bool:
        """Whether search keys are stored beside the keys: quantizing is the engine's, f16 and projections are not."""
        return bool(self.search_dimension) or self.quantization is Quantization.FLOAT16

    @property
    def oversampling(self) -> float:
        """Times K candidates that are rescored unless the settings say otherwise."""
        more = _OVERSAMPLING_OF_PROJECTION[self.projection] if self.search_dimension else 1.0
        return more * _OVERSAMPLING[self.quantization]

    @staticmethod
    def parse(label: str) -> Compression:
        """Inverse of `label`. Raises ValueError."""
        found = _LABEL.fullmatch(label)
        if found is None or not label:
            raise ValueError(f"{label!r} is no compression of search keys")
        made = Compression(
            Quantization(found["quantization"] or "none"),
            int(found["dimension"] or 0),
            Projection(found["projection"] or "pca"),
        )
        if made.label != label:
            raise ValueError(f"{label!r} is no compression of search keys; {made.label!r} is")
        return made


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


# Between two looks at whether who waits for a search is still there.
_LOOK_S = 0.05


def stays() -> bool:
    """The `left` of callers who wait for their answer whatever happens."""
    return False


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How an indexed collection is searched; an unindexed one is searched exactly."""

    hnsw_ef: int = 64
    oversampling: float = 2.0
    exact: bool = False  # look at every entry, index or not
    deadline: float | None = None  # of time.monotonic()
    left: Callable[[], bool] = stays  # whether nobody waits for the answer any more

    def require_time(self) -> None:
        """Asked before each engine call, not only the first, and while one is waited for.

        Raises DeadlineTooShort when the deadline has passed, and Cancelled when the caller has left.
        """
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise DeadlineTooShort("the deadline passed before the search was done")
        if self.left():
            raise Cancelled("the caller left before the search was done")

    def wait_s(self) -> float:
        """Seconds to wait before this is asked again. Raises what require_time() raises."""
        self.require_time()
        if self.deadline is None:
            return _LOOK_S
        return min(_LOOK_S, max(0.0, self.deadline - time.monotonic()))


# What an entry costs a scan besides the numbers of its key: that much a short key costs.
_LEAST_NUMBERS = 512


def numbers_of_scan(entries: int, dimension: int) -> int:
    """What looking at every entry costs. Backends scan small layers: that takes no longer, and nothing is missed."""
    return entries * max(dimension, _LEAST_NUMBERS)


@dataclass(frozen=True, slots=True)
class UnfinishedEntries:
    """Writes of a collection that its server did not acknowledge, and that are sent again until it does.

    `problem`: what the last try ended with. `on_disk`: whether they survive SIGKILL of the service.
    """

    writes: int
    ids: list[int]  # sorted
    problem: str
    on_disk: bool


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """State of a collection: exact number of entries, those an index covers, the search keys' compression.

    `disk_bytes`: None where a server keeps the entries and does not say. `damage`: why it is set apart and answers
    nothing; empty when it serves. `unfinished`: None: all is acknowledged. `segments`: that a search goes through; 0
    where the backend does not say.
    """

    entries: int
    indexed_entries: int
    compression: Compression
    disk_bytes: int | None
    damage: str = ""
    unfinished: UnfinishedEntries | None = None
    segments: int = 0


class Versions:
    """Numbers what lookups of one memory see, one state after the other; its collections share it.

    Safe to call from several threads.
    """

    def __init__(self, first: int = 1) -> None:
        self._now = first
        self._lock = threading.Lock()

    @property
    def now(self) -> int:
        """Of the present state."""
        return self._now

    def advance(self, least: int = 0) -> None:
        """What lookups see has become another state. `least`: its number is at least that."""
        with self._lock:
            self._now = max(self._now + 1, least)

    @contextmanager
    def changing(self) -> Iterator[int]:
        """Inside, what lookups see becomes the state of the number that is yielded, and nothing else changes."""
        with self._lock:
            yield self._now + 1
            self._now += 1


class CollectionReader(Protocol):
    """The entries of one layer, to read. Safe to call from several threads. Every engine failure is a StorageError."""

    def search(
        self, queries: F32, k: int, options: SearchOptions, exclude: Sequence[ExampleRef] = ()
    ) -> Neighbours:
        """The k nearest entries of each query [T, d]. `exclude`: none, one for all tokens, or one per token.

        Any number of tokens: a backend cuts them where its engine needs it. Entries at the same distance come in any
        order; one whose distance overflows f32 is no neighbour. All are of one version, which comes with them.
        Raises InvalidField on a zero vector under cosine, DeadlineTooShort when `options.deadline` passes meanwhile,
        Cancelled when the caller leaves.
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


class Replicable(Protocol):
    """The entries of one layer, for copies that are kept in step; their digests are arrays.combined_digests()."""

    def all_entries(self, page_entries: int) -> Iterator[tuple[Entries, U64]]:
        """Entries with their keys and their digests [n], in any order, at most `page_entries` at a time.

        Each that has been there from the beginning comes once, as it is then or was since, or, when it is written
        meanwhile, as a mixture of the two.
        """
        ...

    def entries(self, ids: U64) -> Entries:
        """Those of these ids, ascending and each once, that are there, with their keys."""
        ...

    def digests(self, after: int | None, limit: int) -> tuple[U64, U64]:
        """Ids [n] of up to `limit` entries above an id, in their order, and their digests [n]."""
        ...


@runtime_checkable
class Shared(Protocol):
    """A Collection that others than this process write to."""

    def listed(self, after: int | None) -> tuple[U64, U64]:
        """Ids [n] of the next entries above an id, and marks [n] that are others when all but a key has changed."""
        ...


class Collection(CollectionReader, Replicable, Protocol):
    """The entries of one layer. Callers pass validated arrays: finite f32, right widths, ids below 2^63."""

    versions: Versions  # moves on with every change, in the moment in which lookups see it

    def upsert(self, entries: Entries, *, fsync: bool = False) -> None:
        """Writes entries, replacing those with the same id. On return they survive SIGKILL (fsync: loss of power).

        Raises InvalidField on a zero vector under cosine, DiskFull when too little disk is free.
        """
        ...

    def delete(self, ids: U64, *, fsync: bool = False) -> int:
        """Removes the entries of these ids and returns how many were there; ids that are not there count for nothing.

        On return they stay away after SIGKILL (fsync: after loss of power). Needs no free disk.
        """
        ...

    def optimize(
        self, compression: Compression | None = None, report: Report = say_nothing
    ) -> None:
        """Builds the HNSW index and the search keys of all entries; searches and writes go on meanwhile.

        `compression`: None keeps the present one.

        Raises Busy while another optimize() of the collection runs, and what `report` raises.
        """
        ...

    def flush(self) -> None:
        """Makes every acknowledged write survive loss of power."""
        ...

    def close(self) -> None:
        """Flushes and releases the files. Closing twice is allowed."""
        ...


def pages(collection: CollectionReader, page_entries: int, *, with_keys: bool) -> Iterator[Entries]:
    """Every entry in the order of ids, at most `page_entries` at a time; no empty page."""
    after: int | None = None
    while len(page := collection.scroll(after, page_entries, with_keys=with_keys)):
        yield page
        after = int(page.ids[-1])


def pages_with_digests(
    collection: CollectionReader, page_entries: int
) -> Iterator[tuple[Entries, U64]]:
    """Replicable.all_entries() of a collection that is read in the order of ids."""
    for page in pages(collection, page_entries, with_keys=True):
        yield page, combined_digests(digests_of(page))


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


# A collection that was searched this long ago counts as being searched.
_RECENT_S = 0.5
# While it is, writes rest this many times as long as they worked: they take 2 % of the engine.
_REST = 50.0
# And they wait while the service indexes what is new, so that lookups share the cores with one of the two at a time;
# not longer than a caller's patience.
_PATIENCE_S = 5.0
_POLL_S = 0.02


class Pacing:
    """When a collection was searched and written to."""

    def __init__(self) -> None:
        self._searched = self._wrote = -float("inf")

    def searched(self) -> None:
        """A search begins."""
        self._searched = time.monotonic()

    @property
    def searched_ago_s(self) -> float:
        """Seconds since the last search began."""
        return time.monotonic() - self._searched

    @property
    def wrote_ago_s(self) -> float:
        """Seconds since the last write ended."""
        return time.monotonic() - self._wrote

    def patience(self) -> float:
        """When a caller whose write begins now should no longer be kept waiting, on the monotonic clock."""
        return time.monotonic() + _PATIENCE_S

    def rest(self, worked_s: float, until: float = float("inf")) -> None:
        """After a write that kept the engine for `worked_s`; not beyond `until`."""
        self._wrote = time.monotonic()
        if self.being_searched and self._wrote < until:
            time.sleep(min(_REST * worked_s, until - self._wrote))

    @property
    def being_searched(self) -> bool:
        """Whether searches go on."""
        return self.searched_ago_s < _RECENT_S

    def wait_while(self, indexing: Callable[[], bool], until: float) -> None:
        """Before a write: waits while the service indexes on its own account, and searches go on."""
        while indexing() and self.being_searched and time.monotonic() < until:
            time.sleep(_POLL_S)


@runtime_checkable
class Maintained(Protocol):
    """A Collection whose index falls behind as entries change."""

    pacing: Pacing

    @property
    def changed_entries(self) -> int:
        """Writes and deletions since the last optimize(): about what every search looks at one by one."""
        ...

    @property
    def changed_bytes(self) -> int:
        """The same in bytes of keys."""
        ...

    @property
    def outdated_share(self) -> float:
        """Share of the index's entries that were replaced or deleted since; a graph falls apart above some 0.5."""
        ...

    def auto_optimize(self, report: Report = say_nothing) -> bool:
        """optimize() with the compression there is, on the service's own account: an optimize() ends it.

        Returns False when the collection is being optimized, or an optimize() ended it; nothing has changed then.
        """
        ...


@runtime_checkable
class Verifiable(Protocol):
    """A Collection that knows what its entries were when they were written."""

    def verify(self) -> None:
        """Compares all of them; searches go on. Raises CorruptMemory when one differs: then it is set apart."""
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


@runtime_checkable
class Hurried(Protocol):
    """A Backend that waits for what may not answer any more."""

    def hurry(self) -> None:
        """From here on it waits for seconds only: the service stops."""
        ...


@dataclass(frozen=True, slots=True)
class Engines:
    """Engine processes: how many run, and how often one was started again after it had died."""

    running: int
    restarts: int


@runtime_checkable
class Hosting(Protocol):
    """A Backend with engine processes of its own."""

    def engines(self) -> Engines:
        """At this moment."""
        ...


@runtime_checkable
class Renaming(Protocol):
    """A Backend in which collections take the names of others. Raises StorageError."""

    def rename(self, names: Mapping[str, str], own: Sequence[str] = ()) -> None:
        """Lets each of the names lead to the collection of the other name, which leads nowhere from then on.

        `own`: their own names in a backend that pins them. Collections that are open stay those that they are. No error
        where the other name is not there: then that is done already, or the collection is not made yet.
        """
        ...

    def drop_replaced(self, names: Iterable[str]) -> None:
        """Removes the collections that names led to before rename(). Lookups that are on their way there fail."""
        ...


@runtime_checkable
class Pinning(Protocol):
    """A Backend whose names others may lead elsewhere, while a collection's own name stays. Raises StorageError."""

    def planned(self, names: Iterable[str]) -> tuple[str, ...]:
        """Own names for new collections that names are to lead to. Each is made when its first entry comes.

        Until then open_behind() gives it as an empty one.
        """
        ...

    def behind(self, names: Iterable[str]) -> dict[str, str]:
        """The own names of the collections that names lead to now; names that lead nowhere are left out."""
        ...

    def open_behind(self, name: str, spec: CollectionSpec, collection: str) -> Collection:
        """The collection of that own name, whatever `name` leads to; it is written to while `name` leads to it.

        Raises CorruptMemory when it is missing or does not match `spec`.
        """
        ...


# "gen-", CURRENT and LOCK are names of the Edge backend's own files.
_PART = r"(?!gen-|CURRENT(?:/|$)|LOCK(?:/|$))[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}"
_NAME = re.compile(rf"{_PART}(/{_PART}){{0,3}}")
# Rounding a unit vector to f32 leaves its length within 2^-24 of 1.
_UNIT_TOLERANCE = 2.0**-23


def require_name(name: str) -> None:
    """Raises InvalidField unless `name` is 1 to 4 path parts that are safe and not reserved."""
    if not _NAME.fullmatch(name):
        raise InvalidField(
            "name", name, "letters, digits, '_', '-', '.', in up to 4 parts joined by '/'"
        )


def as_stored(rows: F32, metric: Metric, field: str) -> F32:
    """Keys or queries [n, d] as the metric compares them: unit length in f32 under cosine, else unchanged.

    Rows that are unit vectors as closely as f32 can tell stay as they are, so that a stored key stays what it was.
    Done here and not by the engine, which leaves vectors shorter than about 3e-4 as they are. Raises InvalidField that
    names the row when its length is 0 under cosine.
    """
    if metric is not Metric.COSINE:
        return rows
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    if not norms.all():
        row = int(np.argmin(norms))
        raise InvalidField(
            f"{field}[{row}]", "a zero vector", "a length above 0 under the cosine metric"
        )
    norms[np.abs(norms - 1.0) <= _UNIT_TOLERANCE] = 1.0
    stored: F32 = (rows / norms[:, None]).astype(np.float32)
    return stored


def per_query(exclude: Sequence[ExampleRef], queries: int) -> list[ExampleRef | None]:
    """The example that each query leaves out. Raises InvalidField unless none, one or one per query is given."""
    if len(exclude) == queries:
        return list(exclude)
    if len(exclude) > 1:
        raise InvalidField("exclude", f"{len(exclude)} examples", f"none, 1 or {queries}")
    return [exclude[0] if exclude else None] * queries

"""One open shard of the engine, in this process or in one of its own, as the collection sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from router_service.arrays import F32, U64, Entries, ExampleRef
from router_service.backends.base import SearchOptions


@dataclass(frozen=True, slots=True)
class ShardCounts:
    """Exact number of entries, those written since the last optimize, and vectors in graphs, replaced ones included."""

    entries: int
    tail: int
    graph_vectors: int


class Shard(Protocol):
    """Not thread-safe: the collection holds a lock around each call. Failures are StorageErrors."""

    def search(
        self,
        queries: F32,
        limit: int,
        options: SearchOptions,
        excluded: Sequence[ExampleRef | None],
    ) -> tuple[U64, F32]:
        """Ids and engine scores [t, limit] of the nearest entries, best first; NO_ID and inf where there are fewer."""
        ...

    def upsert(self, entries: Entries, generation: int) -> None:
        """Writes entries, marked with the generation of files; they survive SIGKILL when this returns."""
        ...

    def delete(self, ids: U64) -> None:
        """Removes the entries of these ids; they stay away after SIGKILL when this returns."""
        ...

    def scroll(
        self, after: int | None, limit: int, *, keys: bool = True, provenance: bool = True
    ) -> Entries:
        """Up to `limit` entries above an id, in the order of ids; d = 0 without keys."""
        ...

    def retrieve(self, ids: U64, *, keys: bool = False) -> Entries:
        """The entries of these ids, in any order; those that are not there are left out."""
        ...

    def counts(self, generation: int) -> ShardCounts:
        """What there is; `generation` is the one being written."""
        ...

    def flush(self) -> None:
        """Fsyncs every write, and cuts the write-ahead log."""
        ...

    def close(self) -> None:
        """Releases the files. Closing twice is allowed."""
        ...

    @property
    def alive(self) -> bool:
        """Whether calls can still succeed; a process of its own may have died."""
        ...

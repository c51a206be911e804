"""Brute force in RAM with NumPy: the oracle that every other backend is compared with, and a backend for tests.

Distances are summed over float64 differences, never through the expanded form |q|^2 - 2qk + |k|^2, which cancels when
a query is close to a long key. Nothing is written to disk.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

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
from router_service.backends.base import (
    Backend,
    Collection,
    CollectionInfo,
    CollectionSpec,
    Compression,
    Metric,
    Renaming,
    Report,
    SearchOptions,
    Versions,
    as_stored,
    pages_with_digests,
    per_query,
    require_name,
    say_nothing,
)
from router_service.errors import CollectionClosed, CorruptMemory, StorageError

# float64 differences held at once, 32 MiB: where a search is cut
_BLOCK_ELEMENTS = 1 << 22
# A larger squared distance is infinite in f32: no neighbour.
_FARTHEST = np.finfo(np.float32).max


class ExactCollection(Collection):
    """A Collection in RAM. Ties in distance go to the smaller id."""

    def __init__(self, spec: CollectionSpec) -> None:
        self.spec = spec
        self.closed = False  # until close(); open() of the backend undoes it
        self.versions = Versions()
        self._entries = Entries.concat([], spec.dimension, spec.value_width)
        self._compression = Compression()
        self._write_lock = threading.Lock()
        self._seen_lock = threading.Lock()  # entries and version are read, and change, together

    @override
    def search(
        self,
        queries: F32,
        k: int,
        options: SearchOptions,  # only the deadline counts: always exact
        exclude: Sequence[ExampleRef] = (),
    ) -> Neighbours:
        with self._seen_lock:
            entries, version = self._open_entries(), self.versions.now
        stored = as_stored(queries, self.spec.metric, "queries")
        excluded = per_query(exclude, len(queries))
        found = Neighbours.empty(len(queries), k, self.spec.value_width)
        rows = max(1, _BLOCK_ELEMENTS // max(1, len(entries) * self.spec.dimension))
        for start in range(0, len(queries), rows):
            options.require_time()
            distances = _distances(stored[start : start + rows], entries.keys, self.spec.metric)
            for query, row in enumerate(distances, start):
                allowed = _allowed(entries, excluded[query])
                allowed = allowed[row[allowed] <= _FARTHEST]
                order = allowed[np.argsort(row[allowed], kind="stable")[:k]]
                found.ids[query, : len(order)] = entries.ids[order]
                found.distances[query, : len(order)] = row[order]
                found.values[query, : len(order)] = entries.values[order]
        return replace(found, version=version)

    @override
    def upsert(self, entries: Entries, *, fsync: bool = False) -> None:  # nothing to sync
        keys = as_stored(entries.keys, self.spec.metric, "keys")
        with self._write_lock:
            parts = [self._open_entries(), replace(entries, keys=keys)]
            both = Entries.concat(parts, self.spec.dimension, self.spec.value_width)
            _, last = np.unique(both.ids[::-1], return_index=True)
            self._show(both.take(len(both) - 1 - last))

    @override
    def delete(self, ids: U64, *, fsync: bool = False) -> int:  # nothing to sync
        with self._write_lock:
            old = self._open_entries()
            kept = np.flatnonzero(~np.isin(old.ids, ids))
            if deleted := len(old) - len(kept):
                self._show(old.take(kept))
            return deleted

    def _show(self, entries: Entries) -> None:
        """Lookups see these entries from here on."""
        with self._seen_lock:
            self._entries = entries
            self.versions.advance()

    @override
    def scroll(self, after: int | None, limit: int, *, with_keys: bool = True) -> Entries:
        entries = self._open_entries()
        start = 0 if after is None else int(np.searchsorted(entries.ids, np.uint64(after), "right"))
        page = entries.slice(start, start + limit)
        keys = page.keys.copy() if with_keys else np.empty((len(page), 0), np.float32)
        return Entries(page.ids.copy(), keys, page.values.copy(), page.provenance)

    @override
    def all_entries(self, page_entries: int) -> Iterator[tuple[Entries, U64]]:
        return pages_with_digests(self, page_entries)

    @override
    def entries(self, ids: U64) -> Entries:
        entries = self._open_entries()
        return entries.take(np.flatnonzero(np.isin(entries.ids, ids)))

    @override
    def digests(self, after: int | None, limit: int) -> tuple[U64, U64]:
        page = self.scroll(after, limit)
        return page.ids, combined_digests(digests_of(page))

    @override
    def provenance(self, ids: U64) -> dict[int, Provenance]:
        entries = self._open_entries()
        _, rows, _ = np.intersect1d(entries.ids, ids, assume_unique=False, return_indices=True)
        return {int(entries.ids[row]): entries.provenance[row] for row in rows}

    @override
    def info(self) -> CollectionInfo:
        """No index is ever built, since every search is exact."""
        return CollectionInfo(len(self._open_entries()), 0, self._compression, 0)

    @override
    def optimize(
        self, compression: Compression | None = None, report: Report = say_nothing
    ) -> None:
        """Only remembers the compression; search keys stay f32."""
        self._open_entries()
        if compression is not None:
            self._compression = compression

    @override
    def flush(self) -> None:
        """Nothing to do: there are no files."""
        self._open_entries()

    @override
    def close(self) -> None:
        """The backend keeps the entries until drop()."""
        self.closed = True

    def _open_entries(self) -> Entries:
        if self.closed:
            raise CollectionClosed("the collection")
        return self._entries


class ExactBackend(Backend, Renaming):
    """A Backend in RAM: collections last as long as the object."""

    def __init__(self) -> None:
        self._collections: dict[str, ExactCollection] = {}

    @override
    def create(self, name: str, spec: CollectionSpec) -> ExactCollection:
        require_name(name)
        if name in self._collections:
            raise StorageError(f"collection {name!r} already exists")
        self._collections[name] = ExactCollection(spec)
        return self._collections[name]

    @override
    def open(self, name: str, spec: CollectionSpec) -> ExactCollection:
        require_name(name)
        collection = self._collections.get(name)
        if collection is None:
            raise CorruptMemory(f"collection {name!r} is missing")
        if collection.spec != spec:
            raise CorruptMemory(f"collection {name!r} holds {collection.spec}, expected {spec}")
        if not collection.closed:
            raise StorageError(f"collection {name!r} is already open")
        collection.closed = False
        return collection

    @override
    def rename(self, names: Mapping[str, str], own: Sequence[str] = ()) -> None:
        for name, other in names.items():
            self._collections[name] = self._collections.pop(other)

    @override
    def drop_replaced(self, names: Iterable[str]) -> None:
        """Nobody holds them any more."""

    @override
    def drop(self, name: str) -> None:
        require_name(name)
        if name in self._collections and not self._collections[name].closed:
            raise StorageError(f"collection {name!r} is open; close it before dropping it")
        self._collections.pop(name, None)

    @override
    def close(self) -> None:
        for collection in self._collections.values():
            collection.close()


def _distances(queries: F32, keys: F32, metric: Metric) -> NDArray[np.float64]:
    """Squared Euclidean or 1 - cosine distances [t, n] of queries [t, d] to stored keys [n, d]."""
    wide = queries.astype(np.float64)
    rows = max(1, _BLOCK_ELEMENTS // max(1, wide.size))
    blocks = [keys[start : start + rows].astype(np.float64) for start in range(0, len(keys), rows)]
    if metric is Metric.COSINE:
        parts = [np.clip(1.0 - wide @ block.T, 0.0, 2.0) for block in blocks]
    else:
        parts = [_squared_distances(wide, block) for block in blocks]
    return np.concatenate(parts, axis=1) if parts else np.empty((len(queries), 0))


def _squared_distances(
    queries: NDArray[np.float64], keys: NDArray[np.float64]
) -> NDArray[np.float64]:
    difference = queries[:, None, :] - keys[None, :, :]
    return np.asarray(np.einsum("tnd,tnd->tn", difference, difference))


def _allowed(entries: Entries, excluded: ExampleRef | None) -> NDArray[np.intp]:
    """Rows that a query may see, in the order of ids."""
    if excluded is None:
        return np.arange(len(entries))
    same = (ExampleRef(p.source, p.example) == excluded for p in entries.provenance)
    return np.flatnonzero(~np.fromiter(same, np.bool_, len(entries)))

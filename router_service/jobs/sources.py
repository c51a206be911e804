"""Where a memory's entries came from: one pass over them, which keeps a row per source and 8 bytes per example."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from router_service.arrays import U64, Entries, HitCounts
from router_service.backends.base import Maintained, Report, pages
from router_service.memories.layer import LayerMemory

# Entries read at a time, and of an engine beside the lookups: 0.9 ms. With 256 p99 of lookups is 2.1 times without,
# with 64 1.3 times, and a listing takes as long.
_PAGE_ENTRIES, _PAGE_BESIDE = 1024, 64
# While the memory is searched the reader rests so many times as long as it read, as copies do.
_REST = 6.0
# Sources with a row of their own, some 400 bytes each.
MAX_SOURCES = 100_000
# Examples that wait until the new ones among them are counted.
_PENDING = 1 << 16


@dataclass(slots=True)
class Source:
    """What there is of one source in the layers that were read; an example of several layers counts once.

    Times of the entries made first and last, in milliseconds since the epoch.
    """

    source: str
    entries: int = 0
    examples: int = 0
    first_unix_ms: int = 2**63 - 1
    last_unix_ms: int = 0
    hits: int = 0


@dataclass(frozen=True, slots=True)
class Sources:
    """In the order of their names. `unlisted_entries` are of sources beyond the first MAX_SOURCES that were met."""

    sources: list[Source]
    unlisted_entries: int


def sources_of(layers: Sequence[LayerMemory], report: Report, most: int = MAX_SOURCES) -> Sources:
    """Reads every entry without its key, page by page, and rests in between while lookups go on.

    An entry that is written or deleted meanwhile is counted or not. Raises StorageError, and what `report` raises.
    """
    tally, done = _Tally(most), 0
    total = sum(layer.info().entries for layer in layers)
    for layer in layers:
        hits, started = layer.hits.counts(), time.monotonic()
        size = _PAGE_BESIDE if isinstance(layer.collection, Maintained) else _PAGE_ENTRIES
        for page in pages(layer.collection, size, with_keys=False):
            tally.add(page, hits)
            done += len(page)
            report(f"layer {layer.layer}: read", done, max(done, total))
            _rest(layer, time.monotonic() - started)
            started = time.monotonic()
    return tally.result()


def _rest(layer: LayerMemory, worked_s: float) -> None:
    collection = layer.collection
    if isinstance(collection, Maintained) and collection.pacing.being_searched:
        time.sleep(_REST * worked_s)


class _Tally:
    """Rows by source, and the examples that were seen."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._sources: dict[str, Source] = {}
        self._unlisted = 0
        self._seen: U64 = np.empty(0, np.uint64)  # examples, as hashes
        self._pending: dict[int, Source] = {}  # by the hash of an example, its source

    def add(self, page: Entries, hits: HitCounts) -> None:
        """Counts entries."""
        of_entries = hits.of_entries(page.ids).astype(np.int64).tolist()
        for origin, count in zip(page.provenance, of_entries, strict=True):
            row = self._row(origin.source)
            if row is None:
                self._unlisted += 1
                continue
            row.entries += 1
            row.hits += count
            row.first_unix_ms = min(row.first_unix_ms, origin.created_unix_ms)
            row.last_unix_ms = max(row.last_unix_ms, origin.created_unix_ms)
            # Of two in a million examples one in 10^7 times: 64 bits, with a salt of this process
            self._pending[hash((origin.source, origin.example)) % 2**64] = row
        if len(self._pending) >= max(_PENDING, len(self._seen) // 4):
            self._count_examples()

    def result(self) -> Sources:
        """What was counted."""
        self._count_examples()
        return Sources(sorted(self._sources.values(), key=lambda row: row.source), self._unlisted)

    def _row(self, source: str) -> Source | None:
        row = self._sources.get(source)
        if row is None and len(self._sources) < self._most:
            row = self._sources[source] = Source(source)
        return row

    def _count_examples(self) -> None:
        hashes = np.fromiter(self._pending, np.uint64, len(self._pending))
        new = ~np.isin(hashes, self._seen, assume_unique=True)
        for row, is_new in zip(self._pending.values(), new.tolist(), strict=True):
            row.examples += is_new
        self._seen = np.concatenate([self._seen, hashes[new]])
        self._pending = {}

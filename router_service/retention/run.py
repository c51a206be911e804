"""A run over one layer of n entries: who is still in and why the others are not, their pages and their neighbours.

A collection cannot leave dropped entries out of a search, so it is asked for more: a search is repeated with twice,
four times, ... as many neighbours for the queries that need it, up to MAX_WIDTH. P policies, T queries, w = neighbours
asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from router_service.arrays import (
    F64,
    NO_ID,
    U64,
    Bool,
    Entries,
    ExampleRef,
    Neighbours,
    Rows,
    rows_of,
)
from router_service.backends.base import Collection, pages
from router_service.retention.scores import LayerReading

U32 = NDArray[np.uint32]
MAX_WIDTH = 4096
# Numbers in the neighbours' dense values of one search: 16 MiB in f64.
_MAX_NUMBERS = 1 << 21
_MAX_QUERIES = 256
_STAYS = np.int8(127)


class Ledger:
    """Marks entries policy by policy; bit p of `reasons` [n] stands for policy p of the plan."""

    def __init__(self, ids: U64) -> None:
        """`ids` [n] ascending."""
        self.ids = ids
        self.reasons: U32 = np.zeros(len(ids), np.uint32)
        # The first policy that dropped an entry, by its place in the order of application, and its score there.
        self._dropped_at: NDArray[np.int8] = np.full(len(ids), _STAYS)
        self._merit: F64 = np.zeros(len(ids))
        self._applied = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def kept(self) -> Bool:
        """Which entries [n] are still in."""
        return self.reasons == 0

    def drop(self, policy: int, mask: Bool, merits: F64) -> None:
        """Drops entries `mask` [n] for policy number `policy`; `merits` [n]: who of them would come back first."""
        first = mask & self.kept
        self._dropped_at[first] = self._applied
        self._merit[first] = merits[first]
        self.reasons[mask] |= np.uint32(1 << policy)
        self._applied += 1

    def rescue(self, keep_at_least: int, never: int) -> int:
        """Takes entries back until `keep_at_least` are in, those of the last policy first; returns how many.

        Within a policy the highest score comes first, then the smaller id. Drops by policy `never` (-1: none) stand.
        """
        missing = keep_at_least - int(self.kept.sum())
        candidates = np.flatnonzero(~self.kept & ~self.dropped_by(never))
        keys = (candidates, -self._merit[candidates], -self._dropped_at[candidates])
        back = candidates[np.lexsort(keys)[: max(0, missing)]]
        self.reasons[back] = 0
        self._dropped_at[back] = _STAYS
        return len(back)

    def dropped_by(self, policy: int) -> Bool:
        """Entries [n] that policy number `policy` dropped; none for -1."""
        if policy < 0:
            return np.zeros(len(self), np.bool_)
        return self.reasons & np.uint32(1 << policy) != 0

    def rows_of(self, ids: U64) -> tuple[Rows, Bool]:
        """Rows of ids [...] and whether they are known: entries written meanwhile are not."""
        return rows_of(self.ids, ids)

    def keeps(self, ids: U64) -> Bool:
        """Whether ids [...] are known and still in."""
        rows, known = self.rows_of(ids)
        return known & (self.reasons[rows] == 0) if len(self) else known


# Whether each query [T] has seen enough, from what was found and which slots [T, w] count.
Enough = Callable[[Neighbours, Bool], Bool]
# Which entries count, by their ids [...].
Among = Callable[[U64], Bool]


@dataclass(frozen=True, slots=True)
class Found:
    """What was found for some of the queries."""

    rows: Rows  # [t] of the queries
    neighbours: Neighbours  # [t, w]
    counted: Bool  # [t, w]: still in
    cut_off: Bool  # [t]: there may be more, beyond MAX_WIDTH


def everyone(ids: U64) -> Bool:
    """Dropped entries count as well: all that a search found [...]."""
    return ids != NO_ID


@dataclass(slots=True)
class Run:
    """A run over one layer of n entries."""

    collection: Collection
    reading: LayerReading
    page_entries: int
    on_page: Callable[[str, int], None]
    ledger: Ledger
    gains: F64  # [n], in nats
    scores: dict[int, F64]  # [n] by number of a policy that looks at entries one by one
    cut_off: Bool = field(init=False)  # [n]: whose neighbourhood could not be seen whole

    def __post_init__(self) -> None:
        self.cut_off = np.zeros(len(self.ledger), np.bool_)

    def kept_pages(self, stage: str) -> Iterator[tuple[Rows, Entries]]:
        """Entries that are still in when their page comes, with keys, and their rows; reports progress."""
        done = 0
        for page in pages(self.collection, self.page_entries, with_keys=True):
            chosen = np.flatnonzero(self.ledger.keeps(page.ids))
            if len(chosen):
                rows, _ = self.ledger.rows_of(page.ids[chosen])
                yield rows, page.take(chosen)
                done += len(rows)
                self.on_page(stage, done)

    def mark_cut_off(self, rows: Rows) -> None:
        """Neighbourhoods of these entries were too full of dropped entries or of equals to be seen whole."""
        self.cut_off[rows] = True

    def widening(
        self,
        queries: Entries,
        first_width: int,
        enough: Enough,
        among: Among,
        *,
        other_examples: bool,
    ) -> Iterator[Found]:
        """Every query once, as soon as it has seen enough, every entry, or MAX_WIDTH of them.

        other_examples: leaves out entries of the query's own example, and with them the query itself.
        """
        waiting: Rows = np.arange(len(queries))
        width = min(first_width, MAX_WIDTH)
        while len(waiting):
            again: list[Rows] = []
            for rows in np.array_split(waiting, self._parts(queries, len(waiting), width)):
                found = self._search(queries, rows, width, among, other_examples)
                exhausted = found.neighbours.ids[:, -1] == NO_ID
                satisfied = exhausted | enough(found.neighbours, found.counted)
                done = satisfied | (width >= MAX_WIDTH)
                again.append(rows[~done])
                if done.any():
                    yield _part(found, np.flatnonzero(done), ~satisfied[done])
            waiting, width = np.concatenate(again), min(2 * width, MAX_WIDTH)

    def nearest_elsewhere(self, queries: Entries, k: int, among: Among) -> tuple[Neighbours, Bool]:
        """The k nearest from other examples that count [T, k], and which queries [T] were cut off."""
        result = Neighbours.empty(len(queries), k, queries.values.shape[1])
        cut_off = np.zeros(len(queries), np.bool_)

        def enough(_: Neighbours, counted: Bool) -> Bool:
            return counted.sum(axis=1) >= k

        for found in self.widening(queries, k, enough, among, other_examples=True):
            _fill(result, found, k)
            cut_off[found.rows] = found.cut_off
        return result, cut_off

    def _parts(self, queries: Entries, waiting: int, width: int) -> int:
        """Into how many searches to split, so that neither value rows nor dense values fill the RAM."""
        numbers = width * max(queries.values.shape[1], self.reading.num_experts)
        at_once = min(max(1, _MAX_NUMBERS // numbers), _MAX_QUERIES)
        return -(-waiting // at_once)

    def _search(
        self, queries: Entries, rows: Rows, width: int, among: Among, other_examples: bool
    ) -> Found:
        origins = [queries.provenance[row] for row in rows]
        exclude: Sequence[ExampleRef] = [ExampleRef(o.source, o.example) for o in origins]
        options = self.reading.settings.search(width)
        found = self.collection.search(
            queries.keys[rows], width, options, exclude if other_examples else ()
        )
        return Found(rows, found, among(found.ids), np.zeros(len(rows), np.bool_))


def _part(found: Found, rows: Rows, cut_off: Bool) -> Found:
    all_slots = found.neighbours
    some = Neighbours(all_slots.ids[rows], all_slots.distances[rows], all_slots.values[rows])
    return Found(found.rows[rows], some, found.counted[rows], cut_off)


def _fill(result: Neighbours, found: Found, k: int) -> None:
    """Writes the first k slots that count into the queries' rows of `result`; the others stay empty."""
    order = np.argsort(~found.counted, axis=1, kind="stable")[:, :k]
    counted = np.take_along_axis(found.counted, order, axis=1)
    query, slot = np.nonzero(counted)
    source = order[query, slot]
    target = found.rows[query]
    result.ids[target, slot] = found.neighbours.ids[query, source]
    result.distances[target, slot] = found.neighbours.distances[query, source]
    result.values[target, slot] = found.neighbours.values[query, source]

"""Nearest neighbours among the entries that are still in: the collection cannot leave the others out, so ask for more.

A search is repeated with twice, four times, ... as many neighbours for the queries that need it, up to MAX_WIDTH.
T queries, w = neighbours asked for, W = width of a value row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from router_service.arrays import NO_ID, U64, Bool, Entries, ExampleRef, Neighbours
from router_service.backends.base import Collection, SearchOptions
from router_service.retention.tables import Rows

MAX_WIDTH = 4096
# Numbers in the neighbours' dense values of one search: 16 MiB in f64.
_MAX_NUMBERS = 1 << 21
_MAX_QUERIES = 256

# Whether each query [T] has seen enough, from what was found and which slots [T, w] count.
Enough = Callable[[Neighbours, Bool], Bool]


@dataclass(frozen=True, slots=True)
class Found:
    """What was found for some of the queries."""

    rows: Rows  # [t] of the queries
    neighbours: Neighbours  # [t, w]
    counted: Bool  # [t, w]: still in
    cut_off: Bool  # [t]: there may be more, beyond MAX_WIDTH


@dataclass(frozen=True, slots=True)
class Search:
    """How to search a collection for neighbours that count."""

    collection: Collection
    options: SearchOptions
    keeps: Callable[[U64], Bool]
    num_experts: int

    def widening(
        self, queries: Entries, first_width: int, enough: Enough, *, other_examples: bool
    ) -> Iterator[Found]:
        """Every query once, as soon as it has seen enough, every entry, or MAX_WIDTH of them.

        other_examples: leaves out entries of the query's own example, and with them the query itself.
        """
        waiting: Rows = np.arange(len(queries))
        width = min(first_width, MAX_WIDTH)
        while len(waiting):
            again: list[Rows] = []
            for rows in np.array_split(waiting, self._parts(queries, len(waiting), width)):
                found = self._once(queries, rows, width, other_examples)
                exhausted = found.neighbours.ids[:, -1] == NO_ID
                satisfied = exhausted | enough(found.neighbours, found.counted)
                done = satisfied | (width >= MAX_WIDTH)
                again.append(rows[~done])
                if done.any():
                    yield _part(found, np.flatnonzero(done), ~satisfied[done])
            waiting, width = np.concatenate(again), min(2 * width, MAX_WIDTH)

    def nearest_elsewhere(self, queries: Entries, k: int) -> tuple[Neighbours, Bool]:
        """The k nearest from other examples that count [T, k], and which queries [T] were cut off."""
        result = Neighbours.empty(len(queries), k, queries.values.shape[1])
        cut_off = np.zeros(len(queries), np.bool_)

        def enough(_: Neighbours, counted: Bool) -> Bool:
            return counted.sum(axis=1) >= k

        for found in self.widening(queries, k, enough, other_examples=True):
            _fill(result, found, k)
            cut_off[found.rows] = found.cut_off
        return result, cut_off

    def _parts(self, queries: Entries, waiting: int, width: int) -> int:
        """Into how many searches to split, so that neither value rows nor dense values fill the RAM."""
        numbers = width * max(queries.values.shape[1], self.num_experts)
        at_once = min(max(1, _MAX_NUMBERS // numbers), _MAX_QUERIES)
        return -(-waiting // at_once)

    def _once(self, queries: Entries, rows: Rows, width: int, other_examples: bool) -> Found:
        origins = [queries.provenance[row] for row in rows]
        exclude: Sequence[ExampleRef] = [ExampleRef(o.source, o.example) for o in origins]
        found = self.collection.search(
            queries.keys[rows], width, self.options, exclude if other_examples else ()
        )
        return Found(rows, found, self.keeps(found.ids), np.zeros(len(rows), np.bool_))


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

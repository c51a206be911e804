"""Near-duplicates: links between entries, and who stays of those that are linked. Pure functions.

n entries, T of them with K neighbours each. The place of an entry says who stays: 0 for the highest gain, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from router_service.arrays import F32, Bool
from router_service.retention.plan import NearDuplicates
from router_service.retention.reading import LayerReading
from router_service.retention.tables import F64, Rows

# Links kept per entry, those to the best entries; bounds the RAM by n.
MAX_LINKS = 64


@dataclass(frozen=True, slots=True)
class Links:
    """Entry `worse[e]` is near `better[e]` in key and value; rows of the ledger."""

    worse: Rows  # [E]
    better: Rows  # [E]
    truncated: Rows  # rows of entries that may have more links than are named


def joined(parts: Sequence[Links]) -> Links:
    """Links of parts, end to end."""

    def column(name: str) -> Rows:
        return np.concatenate([np.empty(0, np.intp), *(getattr(part, name) for part in parts)])

    return Links(column("worse"), column("better"), column("truncated"))


def places(gains: F64) -> Rows:
    """Place [n] of each entry: from the highest gain down, equals by row."""
    place = np.empty(len(gains), np.intp)
    place[np.lexsort((np.arange(len(gains)), -gains))] = np.arange(len(gains))
    return place


def near_pairs(
    values: F32, neighbours: F32, distances: F32, reading: LayerReading, policy: NearDuplicates
) -> Bool:
    """Which neighbours [T, K] say nearly the same at nearly the same place.

    values: value rows [T, W] of the entries; neighbours: those of their neighbours [T, K, W], at `distances` [T, K].
    """
    near = within(distances, reading, policy)
    same = reading.agreement(reading.dense(values)[:, None, :], reading.dense(neighbours))
    return near & (same >= policy.agreement)


def within(distances: F32, reading: LayerReading, policy: NearDuplicates) -> Bool:
    """Whether distances [...] are near enough; that of an empty slot never is."""
    return np.isfinite(distances) & (reading.similarities(distances) >= policy.similarity)


def links_to_better(
    rows: Rows, neighbour_rows: Rows, near: Bool, place: Rows, cut_off: Bool
) -> Links:
    """Links of entries `rows` [T] to those of their neighbours [T, K] that are `near` and have a better place.

    cut_off [T]: entries that may have more such neighbours than K. An entry among its own neighbours is no link.
    """
    better = near & (place[neighbour_rows] < place[rows][:, None])
    order = np.argsort(np.where(better, place[neighbour_rows], len(place)), axis=1, kind="stable")
    first = order[:, :MAX_LINKS]
    entry, slot = np.nonzero(np.take_along_axis(better, first, axis=1))
    truncated = rows[cut_off | (better.sum(axis=1) > MAX_LINKS)]
    return Links(rows[entry], neighbour_rows[entry, first[entry, slot]], truncated)


def redundant(links: Links, place: Rows, truncated: Bool) -> Bool:
    """Which of n entries go.

    From the best place on, an entry that is still in sends away all that are linked to it, so nobody goes for the sake
    of a chain. An entry whose links are incomplete (`truncated` [n]) goes for any better one that it is linked to: a
    huge group of equals, of which each entry sees only some, shrinks all the same.
    """
    order = np.lexsort((links.worse, place[links.better]))
    worse, better = links.worse[order], links.better[order]
    starts = np.flatnonzero(np.diff(better, prepend=-1))
    gone = np.zeros(len(place), np.bool_)
    for start, stop in zip(starts, np.append(starts, len(better))[1:], strict=True):
        linked = worse[start:stop]
        gone[linked if not gone[better[start]] else linked[truncated[linked]]] = True
    return gone

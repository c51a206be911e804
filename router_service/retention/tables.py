"""Columns keyed by entry id: what the caller knows of entries beside the entries themselves. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from router_service.arrays import F32, U64, Bool
from router_service.errors import InvalidTensor

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Rows = NDArray[np.intp]
_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True, eq=False)
class HitCounts:
    """How often entries were retrieved; an id that is not here was never retrieved."""

    ids: U64  # [m] ascending, each once
    hits: I64  # [m]

    @classmethod
    def of(cls, hits: Mapping[int, int]) -> HitCounts:
        """Counts of an id -> hits mapping."""
        ids = np.fromiter(hits.keys(), np.uint64, len(hits))
        counts = np.fromiter(hits.values(), np.int64, len(hits))
        order = np.argsort(ids)
        return cls(ids[order], counts[order])

    def of_entries(self, ids: U64) -> F64:
        """Hits [n] of entries [n]."""
        rows, known = rows_of(self.ids, ids)
        return _gathered(self.hits, rows, known).astype(np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class OwnAssignments:
    """The frozen router's own assignments at the keys of entries, as value rows of an assignment memory."""

    ids: U64  # [m] ascending, each once
    values: F32  # [m, 2k]: k expert ids, then k weights

    def of_entries(self, ids: U64) -> tuple[F32, Bool]:
        """Value rows [n, 2k] of entries [n] and which of them are known; 0 where not."""
        rows, known = rows_of(self.ids, ids)
        return _gathered(self.values, rows, known), known


def rows_of(table: U64, ids: U64) -> tuple[Rows, Bool]:
    """Where `ids` [...] are in an ascending `table` [m], and whether they are: (rows, known); row 0 when unknown."""
    if not len(table):
        return np.zeros(ids.shape, np.intp), np.zeros(ids.shape, np.bool_)
    rows = np.minimum(np.searchsorted(table, ids), len(table) - 1)
    known = table[rows] == ids
    return np.where(known, rows, 0), known


def require_ascending(field: str, ids: U64, rows: int) -> None:
    """Raises InvalidTensor unless there is one id per row, ascending, each once."""
    if ids.shape != (rows,) or (len(ids) > 1 and not (ids[:-1] < ids[1:]).all()):
        raise InvalidTensor(field, f"shape {list(ids.shape)}", f"{rows} ids, ascending, each once")


def mixed_ids(ids: U64, seed: int) -> U64:
    """A random-looking number per entry [n] that depends on nothing but its id and the seed (SplitMix64)."""
    salt = _split_mix(np.array([seed % 2**64], np.uint64))
    return _split_mix(ids ^ salt)


def _split_mix(numbers: U64) -> U64:
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _gathered(column: NDArray[_Scalar], rows: Rows, known: Bool) -> NDArray[_Scalar]:
    """Rows of a column [m, ...]; 0 where not known."""
    if not len(column):
        return np.zeros((*rows.shape, *column.shape[1:]), column.dtype)
    taken = column[rows]
    taken[~known] = 0
    return taken

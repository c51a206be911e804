"""The value rows of a collection in RAM, so that a search never parses a payload.

A table is a snapshot: adding rows makes a new table and leaves the old one as it was, so readers need no lock. All
tables of one history share one growing array; a table sees only the rows that its own index names.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router_service.arrays import F32, NO_ID, U64, Bool
from router_service.backends.disk import write_atomically
from router_service.errors import CorruptMemory

_SMALLEST_CAPACITY = 1024


@dataclass(slots=True)
class _Rows:
    """Rows [0, used) of `array` [capacity, W] are written and never change."""

    array: F32
    used: int


class ValueTable:
    """id -> value row [W] of n entries."""

    def __init__(self, ids: U64, values: F32) -> None:
        """`ids` [n] ascending and unique, `values` [n, W]; both are kept, not copied."""
        self._ids: U64 = ids
        self._row_of: NDArray[np.intp] = np.arange(len(ids))
        self._rows = _Rows(values, len(ids))

    def __len__(self) -> int:
        return len(self._ids)

    def gather(self, ids: U64) -> F32:
        """Value rows [..., W] of ids [...]; 0 where an id is NO_ID. Raises CorruptMemory on an unknown id."""
        if not len(self):
            position = np.zeros(ids.shape, np.intp)
            known = np.zeros(ids.shape, np.bool_)
            values = np.zeros((*ids.shape, self._rows.array.shape[1]), np.float32)
        else:
            position = np.minimum(np.searchsorted(self._ids, ids), len(self) - 1)
            known = self._ids[position] == ids
            values = self._rows.array[self._row_of[position]]
            values[~known] = 0.0
        if not np.array_equal(known, ids != NO_ID):
            raise CorruptMemory(f"the engine found entries without a value row: {ids[~known][:3]}")
        return values

    def with_rows(self, ids: U64, values: F32) -> ValueTable:
        """A table that also has `values` [m, W] under `ids` [m]; of repeated ids the last counts."""
        added, last = np.unique(ids[::-1], return_index=True)
        rows, first = self._append(values)
        row_of = first + len(ids) - 1 - last
        position = np.searchsorted(self._ids, added)
        known = np.zeros(len(added), np.bool_)
        inside = position < len(self)
        known[inside] = self._ids[position[inside]] == added[inside]
        table = ValueTable.__new__(ValueTable)
        table._rows = rows
        table._ids = np.insert(self._ids, position[~known], added[~known])
        base = self._row_of if rows is self._rows else np.arange(len(self))
        replaced = base.copy()
        replaced[position[known]] = row_of[known]
        table._row_of = np.insert(replaced, position[~known], row_of[~known])
        return table

    def without(self, ids: U64) -> ValueTable:
        """A table that lacks the entries of these ids; those it does not have count for nothing."""
        kept = ~np.isin(self._ids, ids)
        table = ValueTable.__new__(ValueTable)
        table._rows, table._ids, table._row_of = self._rows, self._ids[kept], self._row_of[kept]
        return table

    def holds(self, ids: U64) -> Bool:
        """Which of these ids [n] are in the table."""
        return np.isin(ids, self._ids)

    def _append(self, values: F32) -> tuple[_Rows, int]:
        """The array that holds `values` after this table's rows, and where they start."""
        rows = self._rows
        if rows.used + len(values) > len(rows.array):
            rows = self._compacted(len(self) + len(values))
        first = rows.used
        rows.array[first : first + len(values)] = values
        rows.used += len(values)
        return rows, first

    def _compacted(self, needed: int) -> _Rows:
        """A copy of the rows in use, in the order of ids, with room to grow."""
        capacity = max(_SMALLEST_CAPACITY, 2 * needed)
        array = np.empty((capacity, self._rows.array.shape[1]), np.float32)
        array[: len(self)] = self._rows.array[self._row_of]
        return _Rows(array, len(self))

    def save(self, path: Path) -> None:
        """Writes the table to `path` at once and durably. Raises StorageError."""
        values = self._rows.array[self._row_of]
        write_atomically(path, lambda file: np.savez(file, ids=self._ids, values=values))

    @staticmethod
    def load(path: Path, value_width: int) -> ValueTable | None:
        """The table saved at `path`, or None when there is no intact one: it can be rebuilt from the engine."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
                ids, values = saved["ids"], saved["values"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        if ids.dtype != np.uint64 or values.dtype != np.float32:
            return None
        if ids.ndim != 1 or values.shape != (len(ids), value_width):
            return None
        return ValueTable(ids, values)

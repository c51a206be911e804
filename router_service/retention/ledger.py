"""Who is still in, and why the others are not. One ledger per run over one layer; n entries, P policies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from router_service.arrays import F32, F64, U64, Bool, Entries, Rows, rows_of
from router_service.backends.base import Collection, pages

U32 = NDArray[np.uint32]
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


def kept_pages(
    collection: Collection, ledger: Ledger, page_entries: int
) -> Iterator[tuple[Rows, Entries]]:
    """Entries that are still in when their page comes, with keys, and their rows in the ledger."""
    for page in pages(collection, page_entries, with_keys=True):
        chosen = np.flatnonzero(ledger.keeps(page.ids))
        if len(chosen):
            rows, _ = ledger.rows_of(page.ids[chosen])
            yield rows, page.take(chosen)


def key_blocks(
    parts: Iterator[tuple[Rows, Entries]], block_entries: int
) -> Iterator[tuple[Rows, F32]]:
    """Rows and keys in blocks of exactly `block_entries` (the last one less), however the pages fell."""
    rows: list[Rows] = []
    keys: list[F32] = []
    for page_rows, page in parts:
        rows.append(page_rows)
        keys.append(page.keys)
        while sum(map(len, rows)) >= block_entries:
            joined_rows, joined_keys = np.concatenate(rows), np.concatenate(keys)
            yield joined_rows[:block_entries], joined_keys[:block_entries]
            rows, keys = [joined_rows[block_entries:]], [joined_keys[block_entries:]]
    if sum(map(len, rows)):
        yield np.concatenate(rows), np.concatenate(keys)


def entries_of(collection: Collection, ids: Sequence[int]) -> list[Entries]:
    """The entries of these ids, one by one and with keys; those that are gone are left out."""
    found = [collection.scroll(number - 1 if number else None, 1) for number in ids]
    return [one for one, number in zip(found, ids, strict=True) if list(one.ids) == [number]]

"""A collection page by page: only what fits a page is in RAM at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from router_service.arrays import F32, Entries
from router_service.backends.base import Collection
from router_service.retention.ledger import Ledger
from router_service.retention.tables import Rows


def pages(collection: Collection, page_entries: int, *, with_keys: bool) -> Iterator[Entries]:
    """Every entry in the order of ids, at most `page_entries` at a time; no empty page."""
    after: int | None = None
    while len(page := collection.scroll(after, page_entries, with_keys=with_keys)):
        yield page
        after = int(page.ids[-1])


def kept_pages(
    collection: Collection, ledger: Ledger, page_entries: int
) -> Iterator[tuple[Rows, Entries]]:
    """Entries that are still in when their page comes, with keys, and their rows in the ledger."""
    for page in pages(collection, page_entries, with_keys=True):
        chosen = np.flatnonzero(ledger.keeps(page.ids))
        if len(chosen):
            rows, _ = ledger.rows_of(page.ids[chosen])
            yield rows, taken(page, chosen)


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


def taken(page: Entries, rows: Rows) -> Entries:
    """The entries of these rows."""
    provenance = [page.provenance[row] for row in rows]
    return Entries(page.ids[rows], page.keys[rows], page.values[rows], provenance)


def joined(parts: Sequence[Entries]) -> Entries:
    """At least one part, end to end."""
    return Entries(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.keys for part in parts]),
        np.concatenate([part.values for part in parts]),
        [origin for part in parts for origin in part.provenance],
    )

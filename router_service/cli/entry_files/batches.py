"""What files are read into and written from: batches of one layer's entries, with their places in the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from router_service.arrays import F32, Entries
from router_service.memories.settings import Kind

# Bytes of keys and values in one batch, and its most entries.
BATCH_BYTES = 4 * 1024 * 1024
BATCH_ENTRIES = 512


class FileError(Exception):
    """A file that cannot be used; says where and why."""

    def __init__(self, path: Path, place: str, problem: str) -> None:
        super().__init__(": ".join(part for part in (str(path), place, problem) if part))


@dataclass(frozen=True, slots=True)
class EntryShape:
    """What a memory's entries look like."""

    kind: Kind
    hidden_size: int
    num_experts: int
    top_k: int

    @property
    def value_width(self) -> int:
        """Numbers in a value row: N logit deltas, or k experts and k weights."""
        return self.num_experts if self.kind is Kind.LOGIT_DELTA else 2 * self.top_k

    @property
    def batch_entries(self) -> int:
        """Entries that travel in one message."""
        return max(
            1, min(BATCH_ENTRIES, BATCH_BYTES // (4 * (self.hidden_size + self.value_width)))
        )


@dataclass(frozen=True, slots=True)
class EntryBatch:
    """Entries of one layer; rows[i] is the place of entry i in the file, counted from 1."""

    layer: int
    entries: Entries
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)


class EntryReader(Protocol):
    """An opened file of entries. `path` is its name; `total` is how many entries it holds, of every layer."""

    path: Path
    total: int

    def batches(self) -> Iterator[EntryBatch]:
        """The entries in the order of the file, in small batches. Raises FileError."""
        ...

    def place(self, layer: int, row: int) -> str:
        """How to find an entry in the file: `line 7`."""
        ...


class EntryWriter(Protocol):
    """A file of entries in the making."""

    def write(self, layer: int, entries: Entries) -> None:
        """Appends entries of one layer. Layers come one after the other."""
        ...

    def finish(self) -> None:
        """Completes the file. Raises FileError."""
        ...

    def close(self) -> None:
        """Gives the files back; without finish() what was written is worth nothing. Closing twice is allowed."""
        ...


def regroup(batches: Iterable[EntryBatch], limit: int) -> Iterator[EntryBatch]:
    """The same entries in batches of `limit` per layer, or less at the end: rows of several layers may be mixed."""
    waiting: dict[int, list[EntryBatch]] = {}
    for batch in batches:
        parts = waiting.setdefault(batch.layer, [])
        parts.append(batch)
        if sum(len(part) for part in parts) >= limit:
            joined = _joined(waiting.pop(batch.layer))
            whole = len(joined) // limit * limit
            for start in range(0, whole, limit):
                yield _cut(joined, start, start + limit)
            if whole < len(joined):
                waiting[batch.layer] = [_cut(joined, whole, len(joined))]
    for parts in waiting.values():
        yield _joined(parts)


def by_layer(layers: Sequence[int], entries: Entries, rows: Sequence[int]) -> Iterator[EntryBatch]:
    """Entries of mixed layers as one batch per layer, each in the order of the file."""
    numbers = np.asarray(layers)
    for layer in dict.fromkeys(layers):
        chosen = np.flatnonzero(numbers == layer).tolist()
        part = Entries(
            entries.ids[chosen],
            entries.keys[chosen],
            entries.values[chosen],
            [entries.provenance[i] for i in chosen],
        )
        yield EntryBatch(layer, part, [rows[i] for i in chosen])


def first_not_finite(matrix: F32) -> tuple[int, int] | None:
    """Row and column of the first NaN or infinity of [n, d]."""
    broken = np.argwhere(~np.isfinite(matrix))
    return (int(broken[0][0]), int(broken[0][1])) if len(broken) else None


def _joined(parts: Sequence[EntryBatch]) -> EntryBatch:
    if len(parts) == 1:
        return parts[0]
    entries = [part.entries for part in parts]
    return EntryBatch(
        parts[0].layer,
        Entries(
            np.concatenate([e.ids for e in entries]),
            np.concatenate([e.keys for e in entries]),
            np.concatenate([e.values for e in entries]),
            [origin for e in entries for origin in e.provenance],
        ),
        [row for part in parts for row in part.rows],
    )


def _cut(batch: EntryBatch, start: int, stop: int) -> EntryBatch:
    return EntryBatch(batch.layer, batch.entries.slice(start, stop), batch.rows[start:stop])

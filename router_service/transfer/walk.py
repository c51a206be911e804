"""Two sides of a layer walked together in the order of ids: what one has, the other lacks, or has otherwise.

Nothing is held but a page of each side, of the target only ids and digests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from router_service.arrays import U64, Entries
from router_service.errors import StorageError
from router_service.transfer.checksums import digests
from router_service.transfer.sides import Side


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring entries of one side: ids [n] ascending, digests [n, 2]; `entries` only where they are needed."""

    ids: U64
    digests: U64
    entries: Entries | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def slice(self, start: int, stop: int) -> Part:
        """Rows [start, stop)."""
        rows = np.s_[start:stop]
        entries = self.entries.slice(start, stop) if self.entries is not None else None
        return Part(self.ids[rows], self.digests[rows], entries)


_NOTHING = Part(np.empty(0, np.uint64), np.empty((0, 2), np.uint64))


@dataclass(frozen=True, slots=True)
class Difference:
    """Entries to write, of which the target lacks `added`, and the ids [n] that only the target has."""

    to_write: Entries | None
    added: int
    replaced: int
    only_in_target: U64


def parts(pages: Iterable[Entries], *, with_entries: bool) -> Iterator[Part]:
    """Pages with their digests. Raises StorageError when ids do not rise from one entry to the next."""
    last: int = -1
    for page in pages:
        if int(page.ids[0]) <= last or (page.ids[1:] <= page.ids[:-1]).any():
            raise StorageError(f"entries after id {last} are not in the order of ids; run doctor")
        last = int(page.ids[-1])
        yield Part(page.ids, digests(page), page if with_entries else None)


def joined(source: Iterator[Part], target: Iterator[Part]) -> Iterator[tuple[Part, Part]]:
    """Both sides cut at the same ids: every entry comes once, and together with that of the same id."""
    left, right = next(source, None), next(target, None)
    while left is not None or right is not None:
        bound = min(part.ids[-1] for part in (left, right) if part is not None)
        ours, left = _cut(left, bound, source)
        theirs, right = _cut(right, bound, target)
        yield ours, theirs


def difference(source: Part, target: Part) -> Difference:
    """Of two parts between the same ids; the source's come with their entries."""
    _, ours, theirs = np.intersect1d(
        source.ids, target.ids, assume_unique=True, return_indices=True
    )
    wanted = np.ones(len(source), np.bool_)
    wanted[ours] = False
    added = int(wanted.sum())
    wanted[ours] = (source.digests[ours] != target.digests[theirs]).any(axis=1)
    only = np.ones(len(target), np.bool_)
    only[theirs] = False
    rows = np.flatnonzero(wanted)
    entries = source.entries.take(rows) if len(rows) and source.entries is not None else None
    return Difference(entries, added, len(rows) - added, target.ids[only])


def _cut(part: Part | None, bound: np.uint64, rest: Iterator[Part]) -> tuple[Part, Part | None]:
    """The rows up to id `bound`, and what comes next on this side."""
    if part is None:
        return _NOTHING, None
    stop = int(np.searchsorted(part.ids, bound, "right"))
    if stop == len(part):
        return part, next(rest, None)
    return part.slice(0, stop), part.slice(stop, len(part))


Advance = Callable[[int], None]


@dataclass(slots=True)
class Walk:
    """What differs in one layer. Counts and ids are whole when batches() is at its end."""

    layer: int
    source: Side
    target: Side
    advance: Advance  # hears of the source's entries as they are passed
    added: int = 0
    replaced: int = 0
    _source_ids: list[U64] = field(default_factory=list)
    _only_in_target: list[U64] = field(default_factory=list)

    def batches(self) -> Iterator[Entries]:
        """What to write, page by page."""
        with (
            closing(self.source.pages(self.layer)) as ours,
            closing(self.target.pages(self.layer)) as theirs,
        ):
            steps = joined(parts(ours, with_entries=True), parts(theirs, with_entries=False))
            for source, target in steps:
                found = difference(source, target)
                self.added += found.added
                self.replaced += found.replaced
                self._source_ids.append(source.ids)
                self._only_in_target.append(found.only_in_target)
                if found.to_write is not None:
                    yield found.to_write
                self.advance(len(source))

    @property
    def source_ids(self) -> U64:
        """[n], ascending."""
        return _concatenated(self._source_ids)

    @property
    def only_in_target(self) -> U64:
        """Ids [n], ascending."""
        return _concatenated(self._only_in_target)


def _concatenated(ids: list[U64]) -> U64:
    return np.concatenate([np.empty(0, np.uint64), *ids])

"""One layer's way through the join of both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from router_service.arrays import U64, Entries
from router_service.migration.merge_join import difference, joined, parts
from router_service.migration.sides import Side

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

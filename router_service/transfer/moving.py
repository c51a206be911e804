"""Pass after pass over both sides of a memory, until a pass finds no difference and both sides sum up to the same.

Nothing is written down about a migration: what is there already is found again, so a run that was killed is finished by
the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field

import numpy as np

from router_service.arrays import U64, Bool
from router_service.backends.base import Compression
from router_service.transfer.checksums import EntrySum, checksum
from router_service.transfer.sides import LayerState, Side
from router_service.transfer.walk import Advance, Walk

MAX_PASSES = 6
# Ids that are deleted at a time.
_DELETED_AT_ONCE = 1 << 16

# A stage of the work and its number of entries, as a bar; yields the function that advances it. That is called between
# writes: what it raises ends the work where it is sound.
Progress = Callable[[str, int | None], AbstractContextManager[Advance]]


@dataclass(slots=True)
class LayerCounts:
    """What a run did to one layer of the target, and how many entries only the target has, and keeps."""

    added: int = 0
    replaced: int = 0
    deleted: int = 0
    only_in_target: int = 0

    @property
    def changed(self) -> int:
        """Entries that were not the same on both sides."""
        return self.added + self.replaced + self.deleted

    def add(self, later: LayerCounts) -> None:
        """Counts a later pass."""
        self.added += later.added
        self.replaced += later.replaced
        self.deleted += later.deleted
        self.only_in_target = later.only_in_target


@dataclass(frozen=True, slots=True)
class LayerSums:
    """Both sides of a layer, read anew."""

    layer: int
    source: EntrySum
    target: EntrySum

    @property
    def equal(self) -> bool:
        """Same count, same checksum."""
        return self.source == self.target


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. `sums`: empty when it did not come so far as to compare them."""

    passes: int
    changed_in_last_pass: int
    sums: tuple[LayerSums, ...] = ()

    @property
    def verified(self) -> bool:
        """Whether every layer of the target is that of the source."""
        return bool(self.sums) and all(layer.equal for layer in self.sums)


@dataclass(slots=True)
class Migration:
    """Makes `layers` layers of the target those of the source.

    What only the target has goes with `delete`, or when this run saw it on the source before; for that it keeps 8 bytes
    per entry in RAM.
    """

    source: Side
    target: Side
    layers: int
    delete: bool
    counts: dict[int, LayerCounts] = field(default_factory=dict)
    _seen: dict[int, U64] = field(default_factory=dict)

    @property
    def only_in_target(self) -> int:
        """Entries that keep the target from being the same, as of the last pass."""
        return sum(counts.only_in_target for counts in self.counts.values())

    def run(self, progress: Progress) -> Outcome:
        """Raises what the sides raise; what was written stays, and the next run goes on."""
        outcome = Outcome(0, 0)
        for number in range(1, MAX_PASSES + 1):
            changed = self.one_pass(progress, "copying" if number == 1 else "comparing")
            outcome = Outcome(number, changed)
            if changed:
                continue
            if self.only_in_target:
                return outcome
            outcome = Outcome(number, 0, self._sums(progress))
            if outcome.verified:
                return outcome
        return outcome

    def one_pass(self, progress: Progress, label: str) -> int:
        """Walks all layers once; returns how many entries were not the same."""
        changed = 0
        with progress(label, self._entries()) as advance:
            for layer in range(self.layers):
                counts = self._bring(layer, advance)
                self.counts.setdefault(layer, LayerCounts()).add(counts)
                changed += counts.changed
        return changed

    def _bring(self, layer: int, advance: Advance) -> LayerCounts:
        walk = Walk(layer, self.source, self.target, advance)
        for _ in self.target.write(layer, walk.batches()):
            pass  # the walk counts
        surplus = walk.only_in_target
        gone = surplus[self._may_go(layer, surplus)]
        for start in range(0, len(gone), _DELETED_AT_ONCE):
            self.target.delete(layer, gone[start : start + _DELETED_AT_ONCE])
        self._seen[layer] = np.union1d(self._seen_before(layer), walk.source_ids)
        return LayerCounts(walk.added, walk.replaced, len(gone), len(surplus) - len(gone))

    def _may_go(self, layer: int, ids: U64) -> Bool:
        if self.delete:
            return np.ones(len(ids), np.bool_)
        return np.isin(ids, self._seen_before(layer))

    def _seen_before(self, layer: int) -> U64:
        return self._seen.get(layer, np.empty(0, np.uint64))

    def _sums(self, progress: Progress) -> tuple[LayerSums, ...]:
        with progress("verifying", 2 * self._entries()) as advance:
            return tuple(
                LayerSums(
                    layer, _sum(self.source, layer, advance), _sum(self.target, layer, advance)
                )
                for layer in range(self.layers)
            )

    def _entries(self) -> int:
        return sum(self.source.state(layer).entries for layer in range(self.layers))


def _sum(side: Side, layer: int, advance: Advance) -> EntrySum:
    with closing(side.pages(layer)) as pages:
        return checksum(pages, advance)


@dataclass(frozen=True, slots=True)
class LayerIndex:
    """What became of one layer's search keys. `refused`: why the target cannot have those of the source, or empty."""

    layer: int
    source: Compression
    target: Compression
    optimized: bool
    refused: str = ""


def bring_indexes(
    source: Side, target: Side, layers: int, progress: Progress, *, optimize: bool
) -> list[LayerIndex]:
    """Optimizes the target's layers where the source has an index or compression that they lack.

    Without `optimize` only says what they have. What `progress` raises as it advances ends it.
    """
    with progress("optimizing", layers) as advance:
        done = []
        for layer in range(layers):
            wanted = source.state(layer)
            done.append(_brought(wanted, target, layer, advance, optimize=optimize))
            advance(1)
        return done


def _brought(
    wanted: LayerState, target: Side, layer: int, advance: Advance, *, optimize: bool
) -> LayerIndex:
    have, refused = target.state(layer), ""
    optimized = optimize and _lacks(have, wanted)
    if optimized:
        refused = target.optimize(layer, wanted.compression, lambda *_: advance(0))
        have = target.state(layer)
    return LayerIndex(
        layer, wanted.compression, have.compression, optimized and not refused, refused
    )


def _lacks(have: LayerState, wanted: LayerState) -> bool:
    if have.compression != wanted.compression:
        return True
    return bool(wanted.indexed_entries) and have.indexed_entries < have.entries

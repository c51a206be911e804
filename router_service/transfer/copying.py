"""Entries from a source into a sink: everything, or what differs, joined by id layer by layer, and then verified.

Nothing is written down about a copy: what is there already is found again, so one that was cut short is finished by the
next. Nothing is held in RAM but a page of each endpoint, and 8 bytes per entry when what only the sink has counts.

Two entries are equal where their bytes are, see arrays.entry_bytes() and docs/formats.md.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from router_service.arrays import U64, Bool, Entries, Provenance, entry_bytes
from router_service.errors import StorageError, shorten
from router_service.transfer.endpoints import Advance, Batch, Progress, Sink, Source

MAX_PASSES = 6
# Ids that are deleted at a time.
_DELETED_AT_ONCE = 1 << 16
_DIGEST_BYTES = 16
_NO_IDS: U64 = np.empty(0, np.uint64)
_NOTHING = Entries.concat([])


@dataclass(frozen=True, slots=True)
class EntrySum:
    """How many entries a layer holds, and the sha256 (hex) over their bytes in the order of ids."""

    entries: int
    sha256: str


def digests(entries: Entries) -> U64:
    """BLAKE2b of the bytes of each entry, [n, 2]: equal where the entries are."""
    hashed = (
        hashlib.blake2b(each, digest_size=_DIGEST_BYTES).digest() for each in entry_bytes(entries)
    )
    return np.frombuffer(b"".join(hashed), np.uint64).reshape(len(entries), 2)


def checksum(pages: Iterable[Entries], advance: Advance) -> EntrySum:
    """Of pages in the order of ids; `advance` hears of the entries of each."""
    count, total = 0, hashlib.sha256()
    for page in pages:
        for each in entry_bytes(page):
            total.update(each)
        count += len(page)
        advance(len(page))
    return EntrySum(count, total.hexdigest())


# Of entries that both endpoints have, the source's and the sink's in the same order: which of the source's are written.
# The sink's come without keys unless the policy is `differing`.
OnConflict = Callable[[Entries, Entries], Bool]


def keep(ours: Entries, theirs: Entries) -> Bool:
    """None: the sink's stay."""
    return np.zeros(len(ours), np.bool_)


def replace(ours: Entries, theirs: Entries) -> Bool:
    """All, also those that are the same."""
    return np.ones(len(ours), np.bool_)


def newer(ours: Entries, theirs: Entries) -> Bool:
    """Those that were made later than the sink's."""
    pairs = zip(ours.provenance, theirs.provenance, strict=True)
    return np.array([one.created_unix_ms > other.created_unix_ms for one, other in pairs], np.bool_)


def differing(ours: Entries, theirs: Entries) -> Bool:
    """Those that are not the same to the last bit."""
    return (digests(ours) != digests(theirs)).any(axis=1)


@dataclass(slots=True)
class OtherTexts:
    """An OnConflict that decides as `policy`, and keeps account of ids that two texts share, one of which is lost."""

    policy: OnConflict
    entries: int = 0
    example: str = ""  # one of them, human-readable

    def __call__(self, ours: Entries, theirs: Entries) -> Bool:
        """As the policy."""
        for number, one, other in zip(ours.ids, ours.provenance, theirs.provenance, strict=True):
            if _text_of(one) != _text_of(other):
                self.entries += 1
                self.example = self.example or (
                    f"id {number}: {_human_readable(one)}, and {_human_readable(other)}"
                )
        return self.policy(ours, theirs)


def _human_readable(origin: Provenance) -> str:
    return (
        f"source {shorten(origin.source)} example {shorten(origin.example)} "
        f"position {origin.position} token {origin.token}"
    )


def _text_of(origin: Provenance) -> tuple[str, str, int, int]:
    return origin.source, origin.example, origin.position, origin.token


def in_order(pages: Iterable[Entries]) -> Iterator[Entries]:
    """The same pages. Raises StorageError when ids do not rise from one entry to the next."""
    last: int = -1
    for page in pages:
        if int(page.ids[0]) <= last or (page.ids[1:] <= page.ids[:-1]).any():
            raise StorageError(f"entries after id {last} are not in the order of ids; run doctor")
        last = int(page.ids[-1])
        yield page


def joined(
    source: Iterator[Entries],
    sink: Iterator[Entries],
    holds_any: Callable[[U64], bool] | None = None,
) -> Iterator[tuple[Entries, Entries]]:
    """Both cut at the same ids: every entry comes once, and together with that of the same id.

    With `holds_any` only the sink's entries between those of the source count, and pages of the source none of whose
    ids the sink holds come without reading the sink.
    """
    theirs = _NOTHING
    for ours in source:
        if holds_any is not None and not holds_any(ours.ids):
            yield ours, _NOTHING
            continue
        rest = ours
        while len(rest):
            theirs = theirs if len(theirs) else next(sink, _NOTHING)
            bound = min(page.ids[-1] for page in (rest, theirs) if len(page))
            (mine, rest), (other, theirs) = _cut(rest, bound), _cut(theirs, bound)
            yield mine, other
    if holds_any is None:
        yield _NOTHING, theirs
        yield from ((_NOTHING, page) for page in sink)


def _cut(page: Entries, bound: np.uint64) -> tuple[Entries, Entries]:
    """The rows up to id `bound`, and the rest."""
    stop = int(np.searchsorted(page.ids, bound, "right"))
    return page.slice(0, stop), page.slice(stop, len(page))


@dataclass(slots=True)
class LayerCounts:
    """What a copy did to one layer of the sink, and how many entries only the sink has, and keeps."""

    added: int = 0
    replaced: int = 0
    kept: int = 0
    deleted: int = 0
    only_in_sink: int = 0

    @property
    def changed(self) -> int:
        """Entries that were written or deleted."""
        return self.added + self.replaced + self.deleted


def difference(ours: Entries, theirs: Entries, on_conflict: OnConflict) -> tuple[Entries, int, U64]:
    """Of two pages between the same ids: what to write, how much of it the sink lacks, and ids that only it has."""
    _, mine, others = np.intersect1d(ours.ids, theirs.ids, assume_unique=True, return_indices=True)
    wanted, only = np.ones(len(ours), np.bool_), np.ones(len(theirs), np.bool_)
    only[others] = False
    if len(mine):
        wanted[mine] = on_conflict(ours.take(mine), theirs.take(others))
    to_write = ours if wanted.all() else ours.take(np.flatnonzero(wanted))
    return to_write, len(ours) - len(mine), theirs.ids[only]


@dataclass(frozen=True, slots=True)
class LayerSums:
    """Both endpoints of a layer, read anew."""

    layer: int
    source: EntrySum
    sink: EntrySum

    @property
    def equal(self) -> bool:
        """Same count, same checksum."""
        return self.source == self.sink


@dataclass(slots=True)
class Copy:
    """A copy of `layers` (none: all that the source has), and what became of it.

    `on_conflict` None: everything is written, whatever the sink holds. `delete`: whether entries go that only the sink
    has (False: when this copy saw them on the source before; None: nobody asks for them). `verify`: pass after pass
    until nothing differs, and then the sums of both endpoints.
    """

    source: Source
    sink: Sink
    layers: Sequence[int] = ()
    on_conflict: OnConflict | None = None
    delete: bool | None = None
    verify: bool = False
    counts: dict[int, LayerCounts] = field(default_factory=dict)
    passes: int = 0
    changed_in_last_pass: int = 0
    sums: tuple[LayerSums, ...] = ()
    # What was sent and not yet acknowledged, the oldest first, with how many of it the sink lacked.
    waiting: deque[tuple[Batch, int]] = field(default_factory=deque)
    _source_ids: dict[int, U64] = field(default_factory=dict)
    _surplus: dict[int, U64] = field(default_factory=dict)

    @property
    def written(self) -> int:
        """Entries that the sink acknowledged."""
        return sum(counts.added + counts.replaced for counts in self.counts.values())

    @property
    def only_in_sink(self) -> int:
        """Entries that keep the sink from being the same, as of the last pass."""
        return sum(counts.only_in_sink for counts in self.counts.values())

    @property
    def verified(self) -> bool:
        """Whether every layer of the sink is that of the source."""
        return bool(self.sums) and all(layer.equal for layer in self.sums)

    def run(self, progress: Progress, label: str = "copying") -> None:
        """Raises what the endpoints raise; what was acknowledged stays, and the next copy goes on."""
        for number in range(1, (MAX_PASSES if self.verify else 1) + 1):
            self.passes = number
            self.one_pass(progress, label if number == 1 else "comparing")
            if not self.verify or self.changed_in_last_pass:
                continue
            if self.only_in_sink:
                return
            self.sums = self._sums(progress)
            if self.verified:
                return

    def one_pass(self, progress: Progress, label: str) -> None:
        """Goes once over all layers."""
        self.sums, before = (), self._changed()
        for layer in self.layers:
            self.counts.setdefault(layer, LayerCounts())
        with progress(label, self.source.total(self.layers)) as advance:
            for _ in self.sink.write(self._batches(advance)):
                batch, added = self.waiting.popleft()
                counts = self.counts.setdefault(batch.layer, LayerCounts())
                counts.added += added
                counts.replaced += len(batch) - added
                advance(len(batch))
        for layer, ids in self._surplus.items():
            self._remove(layer, ids)
        self.changed_in_last_pass = self._changed() - before

    def _batches(self, advance: Advance) -> Iterator[Batch]:
        if self.on_conflict is None:
            for batch in self.source.batches(self.layers):
                self.waiting.append((batch, len(batch)))
                yield batch
            return
        for layer in self.layers:
            yield from self._differences(layer, self.on_conflict, advance)

    def _differences(
        self, layer: int, on_conflict: OnConflict, advance: Advance
    ) -> Iterator[Batch]:
        """Of one layer; afterwards it is known which ids the source has and which only the sink."""
        passed, surplus = [_NO_IDS], [_NO_IDS]
        whole = self.delete is not None
        holds_any = None if whole else partial(self.sink.holds_any, layer)
        with (
            closing(self.source.batches([layer])) as batches,
            closing(self.sink.pages(layer, with_keys=on_conflict is differing)) as theirs,
        ):
            ours = (batch.entries for batch in batches)
            for mine, other in joined(in_order(ours), in_order(theirs), holds_any):
                to_write, added, only = difference(mine, other, on_conflict)
                if whole:
                    passed.append(mine.ids)
                    surplus.append(only)
                kept = len(mine) - len(to_write)
                self.counts[layer].kept += kept
                if len(to_write):
                    self.waiting.append((Batch(layer, to_write), added))
                    yield self.waiting[-1][0]
                advance(kept)
        seen_before = self._source_ids.get(layer, _NO_IDS)
        self._source_ids[layer] = np.union1d(seen_before, np.concatenate(passed))
        self._surplus[layer] = np.concatenate(surplus)

    def _remove(self, layer: int, surplus: U64) -> None:
        gone = surplus if self.delete else surplus[np.isin(surplus, self._source_ids[layer])]
        for start in range(0, len(gone), _DELETED_AT_ONCE):
            self.sink.delete(layer, gone[start : start + _DELETED_AT_ONCE])
        self.counts[layer].deleted += len(gone)
        self.counts[layer].only_in_sink = len(surplus) - len(gone)

    def _sums(self, progress: Progress) -> tuple[LayerSums, ...]:
        with progress("verifying", 2 * self.source.total(self.layers)) as advance:
            return tuple(self._sum(layer, advance) for layer in self.layers)

    def _sum(self, layer: int, advance: Advance) -> LayerSums:
        with closing(self.source.batches([layer])) as batches:
            source = checksum((batch.entries for batch in batches), advance)
        with closing(self.sink.pages(layer)) as pages:
            return LayerSums(layer, source, checksum(pages, advance))

    def _changed(self) -> int:
        return sum(counts.changed for counts in self.counts.values())

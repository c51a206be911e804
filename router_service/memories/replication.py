"""What a copy of a memory is sent: the entries once, and then what changes, from one version to the next.

A copy is sent the present entries of the ids that changed, until at one moment nothing changes and nothing that changed
is left to be sent: what it has then is the memory of that moment's version. While writes follow each other so fast that
there is no such moment, they are held off for as long as the last few are read.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from router_service.arrays import U64, Entries, combined_digests, digests_of, rows_of
from router_service.backends.base import Maintained
from router_service.errors import Busy, CollectionClosed
from router_service.memories.changes import SETTINGS, Position
from router_service.memories.layer import LayerMemory
from router_service.memories.memory import RoutingMemory
from router_service.memories.settings import MemorySettings

T = TypeVar("T")

# How often what changed is sent while there is no moment at which nothing changes; then writes are held off, for more
# entries than so many only after more rounds; and how long those under way are waited for.
_ROUNDS, _FEW_ENTRIES, _MOST_ROUNDS = 8, 1024, 16
_HOLD_OFF_S = 1.0
# Ids and digests that are looked at together.
_IDS_PER_PAGE = 4096
# While the memory is searched a copy reads one layer at a time, and rests so many times as long as it read, but no
# longer than so many seconds: what takes as long has waited, not read.
_REST, _LONGEST_REST_S = 6.0, 2.0
# Layers that are copied at a time when it is not: more would wait for each other's Python.
_TOGETHER = 2
_NO_IDS: U64 = np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True)
class Upserted:
    """Entries of a layer, and their digests [n]."""

    layer: int
    entries: Entries
    digests: U64


@dataclass(frozen=True, slots=True)
class Deleted:
    """Entries that are gone, if they were there. None of them: nothing has happened, but something will."""

    layer: int
    ids: U64


@dataclass(frozen=True, slots=True)
class Synced:
    """What was sent is the memory of a position. Again at the same one: nothing has changed."""

    position: Position


Event = Upserted | Deleted | MemorySettings | Synced


@dataclass(frozen=True, slots=True)
class Held:
    """What a copy of a layer has: ids [n] ascending, digests [n]."""

    ids: U64
    digests: U64


class Feed:
    """Of one copy."""

    def __init__(
        self,
        memory: RoutingMemory,
        layers: Iterable[LayerMemory],
        page_entries: int,
        heartbeat_s: float,
        why_over: Callable[[], Exception | None],
    ) -> None:
        """`page_entries`: of one Upserted, at most. `why_over`: what it returns ends the feed; asked between reads."""
        self._memory, self._log = memory, memory.changes
        self._layers = {layer.layer: layer for layer in layers}
        collections = [layer.collection for layer in memory.layers]
        self._pacings = [each.pacing for each in collections if isinstance(each, Maintained)]
        self._page_entries, self._heartbeat_s = page_entries, heartbeat_s
        self._why_over = why_over
        self._place = self._log.end
        self._first: Iterator[Event] = iter(())
        self._sent = time.monotonic()
        self._rest_until: dict[int, float] = {}  # of layers
        self._holding_off = False  # writes wait: no time to rest

    def copy(self, held: Mapping[int, Held]) -> int:
        """Begins with all entries, or of the layers that are held with what differs; returns how many, about."""
        self._first = self._copied(held)
        return sum(layer.info().entries for layer in self._layers.values())

    def go_on(self, after: Position) -> int:
        """Begins with what changed after a position; returns how many entries that are. Raises ReplicaBehind."""
        self._place = self._log.place_of(after)
        changed, _ = self._log.since(self._place)
        return self._wanted(changed)

    def _wanted(self, changed: Mapping[int, U64]) -> int:
        return sum(len(ids) for layer, ids in changed.items() if layer in self._layers)

    def events(self) -> Iterator[Event]:
        """Without end. Raises ReplicaBehind, StorageError, and what `why_over` returns."""
        try:
            for event in self._made():
                self._sent = time.monotonic()
                yield event
        except CollectionClosed as error:
            raise (self._why_over() or error) from error

    def _made(self) -> Iterator[Event]:
        yield from self._first
        while True:
            synced = yield from self._updated()
            yield synced
            while not self._log.wait(self._place, self._is_over, self._heartbeat_s):
                yield synced

    def _is_over(self) -> bool:
        return self._why_over() is not None

    def _require(self) -> None:
        """Raises what ends the feed."""
        if (error := self._why_over()) is not None:
            raise error

    def _read(self, layer: LayerMemory, read: Callable[[], T]) -> Generator[Event, None, T]:
        """What `read` returns, after a rest when the memory is searched and something was read just before."""
        until = 0.0 if self._holding_off else self._rest_until.get(layer.layer, 0.0)
        while (left_s := until - time.monotonic()) > 0:
            self._log.rest(self._is_over, min(left_s, self._heartbeat_s))
            self._require()
            yield from self._alive()
        self._require()
        started = time.monotonic()
        found = read()
        if self._is_searched():
            now = time.monotonic()
            rest_s = min(_REST * (now - started), _LONGEST_REST_S)
            self._rest_until[layer.layer] = now + rest_s
        return found

    def _copied(self, held: Mapping[int, Held]) -> Iterator[Event]:
        layers = self._layers.items()
        parts = (
            self._differences(layer, held[number]) if number in held else self._all_of(layer)
            for number, layer in layers
        )
        return _side_by_side(parts, lambda: 1 if self._is_searched() else _TOGETHER)

    def _is_searched(self) -> bool:
        return any(pacing.being_searched for pacing in self._pacings)

    def _all_of(self, layer: LayerMemory) -> Iterator[Event]:
        pages = layer.collection.all_entries(self._page_entries)
        while (page := (yield from self._read(layer, partial(next, pages, None)))) is not None:
            yield Upserted(layer.layer, *page)

    def _differences(self, layer: LayerMemory, held: Held) -> Iterator[Event]:
        """In one pass over both, in the order of ids."""
        after, start = None, 0
        while True:
            self._require()
            ids, digests = layer.collection.digests(after, _IDS_PER_PAGE)
            stop = len(held.ids)
            if len(ids):
                stop = int(np.searchsorted(held.ids, ids[-1], "right"))
            ours, theirs = held.ids[start:stop], held.digests[start:stop]
            yield from self._deleted(layer, np.setdiff1d(ours, ids, assume_unique=True))
            if not len(ids):
                return
            rows, known = rows_of(ours, ids)
            same = known.copy()
            same[known] = theirs[rows[known]] == digests[known]
            yield from self._present(layer, ids[~same])
            yield from self._alive()
            after, start = int(ids[-1]), stop

    def _updated(self) -> Generator[Event, None, Synced]:
        """What changed, up to a moment of which the copy is then, which is returned."""
        rounds = 0
        while True:
            self._require()
            if (position := self._log.settled(self._place, self._layers)) is not None:
                return Synced(position)
            changed, place = self._log.since(self._place)
            if place == self._place:  # a write goes on
                if not self._log.wait(self._place, self._is_over, self._heartbeat_s):
                    yield from self._nothing()
                continue
            rounds += 1
            few = self._wanted(changed) <= _FEW_ENTRIES
            if rounds > (_ROUNDS if few else _MOST_ROUNDS):
                found, position = self._held_off()
                yield from found
                if position is not None:
                    return Synced(position)
                continue
            self._place = place
            yield from self._changes(changed)

    def _held_off(self) -> tuple[list[Event], Position | None]:
        """What changed, and where a copy is then; None if a write does not end soon."""
        until = time.monotonic() + _HOLD_OFF_S
        found: list[Event] = []
        with ExitStack() as held_off:
            try:
                for layer in self._layers.values():
                    held_off.enter_context(layer.gate.closed(self._require, until))
            except Busy:
                return found, None
            self._holding_off = True
            try:
                changed, self._place = self._log.since(self._place)
                found += self._changes(changed)
            finally:
                self._holding_off = False
            return found, self._log.settled(self._place, self._layers)

    def _changes(self, changed: Mapping[int, U64]) -> Iterator[Event]:
        for number, ids in changed.items():
            if number == SETTINGS:
                yield self._memory.record.settings
            elif number in self._layers:
                yield from self._present(self._layers[number], ids)

    def _present(self, layer: LayerMemory, ids: U64) -> Iterator[Event]:
        """What has become of the entries of these ids [n], ascending."""
        for start in range(0, len(ids), self._page_entries):
            part = ids[start : start + self._page_entries]
            found = yield from self._read(layer, partial(layer.collection.entries, part))
            yield from self._deleted(layer, np.setdiff1d(part, found.ids, assume_unique=True))
            if len(found):
                yield _upserted(layer, found)

    def _deleted(self, layer: LayerMemory, ids: U64) -> Iterator[Event]:
        if len(ids):
            yield Deleted(layer.layer, ids)

    def _alive(self) -> Iterator[Event]:
        if time.monotonic() >= self._sent + self._heartbeat_s:
            yield from self._nothing()

    def _nothing(self) -> Iterator[Event]:
        yield Deleted(next(iter(self._layers)), _NO_IDS)


def _upserted(layer: LayerMemory, entries: Entries) -> Upserted:
    return Upserted(layer.layer, entries, combined_digests(digests_of(entries)))


def _side_by_side(iterators: Iterable[Iterator[T]], together: Callable[[], int]) -> Iterator[T]:
    """All that they give, in any order, of so many at a time, one item ahead of who takes it."""
    waiting, begun, items = iter(iterators), deque[Iterator[T]](), list[T]()
    under_way: dict[Future[T | None], Iterator[T]] = {}
    with ThreadPoolExecutor(_TOGETHER, thread_name_prefix="copy") as pool:
        while True:
            while len(under_way) < together():
                iterator = begun.popleft() if begun else next(waiting, None)
                if iterator is None:
                    break
                under_way[pool.submit(next, iterator, None)] = iterator
            yield from items
            if not under_way:
                return
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            found = [(under_way.pop(each), each.result()) for each in done]
            begun.extend(iterator for iterator, item in found if item is not None)
            items = [item for _, item in found if item is not None]

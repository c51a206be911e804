"""Which entries of a memory changed, version by version: for those who keep a copy of it in step."""

from __future__ import annotations

import secrets
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np

from router_service.arrays import U64
from router_service.backends.base import Versions
from router_service.errors import ReplicaBehind

# In the place of a layer: the settings.
SETTINGS = -1
# What is remembered: 8 MiB of ids. Who has fallen further behind compares what it holds.
_MOST_IDS, _MOST_NOTES = 1 << 20, 1 << 16
_NO_IDS: U64 = np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True)
class Position:
    """A state of a memory. Versions of one epoch are comparable; another may have other entries at the same one."""

    epoch: str
    version: int


@dataclass(frozen=True, slots=True)
class _Note:
    version: int  # at which the change had been made
    layer: int
    ids: U64


class ChangeLog:
    """Of one memory, from when it began to serve. Safe to call from several threads.

    A reader has a place in it: how many notes were made before.
    """

    def __init__(self, versions: Versions) -> None:
        self._versions = versions
        self._notes: deque[_Note] = deque()
        self._dropped = self._ids = 0  # notes that went, and ids in those that are there
        self._whole_after = 0  # every change that made a later version is among the notes
        self._under_way: Counter[int] = Counter()  # changes of each layer
        self._changed = threading.Condition()
        self.restart()

    def restart(self) -> None:
        """What follows is another memory's, with the entries that there are: readers of this one are behind."""
        with self._changed:
            self.epoch = secrets.token_hex(8)
            self._drop(len(self._notes))
            self._dropped += 1  # readers of before have a place before the first note
            self._whole_after = self._versions.now
            self._changed.notify_all()

    def _drop(self, notes: int) -> None:
        for _ in range(notes):
            note = self._notes.popleft()
            self._ids -= len(note.ids)
            self._whole_after = note.version
        self._dropped += notes

    @contextmanager
    def changing(self, layer: int, ids: U64 = _NO_IDS) -> Iterator[None]:
        """Around a change of these entries; one that fails may have been made all the same, or some of it."""
        with self._changed:
            self._under_way[layer] += 1
        try:
            yield
        finally:
            with self._changed:
                self._under_way[layer] -= 1
                self._note(layer, ids)

    def found(self, layer: int, ids: U64) -> None:
        """Somebody else has changed these entries: lookups see another state."""
        with self._changed:
            self._versions.advance()
            self._note(layer, ids)

    def _note(self, layer: int, ids: U64) -> None:
        self._notes.append(_Note(self._versions.now, layer, ids))
        self._ids += len(ids)
        while self._ids > _MOST_IDS or len(self._notes) > _MOST_NOTES:
            self._drop(1)
        self._changed.notify_all()

    def wake(self) -> None:
        """Ends every wait()."""
        with self._changed:
            self._changed.notify_all()

    @property
    def end(self) -> int:
        """The place after the last note."""
        with self._changed:
            return self._dropped + len(self._notes)

    def place_of(self, position: Position) -> int:
        """The place of who has the state of a position. Raises ReplicaBehind when what followed is not known."""
        with self._changed:
            if position.epoch != self.epoch or position.version > self._versions.now:
                raise ReplicaBehind("the position is of another time of the memory")
            if position.version < self._whole_after:
                raise ReplicaBehind("more has changed since than is remembered")
            later = sum(note.version > position.version for note in self._notes)
            return self._dropped + len(self._notes) - later

    def since(self, place: int) -> tuple[dict[int, U64], int]:
        """By layer the ids [n] that changed after a place, ascending and each once; and the place after them.

        Raises ReplicaBehind when some of them are not known any more.
        """
        with self._changed:
            if place < self._dropped:
                raise ReplicaBehind("more has changed since than is remembered")
            notes = list(islice(self._notes, place - self._dropped, None))
        ids: dict[int, list[U64]] = {}
        for note in notes:
            ids.setdefault(note.layer, []).append(note.ids)
        changed = {layer: np.unique(np.concatenate(parts)) for layer, parts in sorted(ids.items())}
        return changed, place + len(notes)

    def settled(self, place: int, layers: Collection[int]) -> Position | None:
        """Where a copy of these layers is that has all that changed before a place; None: between two versions."""
        with self._changed:
            if place != self._dropped + len(self._notes) or self._busy(layers):
                return None
            return Position(self.epoch, self._versions.now)

    def wait(self, place: int, ended: Callable[[], bool], timeout_s: float) -> bool:
        """Until there is a note after a place, or `ended`, which wake() asks again. False: neither in time."""

        def come() -> bool:
            return place != self._dropped + len(self._notes) or ended()

        with self._changed:
            return self._changed.wait_for(come, timeout_s)

    def rest(self, ended: Callable[[], bool], timeout_s: float) -> None:
        """So long, or until `ended`, which wake() asks again."""
        with self._changed:
            self._changed.wait_for(ended, timeout_s)

    def _busy(self, layers: Collection[int]) -> bool:
        return self._under_way[SETTINGS] > 0 or any(self._under_way[each] > 0 for each in layers)

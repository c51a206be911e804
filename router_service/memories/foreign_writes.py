"""What others write to a memory: found by listing its layers, while somebody keeps a copy in step.

A listing reads values and provenance, not keys. What is not seen: a key that another service changed and nothing else
of the entry, its time of creation included.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from router_service.arrays import U64, rows_of
from router_service.backends.base import Shared
from router_service.errors import StorageError
from router_service.memories.changes import ChangeLog
from router_service.memories.memory import RoutingMemory

log = logging.getLogger(__name__)

# Between two listings, and so many times as long as one took: they cost the server 5 % at the most.
_LEAST_S, _PAUSE = 1.0, 20.0
_NO_IDS: U64 = np.empty(0, np.uint64)


class ForeignWrites:
    """Of one memory. What this service writes is noted once more, a little later."""

    def __init__(self, memory: RoutingMemory) -> None:
        found = {layer.layer: layer.collection for layer in memory.layers}
        self._layers = {number: each for number, each in found.items() if isinstance(each, Shared)}
        self._changes: ChangeLog = memory.changes
        self._name = memory.record.name
        self._known: dict[int, tuple[U64, U64]] = {}
        self._listing_s = 0.0
        self._listed_s = -float("inf")  # when the last listing began, on the monotonic clock
        self._lock = threading.Lock()  # around a listing, and what is below
        self._copies = 0
        self._ended = threading.Event()
        # What the last listing ended with: nobody knows then what others write.
        self.problem: StorageError | None = None

    @contextmanager
    def followed(self) -> Iterator[int]:
        """Inside, changes of others are noted within about so many milliseconds; 0: there are no others.

        All that changed before is noted when it begins. Raises StorageError.
        """
        if not self._layers:
            yield 0
            return
        came_s = time.monotonic()
        with self._lock:
            if self._listed_s < came_s:  # else that began since, for another who came
                self._look()
            self._copies += 1
            if self._copies == 1:
                self._ended = threading.Event()
                looking = threading.Thread(
                    target=self._look_often, args=(self._ended,), name="foreign-writes", daemon=True
                )
                looking.start()
        try:
            yield int(1000 * (self._period_s + self._listing_s)) + 1
        finally:
            with self._lock:
                self._copies -= 1
                if not self._copies:
                    self._ended.set()

    @property
    def _period_s(self) -> float:
        return max(_LEAST_S, _PAUSE * self._listing_s)

    def _look_often(self, ended: threading.Event) -> None:
        while not ended.wait(self._period_s):
            with self._lock:
                if ended.is_set():
                    return
                try:
                    self._look()
                except StorageError as error:
                    log.warning("what others write to memory %s is not seen: %s", self._name, error)
                    self.problem = error
                    self._changes.wake()

    def _look(self) -> None:
        started = time.monotonic()
        for number, collection in self._layers.items():
            now = _listed(collection)
            before = self._known.get(number)
            if before is not None and len(ids := _differing(before, now)):
                self._changes.found(number, ids)
            self._known[number] = now
        self._listing_s, self._listed_s = time.monotonic() - started, started
        self.problem = None


def _listed(collection: Shared) -> tuple[U64, U64]:
    """All ids [n], ascending, and their marks [n]."""
    ids, marks, after = [_NO_IDS], [_NO_IDS], None
    while True:
        found, of_found = collection.listed(after)
        if not len(found):
            return np.concatenate(ids), np.concatenate(marks)
        ids.append(found)
        marks.append(of_found)
        after = int(found[-1])


def _differing(before: tuple[U64, U64], now: tuple[U64, U64]) -> U64:
    """Ids of entries that are others, new or gone."""
    rows, known = rows_of(before[0], now[0])
    same = known.copy()
    same[known] = before[1][rows[known]] == now[1][known]
    gone = before[0][~np.isin(before[0], now[0])]
    return np.union1d(now[0][~same], gone)

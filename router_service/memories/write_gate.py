"""Keeps apart those who write entries, those who delete what they looked at a while ago, and those who copy all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from router_service.arrays import U64
from router_service.errors import Busy

# How often who waits for those under way looks whether it is to go on.
_LOOK_S = 0.05


class WriteGate:
    """Of one layer. A write holds nothing up, and waits only for the deletion of one batch, or while it is closed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._changed = threading.Condition(self.lock)  # what follows
        self._under_way: dict[int, U64] = {}
        self._closed = 0
        self._watches: list[Watch] = []
        self._writes = 0

    @contextmanager
    def writing(self, ids: U64) -> Iterator[None]:
        """Around a write of these entries: from its beginning on, no watch that is open deletes them."""
        with self.lock:
            self.wait_until_open()
            self._writes += 1
            number = self._writes
            self._under_way[number] = ids
            self.changing(ids)
        try:
            yield
        finally:
            with self.lock:
                del self._under_way[number]
                self._changed.notify_all()

    @contextmanager
    def closed(self, tick: Callable[[], None], until: float) -> Iterator[None]:
        """Inside, no write and no deletion is under way: those that come wait, and those that were there have ended.

        `tick`: called while they are waited for, what it raises ends that. `until`: of time.monotonic(), then Busy.
        """

        def look() -> None:
            tick()
            if time.monotonic() >= until:
                raise Busy(
                    "a write that was under way has not ended, and those that came after it are not held up any "
                    "longer; try again when writes are acknowledged soon"
                )

        while not self.lock.acquire(timeout=_LOOK_S):  # a deletion holds it
            look()
        self._closed += 1
        self.lock.release()
        try:
            while not self._ended(_LOOK_S):
                look()
            yield
        finally:
            with self.lock:
                self._closed -= 1
                self._changed.notify_all()

    def _ended(self, wait_s: float) -> bool:
        with self.lock:
            return self._changed.wait_for(lambda: not self._under_way, wait_s)

    def changing(self, ids: U64, but: Watch | None = None) -> None:
        """Tells every watch but one; for who holds the lock."""
        for watch in self._watches:
            if watch is not but:
                watch.written.append(ids)

    def under_way(self) -> list[U64]:
        """The ids of each write that has begun and not ended; for who holds the lock."""
        return list(self._under_way.values())

    def wait_until_open(self) -> None:
        """For who holds the lock, which is given up meanwhile."""
        self._changed.wait_for(lambda: not self._closed)

    @contextmanager
    def watched(self) -> Iterator[Watch]:
        """Around looking at entries and deleting some of them, or copying them."""
        with self.lock:
            watch = Watch(self, self.under_way())
            self._watches.append(watch)
        try:
            yield watch
        finally:
            with self.lock:
                self._watches.remove(watch)


class Watch:
    """Which entries were written since it was opened, or deleted by others."""

    def __init__(self, gate: WriteGate, under_way: list[U64]) -> None:
        self._gate = gate
        self.written = under_way

    def delete(self, ids: U64, delete: Callable[[U64], int]) -> tuple[int, int]:
        """Deletes those of `ids` that are still the entries that were there; returns deleted and spared ones.

        A write that begins meanwhile waits, and so comes after the deletion.
        """
        with self._gate.lock:
            self._gate.wait_until_open()
            if self.written:
                self.written = [np.unique(np.concatenate(self.written))]
            still = ids[~np.isin(ids, self.written[0])] if self.written else ids
            self._gate.changing(still, but=self)
            return (delete(still) if len(still) else 0), len(ids) - len(still)

    def taken(self) -> U64:
        """The ids [n] of what was written since it was opened, or since they were last taken; ascending, each once.

        What is still being written is among them, and is again the next time.
        """
        with self._gate.lock:
            written, self.written = self.written, self._gate.under_way()
        return _each_once(written)

    def seen(self) -> U64:
        """What taken() would return now."""
        with self._gate.lock:
            return _each_once(self.written)


def _each_once(ids: list[U64]) -> U64:
    return np.unique(np.concatenate([np.empty(0, np.uint64), *ids]))

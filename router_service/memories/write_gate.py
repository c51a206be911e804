"""Keeps apart those who write entries and those who delete what they looked at a while ago."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from router_service.arrays import U64


class WriteGate:
    """Of one layer. A write holds nothing up, and waits only for the deletion of one batch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[int, U64] = {}
        self._watches: list[Watch] = []
        self._writes = 0

    @contextmanager
    def writing(self, ids: U64) -> Iterator[None]:
        """Around a write of these entries: from its beginning on, no watch that is open deletes them."""
        with self._lock:
            self._writes += 1
            number = self._writes
            self._under_way[number] = ids
            for watch in self._watches:
                watch.written.append(ids)
        try:
            yield
        finally:
            with self._lock:
                del self._under_way[number]

    @contextmanager
    def watched(self) -> Iterator[Watch]:
        """Around looking at entries and deleting some of them."""
        with self._lock:
            watch = Watch(self._lock, list(self._under_way.values()))
            self._watches.append(watch)
        try:
            yield watch
        finally:
            with self._lock:
                self._watches.remove(watch)


class Watch:
    """Which entries were written since it was opened."""

    def __init__(self, lock: threading.Lock, under_way: list[U64]) -> None:
        self._lock = lock
        self.written = under_way

    def delete(self, ids: U64, delete: Callable[[U64], int]) -> tuple[int, int]:
        """Deletes those of `ids` that are still the entries that were there; returns deleted and spared ones.

        A write that begins meanwhile waits, and so comes after the deletion.
        """
        with self._lock:
            if self.written:
                self.written = [np.unique(np.concatenate(self.written))]
            still = ids[~np.isin(ids, self.written[0])] if self.written else ids
            return (delete(still) if len(still) else 0), len(ids) - len(still)

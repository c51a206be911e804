"""What was written to a collection while its copy was being optimized, brought to the copy before it takes over.

The present shard has every write, so only ids are noted; the entries are read again when it is time. A crash meanwhile
loses nothing: the present shard is in force until then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import islice

import numpy as np

from router_service.arrays import U64, Entries
from router_service.backends.base import Report
from router_service.backends.shard import Shard

_IDS_PER_STEP = 16
# What is left when writes have to wait for the rest: some 50 ms.
_FEW = 128


class CatchUp:
    """Ids of changed entries. note() is called after the change, so that what is read again is never older."""

    def __init__(self, read: Callable[[U64], Entries]) -> None:
        """`read` gives the entries of ids that the present shard has, with keys."""
        self._read = read
        self._ids: dict[int, None] = {}  # in the order of writing
        self._lock = threading.Lock()

    def note(self, ids: U64) -> None:
        """Marks entries as written or deleted."""
        with self._lock:
            self._ids.update(dict.fromkeys(ids.tolist()))

    def bring(self, shard: Shard, generation: int, report: Report, *, down_to: int = _FEW) -> None:
        """Writes to `shard` what was noted, until at most `down_to` ids are left."""
        done = 0
        while len(self._ids) > down_to:
            ids = self._taken()
            entries = self._read(ids)
            gone = np.setdiff1d(ids, entries.ids)
            if len(entries):
                shard.upsert(entries, generation)
            if len(gone):
                shard.delete(gone)
            done += len(ids)
            report("catch up", done, done + len(self._ids))

    def _taken(self) -> U64:
        with self._lock:
            ids = list(islice(self._ids, _IDS_PER_STEP))
            for number in ids:
                del self._ids[number]
        return np.array(ids, np.uint64)

"""How writes make way for searches of the same collection."""

from __future__ import annotations

import time
from typing import Protocol

# A collection that was searched this long ago counts as being searched.
_RECENT_S = 0.5
# While it is, writes rest this many times as long as they worked: they take a fifth of the engine.
_REST = 4.0
# What is not indexed yet is scanned in every search, 0.05 ms per MiB. From here on writes wait for the index that is
# being built, though not longer than a caller's patience.
_MOST_BYTES = 16 << 20
_PATIENCE_S = 2.0
_POLL_S = 0.02


class Backlog(Protocol):
    """What of a collection is not indexed yet."""

    @property
    def changed_bytes(self) -> int:
        """Bytes of keys written or deleted since the last optimize."""
        ...

    @property
    def optimizing(self) -> bool:
        """Whether an index is being built."""
        ...


class Pacing:
    """When a collection was searched and written to."""

    def __init__(self) -> None:
        self._searched = self._wrote = -float("inf")

    def searched(self) -> None:
        """A search begins."""
        self._searched = time.monotonic()

    @property
    def searched_ago_s(self) -> float:
        """Seconds since the last search began."""
        return time.monotonic() - self._searched

    @property
    def wrote_ago_s(self) -> float:
        """Seconds since the last write ended."""
        return time.monotonic() - self._wrote

    def rest(self, worked_s: float) -> None:
        """After a write that kept the engine for `worked_s`."""
        self._wrote = time.monotonic()
        if self.searched_ago_s < _RECENT_S:
            time.sleep(_REST * worked_s)

    def wait_for_index(self, unindexed: Backlog) -> None:
        """Before a write: waits while too much is unindexed, an index is being built and searches go on."""
        end = time.monotonic() + _PATIENCE_S
        while (
            unindexed.changed_bytes > _MOST_BYTES
            and unindexed.optimizing
            and self.searched_ago_s < _RECENT_S
            and time.monotonic() < end
        ):
            time.sleep(_POLL_S)

"""How writes make way for searches of the same collection."""

from __future__ import annotations

import time
from collections.abc import Callable

# A collection that was searched this long ago counts as being searched.
_RECENT_S = 0.5
# While it is, writes rest this many times as long as they worked: they take 2 % of the engine.
_REST = 50.0
# And they wait while the service indexes what is new, so that lookups share the cores with one of the two at a time;
# not longer than a caller's patience.
_PATIENCE_S = 5.0
_POLL_S = 0.02


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

    def patience(self) -> float:
        """When a caller whose write begins now should no longer be kept waiting, on the monotonic clock."""
        return time.monotonic() + _PATIENCE_S

    def rest(self, worked_s: float, until: float = float("inf")) -> None:
        """After a write that kept the engine for `worked_s`; not when it is later than `until`."""
        self._wrote = time.monotonic()
        if self.being_searched and self._wrote < until:
            time.sleep(_REST * worked_s)

    @property
    def being_searched(self) -> bool:
        """Whether searches go on."""
        return self.searched_ago_s < _RECENT_S

    def wait_while(self, indexing: Callable[[], bool], until: float) -> None:
        """Before a write: waits while the service indexes on its own account, and searches go on."""
        while indexing() and self.being_searched and time.monotonic() < until:
            time.sleep(_POLL_S)

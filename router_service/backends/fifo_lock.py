"""A lock that is handed on in the order of asking: a loop of short writes cannot starve a search."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class FifoLock:
    """Not reentrant. threading.Lock lets the thread that just released it take it again before those that wait."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._held = False

    def __enter__(self) -> None:
        with self._mutex:
            if not self._held:
                self._held = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()  # who waited longest holds it now
            else:
                self._held = False

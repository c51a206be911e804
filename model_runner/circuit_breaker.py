"""Decides whether a call that may fail is worth trying. No I/O; the clock and the jitter are given."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class CircuitBreaker:
    """Opens after `failures_to_open` failures in a row; then one trial after 1 s, doubling to 30 s, with jitter."""

    failures_to_open: int = 5
    first_pause_s: float = 1.0
    longest_pause_s: float = 30.0
    clock_s: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random
    _failures: int = field(default=0, init=False)
    _pause_s: float = field(default=0.0, init=False)
    _next_trial_s: float = field(default=0.0, init=False)

    def allows(self) -> bool:
        """Whether a call may be tried now."""
        return self._failures < self.failures_to_open or self.clock_s() >= self._next_trial_s

    def succeeded(self) -> None:
        """Closes the breaker."""
        self._failures, self._pause_s = 0, 0.0

    def failed(self) -> None:
        """Counts a failure; opens the breaker, for twice as long as before when a trial failed."""
        self._failures += 1
        if self._failures >= self.failures_to_open:
            self._pause_s = min(self.longest_pause_s, max(self.first_pause_s, 2 * self._pause_s))
            self._next_trial_s = self.clock_s() + self._pause_s * (0.75 + 0.5 * self.jitter())

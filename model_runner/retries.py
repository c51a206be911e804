"""Tries a call again that a sidecar was not there for: at most twice, inside the call's deadline."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from model_runner.errors import RoutingUnavailable, RunnerError

Reply = TypeVar("Reply")

# Seconds before each retry: a sidecar that is restarted is back within a second or two.
PAUSES_S = (0.5, 2.5)
NO_PAUSES_S = (0.0, 0.0)


@dataclass(slots=True)
class Retries:
    """Retries of one channel's calls: only what failed with UNAVAILABLE, and only once a sidecar has answered on it.

    Attributes:
        pauses_s: before each retry, give or take a quarter; 0 retries at once.
        reached: a sidecar has answered before. Until then an address that nobody listens at is an error at once.

    """

    pauses_s: tuple[float, ...] = PAUSES_S
    reached: bool = False

    def run(self, call: Callable[[float], Reply], timeout_s: float) -> Reply:
        """call(seconds that are left), again while it may succeed; raises what its last try raised."""
        left_s, give_up_s = timeout_s, time.monotonic() + timeout_s
        for pause_s in self.pauses_s:
            try:
                return self._reaching(call, left_s)
            except RoutingUnavailable as error:
                pause_s *= random.uniform(0.75, 1.25)
                left_s = give_up_s - time.monotonic() - pause_s
                if not (self.reached and error.passing) or left_s <= 0:
                    raise
            time.sleep(pause_s)
        return self._reaching(call, left_s)

    def _reaching(self, call: Callable[[float], Reply], left_s: float) -> Reply:
        try:
            reply = call(left_s)
        except RoutingUnavailable:
            raise
        except RunnerError:  # a refusal is an answer too
            self.reached = True
            raise
        self.reached = True
        return reply

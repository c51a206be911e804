"""What lookups in a layer did since the service started, and the last of them while somebody looks."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from router_service.arrays import F32, I64, U8, U64

# Tokens that were answered are counted by lambda: so many ranges of equal width, from 0 to 1.
LAMBDA_RANGES = 20
# Upper bounds in seconds of counted durations, 15 us to 4 s, two to an octave; one more count is of what is above.
DURATION_BOUNDS = tuple(2.0 ** (half / 2 - 16) for half in range(37))
# The stages of a lookup in the service; the last one is all of it.
STAGES = ("decode", "search", "blend", "encode", "total")
# Tokens of a layer that are kept for those who look, and for how long after the last look.
_RECENT, _LOOKED_AT_S = 16, 30.0


class Abstain(IntEnum):
    """Why a token kept the model's own routing; numbers of knnmoe.v1.AbstainReason."""

    NO = 0
    EMPTY = 1
    TOO_FAR = 2
    LAYER_OFF = 3


_OUTCOMES = LAMBDA_RANGES + max(Abstain)


@dataclass(slots=True)
class Durations:
    """How long a stage took."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(DURATION_BOUNDS) + 1))
    sum_s: float = 0.0

    def add(self, seconds: float) -> None:
        """Counts one."""
        self.counts[bisect_left(DURATION_BOUNDS, seconds)] += 1
        self.sum_s += seconds

    def add_all(self, other: Durations) -> None:
        """Counts those of another."""
        self.counts = [one + more for one, more in zip(self.counts, other.counts, strict=True)]
        self.sum_s += other.sum_s


@dataclass(frozen=True, slots=True)
class Counts:
    """A moment's counters, consistent in themselves; `found_`: by lookups in copies, of which less is known."""

    requests: int
    lambda_counts: list[int]  # [LAMBDA_RANGES]: tokens that were answered
    abstained: list[int]  # [Abstain], without NO
    lambda_sum: float
    search_ns: int
    durations: dict[str, Durations]
    found_requests: int
    found_tokens: int
    found_abstained: int
    found_lambda_sum: float

    @property
    def tokens(self) -> int:
        """Looked up, in copies too."""
        return sum(self.lambda_counts) + sum(self.abstained) + self.found_tokens

    @property
    def mean_lambda(self) -> float:
        """Of the tokens, in copies too."""
        return (self.lambda_sum + self.found_lambda_sum) / max(1, self.tokens)

    @property
    def tokens_abstained(self) -> int:
        """Of the tokens, in copies too."""
        return sum(self.abstained) + self.found_abstained


class LayerCounters:
    """Adds up what the lookups in a layer did. Safe to call from several threads."""

    def __init__(self) -> None:
        self._requests = self._search_ns = 0
        self._outcomes: I64 = np.zeros(_OUTCOMES, np.int64)  # by lambda, then by reason
        self._lambda_sum = self._found_lambda_sum = 0.0
        self._found_requests = self._found_tokens = self._found_abstained = 0
        self._durations = {stage: Durations() for stage in STAGES}
        self._lock = threading.Lock()

    def add(self, lambdas: F32, abstained: U8, search_ns: int) -> None:
        """Counts one answer: lambda and Abstain of its tokens [T]."""
        if len(lambdas) == 1:  # a decoded token: NumPy's calls would be most of it
            self._add_one(lambdas[0], int(abstained[0]), search_ns)
            return
        ranges = np.minimum((lambdas * LAMBDA_RANGES).astype(np.intp), LAMBDA_RANGES - 1)
        outcomes = np.where(abstained, abstained + np.intp(LAMBDA_RANGES - 1), ranges)
        counts = np.bincount(outcomes, minlength=_OUTCOMES)
        lambda_sum = float(lambdas.sum())
        with self._lock:
            self._requests += 1
            self._outcomes += counts
            self._lambda_sum += lambda_sum
            self._search_ns += search_ns

    def add_durations(self, *stages_ns: int) -> None:
        """Of one answer, in the order of STAGES without their total."""
        with self._lock:
            for durations, ns in zip(
                self._durations.values(), (*stages_ns, sum(stages_ns)), strict=True
            ):
                durations.add(ns / 1e9)

    def _add_one(self, lambda_: np.float32, why: int, search_ns: int) -> None:
        outcome = (
            why + LAMBDA_RANGES - 1 if why else min(int(lambda_ * LAMBDA_RANGES), LAMBDA_RANGES - 1)
        )
        with self._lock:
            self._requests += 1
            self._outcomes[outcome] += 1
            self._lambda_sum += float(lambda_)
            self._search_ns += search_ns

    def add_found(self, requests: int, tokens: int, abstained: int, lambda_sum: float) -> None:
        """Counts what lookups in a copy of the layer did."""
        with self._lock:
            self._found_requests += requests
            self._found_tokens += tokens
            self._found_abstained += abstained
            self._found_lambda_sum += lambda_sum

    def read(self) -> Counts:
        """As they are at this moment."""
        with self._lock:
            outcomes: list[int] = self._outcomes.tolist()
            return Counts(
                self._requests + self._found_requests,
                outcomes[:LAMBDA_RANGES],
                outcomes[LAMBDA_RANGES:],
                self._lambda_sum,
                self._search_ns,
                {
                    stage: Durations(list(each.counts), each.sum_s)
                    for stage, each in self._durations.items()
                },
                self._found_requests,
                self._found_tokens,
                self._found_abstained,
                self._found_lambda_sum,
            )


@dataclass(frozen=True, slots=True)
class LookedUp:
    """A token that was looked up, and its K nearest entries."""

    unix_ms: int
    tokens: int  # in the same lookup, of which it is the last
    lambda_: float
    abstained: int  # Abstain
    ids: U64  # [K]
    distances: F32  # [K]
    similarities: F32  # [K]
    values: F32  # [K, W]


class RecentTokens:
    """The last token of each of the last lookups, from a first look on until 30 s after the last: else nothing."""

    def __init__(self) -> None:
        self._until = 0.0
        self._kept: deque[LookedUp] = deque(maxlen=_RECENT)
        self._lock = threading.Lock()

    @property
    def wanted(self) -> bool:
        """Whether somebody looks."""
        return self._until > 0 and self._is_looked_at()

    def note(self, token: LookedUp) -> None:
        """Keeps a token, and forgets the oldest."""
        with self._lock:
            self._kept.append(token)

    def look(self) -> list[LookedUp]:
        """Those that are kept, the newest first; more will be."""
        with self._lock:
            self._until = time.monotonic() + _LOOKED_AT_S
            return list(reversed(self._kept))

    def _is_looked_at(self) -> bool:
        with self._lock:
            if time.monotonic() < self._until:
                return True
            self._until = 0.0
            self._kept.clear()
            return False

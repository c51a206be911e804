"""What the counters of a service did over time: rates between samples of them."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

# Of what was counted, how much is kept: an hour while somebody looks.
_SAMPLES = 720

Document = dict[str, Any]


def quantile_s(counts: Sequence[int], bounds_s: Sequence[float], share: float) -> float | None:
    """The duration that this share of the counted ones does not exceed, in seconds; None when nothing was counted.

    Between the bounds of its range it is interpolated, so it is off by that range at most: a factor of 1.42.
    """
    total, below = sum(counts), 0
    if not total:
        return None
    for number, count in enumerate(counts):
        if count and below + count >= share * total:
            if number == len(bounds_s):
                return bounds_s[-1]
            upper = bounds_s[number]
            lower = bounds_s[number - 1] if number else upper / 2
            return float(lower * (upper / lower) ** ((share * total - below) / count))
        below += count
    return bounds_s[-1]


class History:
    """Samples of a service's statistics, and the rates between them."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, Document]] = deque(maxlen=_SAMPLES)
        self._lock = threading.Lock()

    def add(self, at_s: float, stats: Document) -> None:
        """A sample; `at_s` since the epoch, `stats` as `router-admin --json stats` prints it."""
        with self._lock:
            self._samples.append((at_s, stats))

    def rates(self, memory: str) -> list[Document]:
        """Of one memory, between each sample and the one before; of a restarted service, or a new memory, none."""
        with self._lock:
            samples = list(self._samples)
        found = []
        for before, after in itertools.pairwise(samples):
            if (rates := _rates(memory, before, after)) is not None:
                found.append(rates)
        return found


def _rates(
    memory: str, before: tuple[float, Document], after: tuple[float, Document]
) -> Document | None:
    elapsed_s = after[0] - before[0]
    one, two = (totals_of(stats, memory) for _, stats in (before, after))
    if one is None or two is None or elapsed_s <= 0 or two["tokens"] < one["tokens"]:
        return None
    gone_s = after[1]["uptime_s"] - before[1]["uptime_s"]
    if gone_s < 0:
        return None

    def rise(name: str) -> int:
        return int(two[name] - one[name])

    tokens = rise("tokens")
    counts = [b - a for a, b in zip(one["total_counts"], two["total_counts"], strict=True)]
    bounds = after[1]["duration_bounds_s"]

    def share(name: str) -> float | None:
        return rise(name) / tokens if tokens else None

    def milliseconds(of: float) -> float | None:
        seconds = quantile_s(counts, bounds, of)
        return None if seconds is None else 1000 * seconds

    return {
        "at_unix_ms": int(1000 * after[0]),
        "tokens_per_s": tokens / elapsed_s,
        "answered": share("answered"),
        "abstained": share("tokens_abstained"),
        "hits_per_s": rise("hits") / elapsed_s,
        "refused_per_s": (refused_of(after[1]) - refused_of(before[1])) / elapsed_s,
        "p50_ms": milliseconds(0.5),
        "p99_ms": milliseconds(0.99),
    }


def refused_of(stats: Document) -> int:
    """Lookups in all memories that ended in an error."""
    return sum(stats["refused_lookups"].values())


def totals_of(stats: Document, memory: str) -> Document | None:
    """A memory's layers added up; None when it is not there."""
    for each in stats["memories"]:
        if each["memory"] == memory:
            layers = each["layers"]
            sums = {
                name: sum(layer[name] for layer in layers)
                for name in ("tokens", "tokens_abstained", "hits", "route_requests")
            }
            return sums | {
                "answered": sums["tokens"] - sums["tokens_abstained"],
                "total_counts": each["stages"][-1]["counts"],
            }
    return None


class Sampler(threading.Thread):
    """Adds to a history, often while somebody looks."""

    def __init__(self, sample: Callable[[], None], wait_s: Callable[[], float]) -> None:
        super().__init__(name="sampler", daemon=True)
        self._sample, self._wait_s = sample, wait_s
        self._stopping = threading.Event()

    def run(self) -> None:
        """Until stop()."""
        while not self._stopping.is_set():
            self._sample()
            self._stopping.wait(self._wait_s())

    def stop(self) -> None:
        """Ends the thread after the sample under way."""
        self._stopping.set()

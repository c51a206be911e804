"""Interleaved timing: every lane in every round, in a shuffled order, with cache-evicting work before each call.

Warm loops flatter every index. A model reads hundreds of megabytes of weights between two lookups, so here every core
sweeps its share of an array before a call is timed. The sweep uses plain threads and no BLAS: BLAS workers would go on
spinning into the measurement.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

MIB = 2**20
STAGES = ("decode", "search", "blend", "encode")
# What a call took inside the sidecar, ns per stage; None for an engine in this process.
Stages = tuple[int, int, int, int] | None


@dataclass(frozen=True, slots=True)
class Lane:
    """One way to look tokens up; `call` takes the tokens' place among the queries."""

    engine: str
    transport: str
    dtype: str
    neighbours: int
    call: Callable[[slice], Stages]


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed call."""

    elapsed_ns: int
    stages: Stages


class CacheSweep:
    """Reads and writes `mebibytes` of memory, every core its share; 0 does nothing."""

    def __init__(self, mebibytes: int) -> None:
        workers = os.cpu_count() or 1
        floats = mebibytes * MIB // 4 // workers
        self._shares = [np.ones(floats, np.float32) for _ in range(workers)]
        self._pool = ThreadPoolExecutor(workers)

    def sweep(self) -> None:
        """Returns when every core has gone through its share."""
        for _ in self._pool.map(lambda share: np.multiply(share, 1.0, out=share), self._shares):
            pass

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()


def batches(queries: int, tokens: int, rounds: int) -> list[slice]:
    """Which queries each round asks; they come round again when they are used up."""
    starts = [(number * tokens) % (queries - tokens + 1) for number in range(rounds)]
    return [slice(start, start + tokens) for start in starts]


def measure(
    lanes: Sequence[Lane], rounds: Sequence[slice], evict: Callable[[], None], seed: int
) -> list[list[Sample]]:
    """Samples per lane, one per round; the first round warms up and does not count."""
    rng = np.random.default_rng(seed)
    samples: list[list[Sample]] = [[] for _ in lanes]
    for number, tokens in enumerate([rounds[0], *rounds]):
        for index in rng.permutation(len(lanes)):
            evict()
            started = time.perf_counter_ns()
            stages = lanes[index].call(tokens)
            elapsed_ns = time.perf_counter_ns() - started
            if number:
                samples[index].append(Sample(elapsed_ns, stages))
    return samples

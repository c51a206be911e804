"""Building the indexes of a memory's layers, as an operation; measuring what they find, and choosing how to search."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace

import numpy as np

from router_service.arrays import F64, NO_ID, Bool, Entries, Neighbours
from router_service.backends.base import Compression, Report, SearchOptions
from router_service.errors import Cancelled, DiskFull
from router_service.jobs.measure import SAME_DISTANCE
from router_service.memories.layer import LayerMemory
from router_service.memories.memory import RoutingMemory, sample_entries
from router_service.memories.store import MemoryStore

# Layers that are indexed at a time. One alone leaves half of two cores idle while it copies, quantizes and opens; each
# has threads of its own for its graph.
_TOGETHER = max(2, min(8, (os.cpu_count() or 1) // 2))
# Neighbours that a measurement of recall asks for.
RECALL_AT = 32
# Keys that it asks about: as many as compare that many numbers, some 2 s. To choose by, more of them.
_FEWEST_QUERIES, _MOST_QUERIES, _NUMBERS = 16, 64, 1 << 33
_MOST_TO_CHOOSE_BY = 256
_QUERIES_PER_SEARCH = 32
# What is tried, the cheaper first. More neither finds much: then it is the search keys that do not bear it.
_HNSW_EFS = (16, 24, 32, 48, 64, 100, 150, 200, 300, 400, 600, 1000)
_OVERSAMPLINGS = (2.0, 4.0, 8.0, 16.0, 32.0)


@dataclass(frozen=True, slots=True)
class Indexed:
    """A layer that was indexed, the seconds that it took, and what searches find since: see recall_of()."""

    layer: int
    elapsed_s: float
    recall: float | None


def optimized(
    memory: RoutingMemory,
    layers: Sequence[LayerMemory],
    compression: Compression | None,
    report: Report,
    oversampling: float = 0.0,
) -> Iterator[Indexed]:
    """Optimizes layers side by side; yields each when it is done. Raises what `report` raises.

    `compression`: None keeps each layer's own. `oversampling`: to measure recall with; 0: the memory's.
    """
    ended = threading.Event()

    def indexed(layer: LayerMemory) -> Indexed:
        def of_layer(stage: str, done: int, total: int) -> None:
            if ended.is_set():
                raise Cancelled("another layer could not be optimized")
            report(f"layer {layer.layer}: {stage}", done, total)

        started = time.monotonic()
        of_layer("begin", 0, 0)
        layer.optimize(compression, of_layer)
        elapsed_s, settings = time.monotonic() - started, memory.record.settings
        options = settings.search(RECALL_AT)
        if oversampling:
            options = replace(options, oversampling=oversampling)
        return Indexed(layer.layer, elapsed_s, recall_of(layer, options, of_layer))

    alone: list[LayerMemory] = []  # beside others there was too little disk
    with ThreadPoolExecutor(_TOGETHER, thread_name_prefix="optimize") as pool:
        jobs = {pool.submit(indexed, layer): layer for layer in layers}
        try:
            for job in as_completed(jobs):
                if isinstance(job.exception(), DiskFull):
                    alone.append(jobs[job])
                else:
                    yield job.result()
        except BaseException:
            ended.set()
            raise
    yield from map(indexed, alone)


def recall_of(layer: LayerMemory, options: SearchOptions, report: Report) -> float | None:
    """Share of the RECALL_AT nearest that searches find, over a sample of the layer's own keys, each without itself.

    None when the layer has no index. Looks at every entry for each key, one key at a time.
    """
    if not layer.info().indexed_entries:
        return None
    return _Sample(layer, RECALL_AT, _MOST_QUERIES, report).recalls(options)[1]


def quantized(
    store: MemoryStore,
    memory: RoutingMemory,
    layers: Sequence[LayerMemory],
    compression: Compression,
    oversampling: float,
    report: Report,
) -> Iterator[Indexed]:
    """Yields like optimized(). `oversampling` 0: as many candidates as the layers need afterwards.

    Meanwhile at least as many are rescored as before and as are needed, so no answer is worse than before or after.
    What ends it leaves as many as the layers need as they are, and no fewer than before.
    """
    before = memory.record.settings.oversampling
    wanted = oversampling or compression.oversampling
    _set(store, memory, max(wanted, before))
    try:
        yield from optimized(memory, layers, compression, report, wanted)
    except BaseException:
        _set(store, memory, max(before, _needed(memory)))  # some layers may be done
        raise
    _set(store, memory, oversampling or _needed(memory))


def _needed(memory: RoutingMemory) -> float:
    """Times K candidates that the layers need as they are."""
    return max(layer.info().compression.oversampling for layer in memory.layers)


def _set(store: MemoryStore, memory: RoutingMemory, oversampling: float) -> None:
    if oversampling != memory.record.settings.oversampling:
        store.change_settings(memory.record.name, {"oversampling": oversampling}, memory)


@dataclass(frozen=True, slots=True)
class LayerSearch:
    """Of one layer; the fields of knnmoe.v1.LayerSearch."""

    layer: int
    queries: int
    recall_at_1: float
    recall_at_k: float
    ms_per_lookup: float
    exact: bool
    segments: int


@dataclass(frozen=True, slots=True)
class SearchChoice:
    """What was chosen and stored, and what lookups find since."""

    hnsw_ef: int
    oversampling: float
    neighbours: int
    layers: tuple[LayerSearch, ...]


def optimized_to(
    store: MemoryStore,
    memory: RoutingMemory,
    layers: Sequence[LayerMemory],
    compression: Compression | None,
    recall: float,
    report: Report,
) -> Iterator[Indexed | SearchChoice]:
    """optimized(), then the choice for all layers that are read and have entries, which is stored.

    Raises what `report` raises; then the settings stay as they were.
    """
    yield from optimized(memory, layers, compression, report)
    settings = memory.record.settings
    read = [each for each in memory.layers if settings.speaks_for(each.layer)]
    samples = [
        sample
        for layer in read
        if len((sample := _Sample(layer, settings.neighbours, _MOST_TO_CHOOSE_BY, report)).entries)
    ]
    found = {sample.layer.layer: sample.least(recall) for sample in samples}
    reached = [options for options in found.values() if options is not None]
    changes = {
        "hnsw_ef": max((each.hnsw_ef for each in reached), default=settings.hnsw_ef),
        "oversampling": max((each.oversampling for each in reached), default=settings.oversampling),
        "search_recall": recall,
        "exact_layers": tuple(number for number, options in found.items() if options is None),
    }
    after = store.change_settings(memory.record.name, changes, memory).record.settings
    measured = tuple(
        sample.measured(after.search(settings.neighbours, sample.layer.layer)) for sample in samples
    )
    yield SearchChoice(after.hnsw_ef, after.oversampling, settings.neighbours, measured)


class _Sample:
    """Keys of a layer, and which of its entries are nearest to each, that key's own left out."""

    def __init__(self, layer: LayerMemory, neighbours: int, most: int, report: Report) -> None:
        """At most `most` keys, at least _FEWEST_QUERIES; looks at every entry for each, one key at a time."""
        self.layer, self._neighbours, self._report = layer, neighbours, report
        entries, info = sample_entries(layer, most), layer.info()
        numbers = max(1, info.entries * entries.keys.shape[1])
        most = max(_FEWEST_QUERIES, min(most, _NUMBERS // numbers))
        self.entries: Entries = entries.slice(0, most)
        self._segments = info.segments
        farthest = self._searched(SearchOptions(exact=True), at_a_time=1) if len(entries) else []
        # Distances [n, K] of the others, ascending; inf where there are fewer.
        self._nearest: F64 = np.array(farthest, np.float64).reshape(len(self.entries), neighbours)

    def least(self, recall: float) -> SearchOptions | None:
        """The fewest candidates that find `recall`; None when none of those that are tried do."""
        for oversampling in _OVERSAMPLINGS:
            if not self._finds(recall, SearchOptions(_HNSW_EFS[-1], oversampling)):
                continue
            few, enough = 0, len(_HNSW_EFS) - 1
            while few < enough:
                middle = (few + enough) // 2
                if self._finds(recall, SearchOptions(_HNSW_EFS[middle], oversampling)):
                    enough = middle
                else:
                    few = middle + 1
            return SearchOptions(_HNSW_EFS[enough], oversampling)
        return None

    def measured(self, options: SearchOptions) -> LayerSearch:
        """What lookups find and take by the options, one token at a time."""
        at_1, at_k = self.recalls(options)
        elapsed_ms = []
        for key in self.entries.keys:
            started = time.perf_counter()
            self.layer.collection.search(key[None], self._neighbours, options)
            elapsed_ms.append(1000 * (time.perf_counter() - started))
        return LayerSearch(
            self.layer.layer,
            len(self.entries),
            at_1,
            at_k,
            float(np.median(elapsed_ms)),
            options.exact,
            self._segments,
        )

    def _finds(self, recall: float, options: SearchOptions) -> bool:
        return min(self.recalls(options)) >= recall

    def recalls(self, options: SearchOptions) -> tuple[float, float]:
        """Shares of the nearest and of the K nearest that are found; of no neighbours all."""
        found = np.array(self._searched(options, _QUERIES_PER_SEARCH), np.float64)
        there: Bool = np.isfinite(self._nearest)
        # Ties may come in any order, so the j-th found is compared with the j-th of all
        right = (found.reshape(there.shape) <= self._nearest * (1 + SAME_DISTANCE)) & there
        # Behind a miss all others move up by one: what counts is how many are near enough
        kth = np.where(there, self._nearest, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
        near = (found.reshape(there.shape) <= kth * (1 + SAME_DISTANCE)) & there
        return _share(right[:, :1], there[:, :1]), _share(near, there)

    def _searched(self, options: SearchOptions, at_a_time: int) -> list[F64]:
        """Distances [K] of what a search finds for each key beside its own entry.

        As that one is among what is found, K + 1 are asked for, of as many candidates as for K.
        """
        k = self._neighbours
        fewer = max(1.0, options.oversampling * k / (k + 1))
        asked = replace(options, oversampling=fewer)
        rows: list[F64] = []
        for start in range(0, len(self.entries), at_a_time):
            self._report(f"layer {self.layer.layer}: measure recall", start, len(self.entries))
            some = self.entries.slice(start, start + at_a_time)
            found = self.layer.collection.search(some.keys, k + 1, asked)
            rows += [_others(found, row, number, k) for row, number in enumerate(some.ids)]
        return rows


def _others(found: Neighbours, row: int, own: np.uint64, k: int) -> F64:
    other = (found.ids[row] != own) & (found.ids[row] != NO_ID)
    distances = np.full(k, np.inf)
    nearest = found.distances[row][other][:k]
    distances[: len(nearest)] = nearest
    return distances


def _share(hits: Bool, of: Bool) -> float:
    wanted = int(np.count_nonzero(of))
    return int(np.count_nonzero(hits)) / wanted if wanted else 1.0

"""The process that tries compressions on a copy of a layer: building, exact search and timing stop no thread elsewhere.

Run as `python -m router_service.jobs.measure_child DIRECTORY`; what it does and writes there: see measure.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from router_service.arrays import F32, Assignment
from router_service.backends.base import Collection, CollectionSpec, Compression, pages
from router_service.backends.edge.backend import EdgeBackend
from router_service.backends.edge.files import CollectionFiles, segment_bytes
from router_service.backends.exact import ExactBackend
from router_service.children import die_with_parent_thread
from router_service.jobs.measure import COPY, QUERIES, RESULTS, TASK, Task, search_errors
from router_service.memories.layer import LayerMemory, RouteAnswer, RouteQuery
from router_service.memories.settings import MemorySettings

_NICENESS = 10
_PAGE = 4096
_NEVER = 1 << 62


def main(directory: str) -> None:
    """Measures one compression after the other and appends a line of JSON for each."""
    die_with_parent_thread()
    os.nice(_NICENESS)
    work = Path(directory)
    task = Task.from_json((work / TASK).read_text())
    files = CollectionFiles(work, COPY)
    spec = files.read().spec
    backend = EdgeBackend(work, min_free_bytes=0, isolate_above_bytes=_NEVER)
    collection = backend.open(COPY, spec)
    collection.delete(np.array(task.held_out, np.uint64))
    layer = _Layer(task, spec, _query(work, task))
    exact = layer.route(_exact(collection, spec), task.settings)
    with (work / RESULTS).open("a") as results:
        for label in task.compressions:
            _tell(results, {"begun": label})
            built = layer.built(collection, label)
            _tell(results, layer.measured(collection, files, exact, label) | {"build_s": built})
    backend.close()


class _Layer:
    """The layer under test and the tokens it is asked about."""

    def __init__(self, task: Task, spec: CollectionSpec, query: RouteQuery) -> None:
        self._task, self._spec, self._query = task, spec, query

    def route(self, collection: Collection, settings: MemorySettings) -> RouteAnswer:
        """The answer of a collection, whether or not the memory speaks for the layer."""
        memory = LayerMemory(self._task.layer, collection, self._task.num_experts, self._task.top_k)
        return memory.route(self._query, replace(settings, layers=()))

    def built(self, collection: Collection, label: str) -> float:
        """Seconds that it takes to change the collection to a compression."""
        started = time.perf_counter()
        collection.optimize(Compression.parse(label))
        return time.perf_counter() - started

    def measured(
        self, collection: Collection, files: CollectionFiles, exact: RouteAnswer, label: str
    ) -> dict[str, Any]:
        """The fields of a Measurement but the time to build."""
        compression = Compression.parse(label)
        oversampling = self._task.oversampling or compression.oversampling
        settings = replace(self._task.settings, oversampling=oversampling)
        answer = self.route(collection, settings)  # also warms the caches
        errors = search_errors(answer, exact, self._query.own, self._task.num_experts)
        entries = collection.info().entries
        shard = files.shard(files.read().generation)
        searched, stored = segment_bytes(shard, compression)
        return asdict(errors) | {
            "compression": label,
            "oversampling": oversampling,
            "entries": entries + len(self._task.held_out),
            "queries": len(self._query.router_inputs),
            "ram_bytes_per_key": searched / max(1, entries),
            "disk_bytes_per_key": stored / max(1, entries),
            "ms_per_query": self._ms_per_query(collection, settings),
        }

    def _ms_per_query(self, collection: Collection, settings: MemorySettings) -> float:
        """Of the search alone."""
        rows = self._query.router_inputs
        started = time.perf_counter()
        collection.search(rows, settings.neighbours, settings.search(settings.neighbours))
        return (time.perf_counter() - started) * 1000 / len(rows)


def _exact(collection: Collection, spec: CollectionSpec) -> Collection:
    """The same entries in RAM, searched by brute force."""
    copied = ExactBackend().create(COPY, spec)
    for page in pages(collection, _PAGE, with_keys=True):
        copied.upsert(page)
    return copied


def _query(work: Path, task: Task) -> RouteQuery:
    with np.load(work / QUERIES, allow_pickle=False) as saved:
        inputs: F32 = saved["inputs"]
    own: Assignment | F32 = np.zeros((len(inputs), task.num_experts), np.float32)
    if not task.settings.kind.blends_logits:
        experts = np.tile(np.arange(task.top_k, dtype=np.int32), (len(inputs), 1))
        own = Assignment(experts, np.full(experts.shape, 1 / task.top_k, np.float32))
    return RouteQuery(inputs, own)


def _tell(results: Any, line: dict[str, Any]) -> None:
    results.write(json.dumps(line) + "\n")
    results.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])

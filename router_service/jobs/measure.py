"""What each compression of the search keys costs on a layer at hand: tried on a copy, in a process of its own.

The process (measure_child) finds in its directory a copy of the layer (COPY), what to do (TASK) and the router inputs
to ask about (QUERIES), and appends a line of JSON to RESULTS as each compression begins and ends.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from router_service.arrays import F32, NO_ID, Assignment
from router_service.backends.base import FileCollection, Report
from router_service.backends.disk import FreeSpace, copy_tree, disk_bytes, remove_tree, storage_call
from router_service.blending import scatter_dense
from router_service.children import start_module
from router_service.errors import InvalidField, StorageError
from router_service.memories.layer import LayerMemory, RouteAnswer
from router_service.memories.memory import RoutingMemory, sample_entries
from router_service.memories.settings import MemorySettings, settings_from_json

# Nearest neighbours at the same distance may come in any order.
SAME_DISTANCE = 1e-6
# Own keys are asked about on a copy without them, one in so many at most.
_MOST_HELD_OUT = 4


@dataclass(frozen=True, slots=True)
class SearchErrors:
    """Over the tokens of one layer; the blend's error of a token is the largest among its experts."""

    recall_at_1: float
    lambda_error_mean: float
    lambda_error_max: float
    blend_error_mean: float
    blend_error_max: float


def search_errors(
    found: RouteAnswer, exact: RouteAnswer, own: Assignment | F32, num_experts: int
) -> SearchErrors:
    """Of answers to the same T tokens with the routing `own`; T is 1 or more."""
    lambdas = np.abs(found.lambdas.astype(np.float64) - exact.lambdas)
    blends = np.abs(_blend(found, own, num_experts) - _blend(exact, own, num_experts)).max(axis=1)
    return SearchErrors(
        recall_at_1(found, exact),
        float(lambdas.mean()),
        float(lambdas.max()),
        float(blends.mean()),
        float(blends.max()),
    )


def recall_at_1(found: RouteAnswer, exact: RouteAnswer) -> float:
    """Share of tokens that have their nearest entry first, or one as near; tokens without a neighbour do not count."""
    true, distances = exact.neighbours, found.neighbours.distances[:, 0]
    some = true.ids[:, 0] != NO_ID
    if not some.any():
        return 1.0
    as_near = distances <= true.distances[:, 0] * (1 + SAME_DISTANCE)
    same = found.neighbours.ids[:, 0] == true.ids[:, 0]
    return float((same | as_near)[some].mean())


def _blend(answer: RouteAnswer, own: Assignment | F32, num_experts: int) -> F32:
    """The blended routing [T, N]; the own one where every token abstained."""
    blended = own if answer.blended is None else answer.blended
    if isinstance(blended, Assignment):
        return scatter_dense(blended.experts, blended.weights, num_experts)
    return blended


COPY, TASK, QUERIES, RESULTS = "layer", "task.json", "queries.npz", "results.jsonl"
_CHILD = "router_service.jobs.measure_child"
_DIRECTORY = "gen-measuring"
_POLL_S = 0.2
_STDERR_TAIL = 2000


@dataclass(frozen=True, slots=True)
class Task:
    """What the process is to measure."""

    layer: int
    num_experts: int
    top_k: int
    settings: MemorySettings
    compressions: tuple[str, ...]
    oversampling: float  # 0: that of each compression
    # Of entries that are removed from the copy first, for their keys are the queries; or none
    held_out: tuple[int, ...]

    def to_json(self) -> str:
        """UTF-8 JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Task:
        """Inverse of to_json."""
        content = json.loads(text)
        held_out = tuple(content.pop("held_out"))
        settings = settings_from_json(content.pop("settings"))
        compressions = tuple(content.pop("compressions"))
        return Task(settings=settings, compressions=compressions, held_out=held_out, **content)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One compression of one layer; the fields of knnmoe.v1.CompressionMeasurement."""

    layer: int
    compression: str
    oversampling: float
    entries: int
    queries: int
    ram_bytes_per_key: float
    disk_bytes_per_key: float
    recall_at_1: float
    lambda_error_mean: float
    lambda_error_max: float
    blend_error_mean: float
    blend_error_max: float
    ms_per_query: float
    build_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure of a memory."""

    compressions: tuple[str, ...]
    oversampling: float
    sample: int
    min_free_bytes: int | None


def measured(
    memory: RoutingMemory,
    layers: Sequence[tuple[LayerMemory, F32 | None]],
    plan: Plan,
    report: Report,
) -> Iterator[Measurement]:
    """Measures layer after layer, each with router inputs [n, d] or, for None, with a sample of its own keys.

    The memory stays as it is. Raises InvalidField when a layer has no entries or no files, DiskFull, StorageError, and
    what `report` raises.
    """
    for layer, inputs in layers:
        task, queries = _task(memory, layer, inputs, plan)
        report(f"layer {layer.layer}: copy", 0, len(plan.compressions))
        with _copied(layer, plan.min_free_bytes) as work:
            (work / TASK).write_text(task.to_json())
            np.savez(work / QUERIES, inputs=queries)
            yield from _run(work, task, report)


def _task(
    memory: RoutingMemory, layer: LayerMemory, inputs: F32 | None, plan: Plan
) -> tuple[Task, F32]:
    model = memory.record.fingerprint
    task = Task(
        layer.layer,
        model.num_experts,
        model.top_k,
        memory.record.settings,
        plan.compressions,
        plan.oversampling,
        held_out=(),
    )
    if inputs is not None:
        return task, inputs
    size = min(plan.sample, layer.info().entries // _MOST_HELD_OUT)
    if not size:
        got = f"layer {layer.layer} with {layer.info().entries} entries"
        raise InvalidField("layers", got, f"a layer with {_MOST_HELD_OUT} entries or more")
    entries = sample_entries(layer, size).slice(0, size)
    return replace(task, held_out=tuple(entries.ids.tolist())), entries.keys


@contextmanager
def _copied(layer: LayerMemory, min_free_bytes: int | None) -> Iterator[Path]:
    """A directory with a copy of the layer's files; nothing is left of it afterwards."""
    if not isinstance(layer.collection, FileCollection):
        expected = "a memory of the embedded backend; `router-admin migrate --to DIR` makes a copy to measure"
        raise InvalidField("memory", "a memory that is not kept in files", expected)
    with layer.collection.paused_for_copy() as frozen:
        work = frozen.directory / _DIRECTORY
        try:
            remove_tree(work)
            sources = [frozen.directory / name for name in frozen.names]
            # The copy, its next generation while that is built, and its index.
            needed = 3 * sum(disk_bytes(source) for source in sources if source.is_dir())
            FreeSpace(frozen.directory, min_free_bytes).require(needed)
            _copy(sources, work / COPY)
        except BaseException:
            remove_tree(work)
            raise
    try:
        frozen.complete(work / COPY)
        yield work
    finally:
        # What was killed may still write; the next open removes the rest
        with suppress(StorageError):
            remove_tree(work)


def _copy(sources: Sequence[Path], target: Path) -> None:
    target.mkdir(parents=True)
    for source in sources:
        if source.is_dir():
            copy_tree(source, target / source.name)
        else:
            with storage_call(f"copy {source}"):
                (target / source.name).write_bytes(source.read_bytes())


def _run(work: Path, task: Task, report: Report) -> Iterator[Measurement]:
    with storage_call(f"measure layer {task.layer}"), tempfile.TemporaryFile() as stderr:
        process = start_module(_CHILD, [str(work)], stderr=stderr.fileno())
        try:
            yield from _followed(work / RESULTS, process, task, report)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            stderr.seek(0)
            tail = stderr.read().decode(errors="replace")[-_STDERR_TAIL:].strip()
            raise StorageError(f"measuring layer {task.layer} failed: {tail}")


def _followed(
    results: Path, process: subprocess.Popen[bytes], task: Task, report: Report
) -> Iterator[Measurement]:
    done, stage = 0, "search exactly"
    while True:
        ended = process.poll() is not None
        lines = _complete_lines(results)
        for line in lines[done:]:
            stage = line.get("begun", stage)
            if "begun" not in line:
                yield Measurement(task.layer, **line)
        done = len(lines)
        if ended:
            return
        report(f"layer {task.layer}: {stage}", done // 2, len(task.compressions))
        try:
            process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            continue


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

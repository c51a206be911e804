"""Pruning a memory: plans every layer first, then deletes, as an operation.

An entry that is written after the plan of its layer was begun is not deleted, whatever the plan says of the one that it
replaced (see write_gate).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from router_service.backends.base import Report
from router_service.errors import Cancelled
from router_service.memories.deletion import batches, deleter
from router_service.memories.layer import LayerMemory
from router_service.memories.memory import RoutingMemory
from router_service.memories.write_gate import Watch
from router_service.retention.plan import PrunePlan, Use
from router_service.retention.pruning import PruneOptions, PruneResult, plan_prune
from router_service.retention.scores import LayerReading

# Searches of one engine call: lookups of others wait no longer than for a request of as many tokens.
PAGE_ENTRIES = 256


@dataclass(frozen=True, slots=True)
class PruneRequest:
    """A plan for layers of any size: hits are each layer's own, and `max_share` in (0, 1] is of its entries."""

    plan: PrunePlan
    max_share: float | None = None
    seed: int = 0

    def plan_for(self, layer: LayerMemory) -> PrunePlan:
        """The plan of one layer."""
        hits = layer.hits.counts()
        policies = [
            replace(policy, hits=hits) if isinstance(policy, Use) else policy
            for policy in self.plan.policies
        ]
        size = self.plan.max_entries
        if self.max_share is not None:
            share = int(self.max_share * layer.info().entries)
            size = max(share, self.plan.keep_at_least, 1)
        return replace(self.plan, policies=policies, max_entries=size)


@dataclass(frozen=True, slots=True)
class LayerPruning:
    """What the plan says of a layer, and what came of it: `spared` were written meanwhile."""

    layer: int
    result: PruneResult
    deleted: int = 0
    spared: int = 0
    elapsed_s: float = 0.0


def prune(
    memory: RoutingMemory,
    layers: Sequence[LayerMemory],
    request: PruneRequest,
    *,
    dry_run: bool,
    report: Report,
) -> Iterator[LayerPruning]:
    """Yields what became of each layer; with `dry_run` nothing is deleted.

    Raises InvalidField on a plan that makes no sense for the memory or for one of the layers; then nothing is deleted.
    Raises what `report` raises: what was deleted until then stays deleted, and Cancelled says how much that was.
    """
    with ExitStack() as open_watches:
        planned = []
        for layer in layers:
            watch = open_watches.enter_context(layer.gate.watched())
            made = _plan(memory, layer, request, report)
            if dry_run:
                yield made
            else:
                planned.append((layer, watch, made))
        yield from _delete_all(memory, planned, report)


def _plan(
    memory: RoutingMemory, layer: LayerMemory, request: PruneRequest, report: Report
) -> LayerPruning:
    started, entries = time.monotonic(), layer.info().entries

    def on_page(stage: str, done: int) -> None:
        report(f"layer {layer.layer}: plan, {stage}", done, entries)

    settings, model = memory.record.settings, memory.record.fingerprint
    reading = LayerReading(layer.layer, model.num_experts, settings)
    options = PruneOptions(PAGE_ENTRIES, seed=request.seed, on_page=on_page)
    on_page("begin", 0)
    result = plan_prune(layer.collection, request.plan_for(layer), reading, options)
    return LayerPruning(layer.layer, result, elapsed_s=time.monotonic() - started)


def _delete_all(
    memory: RoutingMemory,
    planned: Sequence[tuple[LayerMemory, Watch, LayerPruning]],
    report: Report,
) -> Iterator[LayerPruning]:
    total, done = sum(len(made.result.ids_to_drop) for _, _, made in planned), 0
    for layer, watch, made in planned:
        started = time.monotonic()
        deleted = spared = 0
        for batch in batches(made.result.ids_to_drop):
            _report_deleted(report, layer.layer, done, total)
            gone, left = watch.delete(batch, deleter(memory, layer))
            deleted, spared, done = deleted + gone, spared + left, done + len(batch)
        if deleted:
            layer.collection.flush()
        elapsed_s = made.elapsed_s + time.monotonic() - started
        yield replace(made, deleted=deleted, spared=spared, elapsed_s=elapsed_s)


def _report_deleted(report: Report, layer: int, done: int, total: int) -> None:
    try:
        report(f"layer {layer}: delete", done, total)
    except Cancelled as error:
        kept = f"{done} of {total} entries were deleted and stay deleted; nothing else was changed"
        raise Cancelled(f"{error}; {kept}") from error

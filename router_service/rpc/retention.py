"""The handlers of deletion and pruning, and plans of pruning from the wire."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from knnmoe.v1 import retention_pb2 as pb
from knnmoe.v1 import retention_pb2_grpc

from router_service import checks
from router_service.arrays import U64, ExampleRef, HitCounts
from router_service.errors import InvalidField
from router_service.jobs.prune import LayerPruning, PruneRequest, prune
from router_service.memories.deletion import EntryFilter, LayerDeletion, delete_entries
from router_service.memories.memory import RoutingMemory
from router_service.operations import Operations
from router_service.retention.plan import (
    Age,
    Agreement,
    Coverage,
    Forget,
    Gain,
    NearDuplicates,
    Policy,
    PrunePlan,
    Random,
    Strength,
    Use,
)
from router_service.rpc import codec
from router_service.rpc.operations import encoded
from router_service.rpc.routing import Memories

# The service puts each layer's own here.
_NO_HITS = HitCounts(np.empty(0, np.uint64), np.empty(0, np.int64))
# The fields that a plan sets, by name.
_Given = Mapping[str, Any]


class RetentionService(retention_pb2_grpc.RetentionServiceServicer):
    """Delete, prune."""

    def __init__(self, memories: Memories, operations: Operations) -> None:
        self._memories, self._operations = memories, operations

    def Delete(self, request: pb.DeleteRequest, context: grpc.ServicerContext) -> pb.DeleteResponse:  # noqa: N802
        """Removes entries by id or by where they came from."""
        what, fsync = _named_entries(request), codec.decode_fsync(request.durability)

        def delete(memory: RoutingMemory) -> list[LayerDeletion]:
            layers = memory.chosen_layers([request.layer] if request.HasField("layer") else [])
            return delete_entries(memory, layers, what, fsync=fsync, dry_run=request.dry_run)

        gone = self._memories.asked(request.memory, delete)
        return pb.DeleteResponse(
            layers=[codec.filled(pb.LayerDeletion, one) for one in gone],
            deleted=sum(one.deleted for one in gone),
        )

    def Prune(  # noqa: N802
        self, request: pb.PruneRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.PruneResponse]:
        """Removes what a plan drops."""
        memory, dry_run = self._memories.get(request.memory), request.dry_run
        layers, plan = memory.chosen_layers(request.layers), decode_plan(request.plan)
        steps = self._operations.run(
            "prune-dry-run" if dry_run else "prune",
            request.memory,
            lambda report: prune(memory, layers, plan, dry_run=dry_run, report=report),
            exclusive=not dry_run,
        )
        return encoded(steps, pb.PruneResponse, lambda done: {"layer": encode_pruning(done)})


def _named_entries(request: pb.DeleteRequest) -> U64 | EntryFilter:
    if request.WhichOneof("what") == "filter":
        return decode_filter("filter", request.filter)
    if request.WhichOneof("what") == "ids":
        ids = codec.decode_ids("ids", request.ids)
        checks.require_ids("ids", ids)
        return ids
    raise InvalidField("what", "nothing", "ids or a filter: what to delete")


def decode_filter(field: str, message: pb.EntryFilter) -> EntryFilter:
    """Raises InvalidField without a source."""
    if not message.source:
        raise InvalidField(f"{field}.source", "nothing", "the name of a source")
    checks.require_text(f"{field}.source", message.source)
    checks.require_text(f"{field}.example", message.example)
    return EntryFilter(message.source, message.example if message.HasField("example") else None)


def decode_plan(message: pb.PrunePlan) -> PruneRequest:
    """Raises InvalidField on a field that is out of range; the memory checks the rest."""
    given = {field.name: value for field, value in message.ListFields()}
    policies = [*_with_thresholds(given), *_ranking(given)]
    share, size = given.get("max_share"), given.get("max_entries")
    if share is not None and not 0 < share <= 1:
        raise InvalidField("plan.max_share", share, "a share in (0, 1], e.g. 0.5")
    keep = given.get("keep_at_least", 1)
    # A plan for shares is checked as one for a number; the layer's own number replaces it.
    size = max(1, keep) if share is not None else size
    return PruneRequest(PrunePlan(policies, keep, size), share, message.seed)


def encode_pruning(done: LayerPruning) -> pb.LayerPruning:
    """What the plan says of a layer, and what came of it; counts in entries."""
    return codec.filled(
        pb.LayerPruning,
        done.result,
        layer=done.layer,
        dropped=len(done.result.ids_to_drop),
        deleted=done.deleted,
        spared=done.spared,
        elapsed_s=done.elapsed_s,
    )


def _with_thresholds(given: _Given) -> list[Policy]:
    policies: list[Policy] = []
    spare = given.get("spare_newer_than_unix_ms")
    if "forget" in given:
        policies.append(_forget(given["forget"]))
    if "older_than_unix_ms" in given:
        policies.append(Age(given["older_than_unix_ms"]))
    if "unused_below" in given:
        policies.append(Use(_NO_HITS, given["unused_below"], spare))
    if "gain_below" in given:
        policies.append(Gain(_finite("gain_below", given["gain_below"])))
    if "strength_below" in given:
        policies.append(Strength(_finite("strength_below", given["strength_below"])))
    if "agreement_below" in given:
        policies.append(Agreement(_within("agreement_below", given["agreement_below"], -1, 1)))
    if "near_duplicate_similarity" in given:
        policies.append(_near_duplicates(given))
    elif "near_duplicate_agreement" in given:
        _refuse_alone(given, "near_duplicate_agreement", "near_duplicate_similarity")
    by_use = "unused_below" in given or given.get("by") == pb.PRUNE_RANKING_USE
    if spare is not None and not by_use:
        _refuse_alone(given, "spare_newer_than_unix_ms", "unused_below")
    return policies


def _forget(filters: Sequence[pb.EntryFilter]) -> Forget:
    wanted = [decode_filter(f"plan.forget[{n}]", one) for n, one in enumerate(filters)]
    examples = [ExampleRef(one.source, one.example) for one in wanted if one.example is not None]
    sources = [one.source for one in wanted if one.example is None]
    return Forget(frozenset(examples), frozenset(sources))


def _near_duplicates(given: _Given) -> NearDuplicates:
    similarity = given["near_duplicate_similarity"]
    agreement = given.get("near_duplicate_agreement", 0.9)
    if not 0 < similarity <= 1:
        raise InvalidField("plan.near_duplicate_similarity", similarity, "in (0, 1], e.g. 0.98")
    return NearDuplicates(similarity, _within("near_duplicate_agreement", agreement, -1, 1))


def _ranking(given: _Given) -> list[Policy]:
    by = given.get("by", pb.PRUNE_RANKING_UNSPECIFIED)
    if not given.keys() & {"max_entries", "max_share"}:
        if by:
            _refuse_alone(given, "by", "max_entries or max_share")
        return []
    make: dict[int, Callable[[], Policy]] = {
        pb.PRUNE_RANKING_AGE: Age,
        pb.PRUNE_RANKING_USE: lambda: Use(_NO_HITS, None, given.get("spare_newer_than_unix_ms")),
        pb.PRUNE_RANKING_GAIN: Gain,
        pb.PRUNE_RANKING_STRENGTH: Strength,
        pb.PRUNE_RANKING_DISAGREEMENT: Agreement,
        pb.PRUNE_RANKING_COVERAGE: Coverage,
        pb.PRUNE_RANKING_RANDOM: lambda: Random(given.get("seed", 0)),
    }
    if by not in make:
        expected = ", ".join(pb.PruneRanking.keys()[1:])
        raise InvalidField("plan.by", by or "nothing", f"who goes first: {expected}")
    return [make[by]()]


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise InvalidField(f"plan.{name}", value, "a finite number")
    return value


def _within(name: str, value: float, least: float, most: float) -> float:
    if not least <= value <= most:
        raise InvalidField(f"plan.{name}", value, f"in [{least}, {most}]")
    return value


def _refuse_alone(given: _Given, name: str, needed: str) -> None:
    raise InvalidField(f"plan.{name}", given[name], f"it together with plan.{needed}")

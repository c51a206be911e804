"""The handlers of deletion and pruning, and plans of pruning from the wire."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import grpc
import numpy as np
from knnmoe.v1 import retention_pb2 as pb
from knnmoe.v1 import retention_pb2_grpc

from router_service import checks
from router_service.arrays import U64, ExampleRef, HitCounts
from router_service.errors import InvalidField
from router_service.jobs.prune import LayerPruning, PruneRequest, prune
from router_service.memories.deletion import EntryFilter, delete_entries
from router_service.operations import Operations
from router_service.retention import (
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

# The service puts each layer's own in this place.
_NO_HITS = HitCounts(np.empty(0, np.uint64), np.empty(0, np.int64))


class RetentionService(retention_pb2_grpc.RetentionServiceServicer):
    """Delete, prune."""

    def __init__(self, memories: Memories, operations: Operations) -> None:
        self._memories, self._operations = memories, operations

    def Delete(self, request: pb.DeleteRequest, context: grpc.ServicerContext) -> pb.DeleteResponse:  # noqa: N802
        """Removes entries by id or by where they came from."""
        memory = self._memories.get(request.memory)
        layers = memory.chosen_layers([request.layer] if request.HasField("layer") else [])
        what, fsync = _named_entries(request), codec.decode_fsync(request.durability)
        gone = delete_entries(memory, layers, what, fsync=fsync, dry_run=request.dry_run)
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
    policies = [*_with_thresholds(message), *_ranking(message)]
    share = message.max_share if message.HasField("max_share") else None
    if share is not None and not 0 < share <= 1:
        raise InvalidField("plan.max_share", share, "a share in (0, 1], e.g. 0.5")
    size = message.max_entries if message.HasField("max_entries") else None
    # A plan for shares is checked as one for a number; the layer's own number replaces it.
    keep = message.keep_at_least if message.HasField("keep_at_least") else 1
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


def _with_thresholds(message: pb.PrunePlan) -> list[Policy]:
    policies: list[Policy] = []
    if message.forget:
        policies.append(_forget(message))
    if message.HasField("older_than_unix_ms"):
        policies.append(Age(message.older_than_unix_ms))
    if message.HasField("unused_below"):
        policies.append(Use(_NO_HITS, message.unused_below, _spare(message)))
    if message.HasField("gain_below"):
        policies.append(Gain(_finite("gain_below", message.gain_below)))
    if message.HasField("strength_below"):
        policies.append(Strength(_finite("strength_below", message.strength_below)))
    if message.HasField("agreement_below"):
        policies.append(Agreement(_within("agreement_below", message.agreement_below, -1, 1)))
    if message.HasField("near_duplicate_similarity"):
        policies.append(_near_duplicates(message))
    elif message.HasField("near_duplicate_agreement"):
        _refuse_alone(
            "near_duplicate_agreement",
            message.near_duplicate_agreement,
            "near_duplicate_similarity",
        )
    if message.HasField("spare_newer_than_unix_ms") and not _uses_hits(message):
        _refuse_alone("spare_newer_than_unix_ms", message.spare_newer_than_unix_ms, "unused_below")
    return policies


def _forget(message: pb.PrunePlan) -> Forget:
    wanted = [decode_filter(f"plan.forget[{n}]", one) for n, one in enumerate(message.forget)]
    examples = [ExampleRef(one.source, one.example) for one in wanted if one.example is not None]
    sources = [one.source for one in wanted if one.example is None]
    return Forget(frozenset(examples), frozenset(sources))


def _near_duplicates(message: pb.PrunePlan) -> NearDuplicates:
    similarity = message.near_duplicate_similarity
    agreement = 0.9
    if message.HasField("near_duplicate_agreement"):
        agreement = message.near_duplicate_agreement
    if not 0 < similarity <= 1:
        raise InvalidField("plan.near_duplicate_similarity", similarity, "in (0, 1], e.g. 0.98")
    return NearDuplicates(similarity, _within("near_duplicate_agreement", agreement, -1, 1))


def _ranking(message: pb.PrunePlan) -> list[Policy]:
    if not message.WhichOneof("size"):
        if message.by:
            _refuse_alone("by", message.by, "max_entries or max_share")
        return []
    make: dict[int, Callable[[], Policy]] = {
        pb.PRUNE_RANKING_AGE: Age,
        pb.PRUNE_RANKING_USE: lambda: Use(_NO_HITS, None, _spare(message)),
        pb.PRUNE_RANKING_GAIN: Gain,
        pb.PRUNE_RANKING_STRENGTH: Strength,
        pb.PRUNE_RANKING_DISAGREEMENT: Agreement,
        pb.PRUNE_RANKING_COVERAGE: Coverage,
        pb.PRUNE_RANKING_RANDOM: lambda: Random(message.seed),
    }
    if message.by not in make:
        expected = ", ".join(pb.PruneRanking.keys()[1:])
        raise InvalidField("plan.by", message.by or "nothing", f"who goes first: {expected}")
    return [make[message.by]()]


def _spare(message: pb.PrunePlan) -> int | None:
    given = message.HasField("spare_newer_than_unix_ms")
    return message.spare_newer_than_unix_ms if given else None


def _uses_hits(message: pb.PrunePlan) -> bool:
    return message.HasField("unused_below") or message.by == pb.PRUNE_RANKING_USE


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise InvalidField(f"plan.{name}", value, "a finite number")
    return value


def _within(name: str, value: float, least: float, most: float) -> float:
    if not least <= value <= most:
        raise InvalidField(f"plan.{name}", value, f"in [{least}, {most}]")
    return value


def _refuse_alone(name: str, value: object, needed: str) -> None:
    raise InvalidField(f"plan.{name}", value, f"it together with plan.{needed}")

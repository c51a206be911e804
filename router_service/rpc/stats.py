"""What the service counts, and what tokens found, as messages."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from knnmoe.v1 import memory_admin_pb2 as pb

from router_service.arrays import F32, NO_ID, Provenance
from router_service.errors import InvalidField
from router_service.memories.counters import STAGES, Abstain, Counts, Durations, LookedUp
from router_service.memories.layer import LayerMemory
from router_service.memories.memory import RoutingMemory
from router_service.memories.settings import MAX_NEIGHBOURS, Kind
from router_service.rpc.codec import encode_provenance
from router_service.rpc.replication import Copy

_SHOWN = 8


def encode_memory(memory: RoutingMemory) -> pb.MemoryStats:
    """Of all layers."""
    read = [(layer, layer.counters.read()) for layer in memory.layers]
    return pb.MemoryStats(
        memory=memory.record.name,
        layers=[_encode_layer(layer, counts) for layer, counts in read],
        stages=_encode_stages([counts for _, counts in read]),
    )


def _encode_layer(layer: LayerMemory, counts: Counts) -> pb.LayerStats:
    info, hits = layer.info(), layer.hits.summary()
    empty, too_far, layer_off = (counts.abstained[reason - 1] for reason in list(Abstain)[1:])
    searched = counts.requests - counts.found_requests
    return pb.LayerStats(
        layer=layer.layer,
        entries=info.entries,
        disk_bytes=info.disk_bytes or 0,
        disk_bytes_unknown=info.disk_bytes is None,
        route_requests=counts.requests,
        tokens=counts.tokens,
        tokens_abstained=counts.tokens_abstained,
        mean_lambda=counts.mean_lambda,
        mean_search_ms=counts.search_ns / 1e6 / max(1, searched),
        hits=hits.total,
        entries_never_hit=max(0, info.entries - hits.entries),
        lambda_counts=counts.lambda_counts,
        abstained_empty=empty,
        abstained_too_far=too_far,
        abstained_layer_off=layer_off,
        replica_requests=counts.found_requests,
        replica_tokens=counts.found_tokens,
        replica_abstained=counts.found_abstained,
    )


def _encode_stages(of_layers: Sequence[Counts]) -> list[pb.StageDurations]:
    sums = {stage: Durations() for stage in STAGES}
    for counts in of_layers:
        for stage, durations in counts.durations.items():
            sums[stage].add_all(durations)
    return [
        pb.StageDurations(stage=stage, counts=each.counts, sum_s=each.sum_s)
        for stage, each in sums.items()
    ]


def encode_copies(copies: Sequence[Copy], memory: str) -> list[pb.ReplicaStats]:
    """Those of one memory, or of all ("")."""
    now = time.monotonic()
    return [
        pb.ReplicaStats(
            memory=copy.memory.record.name,
            version=copy.version,
            memory_version=copy.memory.version,
            connected_s=int(now - copy.began),
        )
        for copy in copies
        if memory in ("", copy.memory.record.name)
    ]


def resident_bytes() -> int:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def explain(request: pb.ExplainEntryRequest, memory: RoutingMemory) -> pb.ExplainEntryResponse:
    """What a lookup of an entry's own key finds. Raises InvalidField, LayerNotFound."""
    asked, layer, settings = request.neighbours, memory.layer(request.layer), memory.record.settings
    if asked > MAX_NEIGHBOURS:
        raise InvalidField("neighbours", asked, f"0 to {MAX_NEIGHBOURS}")
    shown = max(asked or _SHOWN, settings.neighbours)
    token = layer.explained(request.id, shown, settings) if request.id < 2**63 else None
    if token is None:
        raise InvalidField("id", request.id, f"the id of an entry of layer {request.layer}")
    origin = layer.provenance_of(np.array([request.id], np.uint64)).get(request.id, Provenance())
    return pb.ExplainEntryResponse(
        provenance=encode_provenance(origin),
        token=encode_tokens(memory, layer, [token])[0],
        neighbours=settings.neighbours,
    )


def encode_tokens(
    memory: RoutingMemory, layer: LayerMemory, tokens: Sequence[LookedUp]
) -> list[pb.LookedUpToken]:
    """With where their nearest entries came from, of those that are still there."""
    ids = np.concatenate([np.empty(0, np.uint64), *(token.ids for token in tokens)])
    origins = layer.provenance_of(ids)
    return [
        pb.LookedUpToken(
            at_unix_ms=token.unix_ms,
            tokens=token.tokens,
            cases=_encode_cases(memory, token, origins),
            **_weights(token),
        )
        for token in tokens
    ]


def _weights(token: LookedUp) -> dict[str, Any]:
    return {"lambda": token.lambda_, "abstained": token.abstained}  # a keyword of Python's


def _encode_cases(
    memory: RoutingMemory, token: LookedUp, origins: dict[int, Provenance]
) -> list[pb.Case]:
    cases = []
    kind, most = memory.record.settings.kind, memory.record.fingerprint.top_k
    rows = zip(token.ids.tolist(), token.distances, token.similarities, token.values, strict=True)
    for number, distance, similarity, value in rows:
        if number == NO_ID:
            continue
        experts, weights = _strongest(kind, value, most)
        origin = origins.get(number)
        cases.append(
            pb.Case(
                id=number,
                squared_distance=distance,
                similarity=similarity,
                provenance=None if origin is None else encode_provenance(origin),
                experts=experts,
                weights=weights,
            )
        )
    return cases


def _strongest(kind: Kind, value: F32, most: int) -> tuple[list[int], list[float]]:
    """The experts that a value [W] speaks for most."""
    if not kind.blends_logits:
        half = len(value) // 2
        numbers, weights = value[:half].astype(np.intp), value[half:]
    else:
        numbers, weights = np.arange(len(value)), value
    by = np.abs(weights) if kind is Kind.LOGIT_DELTA else weights
    order = np.argsort(-by, kind="stable")[:most]
    return numbers[order].tolist(), weights[order].tolist()

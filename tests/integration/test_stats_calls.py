"""What the service counts of lookups, and shows of single tokens."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from knnmoe import tensors
from knnmoe.client import ReplicationClient
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import routing_pb2 as routing_pb

from tests.sidecar import (
    ASSIGNMENT,
    CALL_TIMEOUT_S,
    EXPERTS,
    LOGIT_DELTA,
    TOP_K,
    Sidecar,
    exported,
    make_fingerprint,
    random_assignments,
    random_entries,
    random_keys,
    refusal,
    route_request,
)

FAR = 100.0


def stats(sidecar: Sidecar, name: str = "") -> admin_pb.StatsResponse:
    return sidecar.admin.Stats(admin_pb.StatsRequest(memory=name), timeout=CALL_TIMEOUT_S)


def fill(sidecar: Sidecar, name: str, kind: int = LOGIT_DELTA, **settings: Any) -> str:
    digest = sidecar.create(name, kind=kind, gamma=[1.0], layers=[0, 1], **settings)
    sidecar.upsert(name, 0, random_entries(kind, 60))
    return digest


def lookups(sidecar: Sidecar, name: str, digest: str) -> list[routing_pb.RouteResponse]:
    """Two near and two far tokens, twice, in layer 0; three in the empty layer 1, one in layer 2, which is off."""
    rng = np.random.default_rng(1)
    keys = tensors.to_array(exported(sidecar, name, 0)[0].keys)[:2]
    near_and_far = np.concatenate([keys, FAR + random_keys(rng, 2)])
    inputs = {0: [near_and_far] * 2, 1: [random_keys(rng, 3)], 2: [random_keys(rng, 1)]}
    return [
        sidecar.route(
            route_request(name, digest, each, random_keys(rng, len(each), EXPERTS), layer=layer)
        )
        for layer, many in inputs.items()
        for each in many
    ]


def test_tokens_are_counted_by_lambda_and_by_why_they_abstained(
    sidecar: Sidecar, name: str
) -> None:
    replies = lookups(sidecar, name, fill(sidecar, name))
    [memory] = stats(sidecar, name).memories
    near, empty, off = memory.layers
    lambdas = np.concatenate([tensors.to_array(reply.lambdas) for reply in replies[:2]])
    ranges = np.minimum(lambdas[lambdas > 0] * 20, 19).astype(int)
    assert list(near.lambda_counts) == np.bincount(ranges, minlength=20).tolist()
    assert (near.tokens, near.tokens_abstained, near.abstained_too_far) == (8, 4, 4)
    assert (empty.tokens_abstained, empty.abstained_empty) == (3, 3)
    assert (off.tokens_abstained, off.abstained_layer_off) == (1, 1)
    assert not any(off.lambda_counts)


def test_every_stage_of_every_lookup_is_counted(sidecar: Sidecar, name: str) -> None:
    replies = lookups(sidecar, name, fill(sidecar, name))
    found = stats(sidecar, name)
    assert list(found.duration_bounds_s) == sorted(found.duration_bounds_s)
    stages = {each.stage: each for each in found.memories[0].stages}
    assert list(stages) == ["decode", "search", "blend", "encode", "total"]
    for stage, each in stages.items():
        assert len(each.counts) == len(found.duration_bounds_s) + 1
        assert sum(each.counts) == len(replies)
        if stage != "total":
            seconds = [getattr(reply.times, f"{stage}_ns") / 1e9 for reply in replies]
            assert each.sum_s == pytest.approx(sum(seconds))
            bounds = np.searchsorted(list(found.duration_bounds_s), seconds)
            assert list(each.counts) == np.bincount(bounds, minlength=len(each.counts)).tolist()
    assert stages["total"].sum_s == pytest.approx(
        sum(each.sum_s for stage, each in stages.items() if stage != "total")
    )


def test_refused_lookups_are_counted_by_reason(sidecar: Sidecar, name: str) -> None:
    digest = fill(sidecar, name)
    before = dict(stats(sidecar).refused_lookups)
    rng = np.random.default_rng(0)
    good = route_request(name, digest, random_keys(rng, 1), random_keys(rng, 1, EXPERTS))
    for memory in ("nobody", "nobody-either"):
        request = routing_pb.RouteRequest()
        request.CopyFrom(good)
        request.memory = memory
        refusal(sidecar.routing.Route, request)
    refusal(lambda request, timeout: sidecar.routing.RouteStream(iter([request])), request)
    sidecar.route(good)
    after = dict(stats(sidecar).refused_lookups)
    assert after.pop("memory_not_found") == before.pop("memory_not_found", 0) + 3
    assert after == before


def test_replicas_are_known_by_their_version(sidecar: Sidecar, name: str) -> None:
    fill(sidecar, name)
    assert not stats(sidecar, name).replicas
    with ReplicationClient(sidecar.target, name, make_fingerprint()) as client:
        for message in client.replicate(heartbeat_ms=20):
            replicas = stats(sidecar, name).replicas
            if replicas and message.HasField("synced") and replicas[0].version:
                break
    [replica] = replicas
    version = sidecar.describe(name).version
    assert (replica.memory, replica.version, replica.memory_version) == (name, version, version)


def explain(
    sidecar: Sidecar, name: str, number: int, **fields: Any
) -> admin_pb.ExplainEntryRequest:
    return admin_pb.ExplainEntryRequest(memory=name, layer=0, id=number, **fields)


@pytest.mark.parametrize("kind", [LOGIT_DELTA, ASSIGNMENT])
def test_an_entry_is_explained_by_the_entries_of_other_examples(
    sidecar: Sidecar, name: str, kind: int
) -> None:
    digest = fill(sidecar, name, kind, neighbours=2, min_lambda=0.0)
    [stored] = exported(sidecar, name, 0)
    number, origin = int(tensors.to_array(stored.ids)[3]), stored.provenance[3]
    before = stats(sidecar, name).memories
    request = explain(sidecar, name, number, neighbours=5)
    found = sidecar.admin.ExplainEntry(request, timeout=CALL_TIMEOUT_S)
    assert stats(sidecar, name).memories == before  # counted nowhere
    assert (found.provenance, found.neighbours) == (origin, 2)
    rng = np.random.default_rng(0)
    own = random_keys(rng, 1, EXPERTS) if kind == LOGIT_DELTA else random_assignments(rng, 1)
    excluded = [routing_pb.ExampleRef(source=origin.source, example=origin.example)]
    key = tensors.to_array(stored.keys)[[3]]
    lookup = route_request(name, digest, key, own, with_neighbours=True, exclude=excluded)
    reply = sidecar.route(lookup)
    ids = tensors.to_array(reply.neighbours.ids)[0].tolist()
    assert [case.id for case in found.token.cases][:2] == ids
    assert len(found.token.cases) == 5
    assert getattr(found.token, "lambda") == tensors.to_array(reply.lambdas)[0]
    for case in found.token.cases:
        assert case.provenance.example != origin.example
        assert len(case.experts) == len(case.weights) == TOP_K
    row = tensors.to_array(stored.ids).tolist().index(ids[0])
    if kind == LOGIT_DELTA:
        value = tensors.to_array(stored.logit_deltas)[row]
        assert list(found.token.cases[0].experts) == np.argsort(-abs(value))[:TOP_K].tolist()
    else:
        experts = tensors.to_array(stored.assignments.experts)[row].tolist()
        assert sorted(found.token.cases[0].experts) == sorted(experts)


def test_what_is_no_entry_is_not_explained(sidecar: Sidecar, name: str) -> None:
    fill(sidecar, name)
    for number in (12345, 2**63, 2**64 - 1):
        error = refusal(sidecar.admin.ExplainEntry, explain(sidecar, name, number))
        assert error.reason == "ERROR_REASON_INVALID_FIELD"
        assert str(number) in str(error)
    error = refusal(sidecar.admin.ExplainEntry, explain(sidecar, name, 1, neighbours=1025))
    assert "neighbours: got 1025" in str(error)


def test_recent_lookups_are_kept_once_somebody_looks(sidecar: Sidecar, name: str) -> None:
    digest = fill(sidecar, name)
    request = admin_pb.RecentLookupsRequest(memory=name, layer=0)

    def recent() -> list[admin_pb.LookedUpToken]:
        return list(sidecar.admin.RecentLookups(request, timeout=CALL_TIMEOUT_S).tokens)

    lookups(sidecar, name, digest)
    assert recent() == []  # nobody has looked
    began_ms = time.time() * 1000
    for _ in range(9):
        replies = lookups(sidecar, name, digest)
    found = recent()
    assert len(found) == 16
    assert [token.abstained for token in found] == [routing_pb.ABSTAIN_REASON_TOO_FAR] * 16
    assert found[0].tokens == 4
    assert began_ms - 1 <= found[0].at_unix_ms <= time.time() * 1000 + 1
    [stored] = exported(sidecar, name, 0)
    key = tensors.to_array(stored.keys)[[7]]
    own = random_keys(np.random.default_rng(0), 1, EXPERTS)
    replies = [sidecar.route(route_request(name, digest, key, own))]
    newest = recent()[0]
    assert getattr(newest, "lambda") == tensors.to_array(replies[0].lambdas)[0] > 0
    assert newest.cases[0].id == tensors.to_array(stored.ids)[7]
    assert newest.cases[0].provenance == stored.provenance[7]


def test_a_sample_of_a_layer_is_exported(sidecar: Sidecar, name: str) -> None:
    fill(sidecar, name)
    [every] = exported(sidecar, name, 0)
    ids = set(tensors.to_array(every.ids).tolist())
    for sample, expected in ((20, 20), (1000, 60)):
        request = admin_pb.ExportRequest(memory=name, layer=0, sample=sample, batch_size=8)
        parts = [part.entries for part in sidecar.admin.Export(request, timeout=CALL_TIMEOUT_S)]
        found = [number for part in parts for number in tensors.to_array(part.ids).tolist()]
        assert len(found) == len(set(found)) == expected
        assert set(found) <= ids
        assert all(len(part.provenance) == len(part.ids.data) // 8 <= 8 for part in parts)
    error = refusal(sidecar.admin.Export, admin_pb.ExportRequest(memory=name, sample=10_001))
    assert "sample: got 10001, expected 0 to 10000" in str(error)

"""Delete and Prune on each backend: what goes, what stays, what is refused; hits that routing leaves behind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from grpc import StatusCode
from knnmoe import tensors
from knnmoe.client import ReplicationClient
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import operations_pb2 as operations_pb
from knnmoe.v1 import replication_pb2, retention_pb2_grpc, types_pb2
from knnmoe.v1 import retention_pb2 as pb

from tests.integration.refusals import INVALID, PRECONDITION, Case, Memories, assert_refused
from tests.sidecar import (
    ASSIGNMENT,
    CALL_TIMEOUT_S,
    EXPERTS,
    LOGIT_DELTA,
    Sidecar,
    exported,
    make_fingerprint,
    random_entries,
    random_keys,
    refusal,
    route_request,
)


def _retention(sidecar: Sidecar) -> retention_pb2_grpc.RetentionServiceStub:
    return retention_pb2_grpc.RetentionServiceStub(sidecar.channel)


def _delete(sidecar: Sidecar, name: str, **fields: Any) -> pb.DeleteResponse:
    request = pb.DeleteRequest(memory=name, **fields)
    return _retention(sidecar).Delete(request, timeout=CALL_TIMEOUT_S)


def _prune(
    sidecar: Sidecar, name: str, *, dry_run: bool = False, **plan: Any
) -> list[pb.PruneResponse]:
    request = pb.PruneRequest(memory=name, plan=pb.PrunePlan(**plan), dry_run=dry_run)
    return list(_retention(sidecar).Prune(request, timeout=CALL_TIMEOUT_S))


def _layers(replies: Iterable[pb.PruneResponse]) -> list[pb.LayerPruning]:
    return [reply.layer for reply in replies if reply.HasField("layer")]


def _counts(sidecar: Sidecar, name: str) -> list[int]:
    return [layer.entries for layer in sidecar.describe(name).layers]


def _ids(*numbers: int) -> types_pb2.Tensor:
    return tensors.to_tensor(np.array(numbers, np.uint64))


@pytest.fixture
def filled(sidecar: Sidecar, name: str) -> str:
    """60 entries in layer 0, 20 in layer 2."""
    sidecar.create(name, kind=LOGIT_DELTA, gamma=[0.05])
    sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, 60))
    sidecar.upsert(name, 2, random_entries(LOGIT_DELTA, 20, seed=2, first_id=100))
    return name


def test_delete_by_id(sidecar: Sidecar, filled: str) -> None:
    [entries] = exported(sidecar, filled, 0)
    gone = tensors.to_array(entries.ids)[[3, 7]]
    reply = _delete(sidecar, filled, ids=_ids(*gone.tolist(), 123))
    assert [(one.layer, one.deleted, one.entries) for one in reply.layers] == [
        (0, 2, 60),
        (1, 0, 0),
        (2, 0, 20),
    ]
    assert reply.deleted == 2
    [left] = exported(sidecar, filled, 0)
    assert not np.isin(gone, tensors.to_array(left.ids)).any()
    assert _counts(sidecar, filled) == [58, 0, 20]


def test_delete_a_document(sidecar: Sidecar, filled: str) -> None:
    where = pb.EntryFilter(source="text-0", example="example-2")
    fsync = admin_pb.DURABILITY_FSYNC
    assert _delete(sidecar, filled, filter=where, dry_run=True).deleted == 8
    assert _counts(sidecar, filled) == [60, 0, 20]
    assert _delete(sidecar, filled, filter=where, layer=2, durability=fsync).deleted == 2
    assert _delete(sidecar, filled, filter=where).deleted == 6
    for entries in (*exported(sidecar, filled, 0), *exported(sidecar, filled, 2)):
        for origin in entries.provenance:
            assert (origin.source, origin.example) != ("text-0", "example-2")


def test_sources(sidecar: Sidecar, filled: str) -> None:
    [asked] = exported(sidecar, filled, 0)
    digest, nearest = sidecar.describe(filled).model_digest, tensors.to_array(asked.keys)[:6]
    own = np.zeros((6, EXPERTS), np.float32)
    sidecar.routing.Route(route_request(filled, digest, nearest, own, neighbours=1))
    late = random_entries(LOGIT_DELTA, 2, seed=3, first_id=500)
    for origin in late.provenance:
        origin.source, origin.created_unix_ms = "späte Texte/3", 1_700_000_000_000 + origin.position
    sidecar.upsert(filled, 1, late)

    replies = list(sidecar.admin.ListSources(admin_pb.ListSourcesRequest(memory=filled)))
    [found] = [reply.page for reply in replies if reply.HasField("page")]
    by_name = {one.source: one for one in found.sources}
    assert list(by_name) == sorted(by_name) == ["späte Texte/3", "text-0", "text-1"]
    assert [(one.entries, one.examples) for one in found.sources] == [(2, 2), (40, 5), (40, 5)]
    of_hits = [sum(origin.source == name for origin in asked.provenance[:6]) for name in by_name]
    assert [one.hits for one in found.sources] == of_hits
    assert sum(of_hits) == 6
    times = by_name["späte Texte/3"]
    assert (times.first_unix_ms, times.last_unix_ms) == (1_700_000_000_000, 1_700_000_000_001)
    assert 0 < by_name["text-0"].first_unix_ms <= by_name["text-0"].last_unix_ms
    assert (replies[-1].operation.kind, replies[-1].operation.done) == ("sources", 82)

    request = admin_pb.ListSourcesRequest(memory=filled, layers=[1, 1])
    [only] = [each.page for each in sidecar.admin.ListSources(request) if each.HasField("page")]
    assert [one.source for one in only.sources] == ["späte Texte/3"]


def test_prune_says_what_it_did(sidecar: Sidecar, filled: str) -> None:
    before = sidecar.describe(filled)
    dry = _layers(_prune(sidecar, filled, dry_run=True, max_share=0.5, by=pb.PRUNE_RANKING_GAIN))
    assert sidecar.describe(filled) == before
    assert [(one.layer, one.entries, one.dropped, one.kept) for one in dry] == [
        (0, 60, 30, 30),
        (1, 0, 0, 0),
        (2, 20, 10, 10),
    ]
    assert [one.deleted for one in dry] == [0, 0, 0]
    assert dry[0].reasons == {"max_entries_by_gain": 30}
    assert dry[0].bytes_estimate > 0
    assert dry[0].expected_effect["queries"] == 60
    replies = _prune(sidecar, filled, max_share=0.5, by=pb.PRUNE_RANKING_GAIN)
    assert [one.deleted for one in _layers(replies)] == [30, 0, 10]
    assert _counts(sidecar, filled) == [30, 0, 10]
    first, last = replies[0].operation, replies[-1].operation
    assert first.id == last.id
    assert (first.state, last.state) == (
        operations_pb.OPERATION_STATE_RUNNING,
        operations_pb.OPERATION_STATE_DONE,
    )
    assert (last.kind, last.memory) == ("prune", filled)


def test_policies_combine(sidecar: Sidecar, filled: str) -> None:
    forget = [pb.EntryFilter(source="text-1"), pb.EntryFilter(source="text-0", example="example-0")]
    [first, _, _] = _layers(
        _prune(
            sidecar,
            filled,
            forget=forget,
            near_duplicate_similarity=0.99,
            max_entries=20,
            by=pb.PRUNE_RANKING_RANDOM,
            seed=3,
        )
    )
    assert first.reasons == {"forget": 36, "near_duplicates": 0, "max_entries_by_random": 4}
    assert first.deleted == 40
    kept = [origin for part in exported(sidecar, filled, 0) for origin in part.provenance]
    assert {(one.source, one.example) for one in kept} <= {
        ("text-0", f"example-{n}") for n in (2, 4, 6, 8)
    }


def test_hits_of_routing_decide(sidecar: Sidecar, filled: str) -> None:
    """Three tokens exactly on three keys, whose neighbours are too far to count."""
    [entries] = exported(sidecar, filled, 0)
    keys, ids = tensors.to_array(entries.keys), tensors.to_array(entries.ids)
    gamma = admin_pb.UpdateSettingsRequest(
        memory=filled, settings=types_pb2.MemorySettings(gamma=[50.0])
    )
    digest = sidecar.admin.UpdateSettings(gamma, timeout=CALL_TIMEOUT_S).memory.model_digest
    own = random_keys(np.random.default_rng(0), 4, EXPERTS)
    far = np.full((1, keys.shape[1]), 100, np.float32)
    inputs = np.concatenate([keys[[1, 4, 9]], far])
    for _ in range(2):
        sidecar.route(route_request(filled, digest, inputs, own))
    stats = sidecar.admin.Stats(admin_pb.StatsRequest(memory=filled), timeout=CALL_TIMEOUT_S)
    [layer, _, _] = stats.memories[0].layers
    assert (layer.hits, layer.entries_never_hit) == (6, 57)
    _prune(sidecar, filled, unused_below=1)
    [left] = exported(sidecar, filled, 0)
    assert tensors.to_array(left.ids).tolist() == ids[[1, 4, 9]].tolist()
    _delete(sidecar, filled, ids=_ids(int(ids[1])))
    stats = sidecar.admin.Stats(admin_pb.StatsRequest(memory=filled), timeout=CALL_TIMEOUT_S)
    assert (stats.memories[0].layers[0].hits, stats.memories[0].layers[0].entries_never_hit) == (
        4,
        0,
    )


def test_hits_that_copies_report_decide(sidecar: Sidecar, filled: str) -> None:
    """One that comes twice counts once; of a layer without any, one entry stays (keep_at_least)."""
    [entries] = exported(sidecar, filled, 2)
    ids = tensors.to_array(entries.ids)
    digest = sidecar.describe(filled).model_digest
    with ReplicationClient(sidecar.target, filled, make_fingerprint()) as client:
        for number, rows in ((1, [1, 4]), (1, [1, 4]), (2, [4, 9])):
            found = {"ids": _ids(*ids[rows].tolist()), "hits": _ids(1, 2)}
            hits = replication_pb2.LayerHits(layer=2, lookups=1, tokens=2, **found)
            client.report_hits(digest, [hits], number)
    _prune(sidecar, filled, unused_below=2)
    [left] = exported(sidecar, filled, 2)
    assert tensors.to_array(left.ids).tolist() == sorted(ids[[4, 9]].tolist())
    assert _counts(sidecar, filled) == [1, 0, 2]


def test_new_entries_are_spared_for_lack_of_use(sidecar: Sidecar, filled: str) -> None:
    done = _layers(_prune(sidecar, filled, unused_below=1, spare_newer_than_unix_ms=1))
    assert [one.deleted for one in done] == [0, 0, 0]


DELETIONS: dict[str, tuple[dict[str, Any], StatusCode, str, tuple[str, ...]]] = {
    "nothing": ({}, INVALID, "INVALID_FIELD", ("what: got 'nothing'",)),
    "no source": ({"filter": pb.EntryFilter()}, INVALID, "INVALID_FIELD", ("filter.source",)),
    "long source": ({"filter": pb.EntryFilter(source="x" * 2000)}, INVALID, "INVALID_FIELD", ("2000 characters",)),
    "large id": ({"ids": _ids(2**63)}, INVALID, "INVALID_FIELD", ("ids[0]", "below 2^63")),
    "id twice": ({"ids": _ids(4, 4)}, INVALID, "INVALID_FIELD", ("ids[1]", "each id once")),
    "ids of f32": ({"ids": tensors.to_tensor(np.ones(2, np.float32))}, INVALID, "INVALID_TENSOR", ("dtype f32",)),
    "layer 3": ({"ids": _ids(1), "layer": 3}, PRECONDITION, "LAYER_NOT_FOUND", ("got 3",)),
    "durability": ({"ids": _ids(1), "durability": 9}, INVALID, "INVALID_FIELD", ("durability: got 9",)),
}  # fmt: skip


@pytest.mark.parametrize("bad", DELETIONS.values(), ids=list(DELETIONS))
def test_deletions_that_are_refused(memories: Memories, bad: Any) -> None:
    fields, code, reason, words = bad
    request = pb.DeleteRequest(memory="deltas", **fields)
    error = refusal(_retention(memories.sidecar).Delete, request)
    assert_refused(error, Case(print, code, reason, words))


PLANS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "nothing": ({}, ("plan.policies: got 0", "at least one policy")),
    "NaN": ({"gain_below": float("nan")}, ("plan.gain_below: got nan",)),
    "size without ranking": ({"max_entries": 4}, ("plan.by: got 'nothing'",)),
    "size 0": ({"max_entries": 0, "by": pb.PRUNE_RANKING_AGE}, ("plan.max_entries: got 0",)),
    "size below least": (
        {"max_entries": 4, "by": pb.PRUNE_RANKING_AGE, "keep_at_least": 5},
        ("plan.max_entries: got 4", "5 or more"),
    ),
    "forget all": (
        {"forget": [pb.EntryFilter(source="text-0"), pb.EntryFilter(source="text-1")]},
        ("plan.keep_at_least: got 1",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", PLANS.values(), ids=list(PLANS))
def test_plans_that_are_refused(memories: Memories, bad: Any) -> None:
    plan, words = bad
    request = pb.PruneRequest(memory="deltas", plan=pb.PrunePlan(**plan))
    error = refusal(_retention(memories.sidecar).Prune, request)
    assert_refused(error, Case(print, INVALID, "INVALID_FIELD", words))


def test_an_overlap_is_not_negative(memories: Memories) -> None:
    plan = pb.PrunePlan(agreement_below=-0.5)
    request = pb.PruneRequest(memory="assignments", plan=plan)
    error = refusal(_retention(memories.sidecar).Prune, request)
    words = ("below: got -0.5", "in [0, 1]")
    assert_refused(error, Case(print, INVALID, "INVALID_FIELD", words))


def test_missing_memories_and_layers(memories: Memories) -> None:
    stub, plan = _retention(memories.sidecar), pb.PrunePlan(gain_below=0)
    missing = Case(print, StatusCode.NOT_FOUND, "MEMORY_NOT_FOUND", ("'nope'",))
    assert_refused(refusal(stub.Delete, pb.DeleteRequest(memory="nope", ids=_ids(1))), missing)
    assert_refused(refusal(stub.Prune, pb.PruneRequest(memory="nope", plan=plan)), missing)
    layer = Case(print, PRECONDITION, "LAYER_NOT_FOUND", ("got 7",))
    request = pb.PruneRequest(memory="deltas", plan=plan, layers=[0, 7])
    assert_refused(refusal(stub.Prune, request), layer)


def test_assignments_are_pruned_too(sidecar: Sidecar, name: str) -> None:
    sidecar.create(name, kind=ASSIGNMENT, gamma=[0.05])
    sidecar.upsert(name, 0, random_entries(ASSIGNMENT, 40))
    plan = {"max_entries": 15, "by": pb.PRUNE_RANKING_COVERAGE, "agreement_below": 0.05}
    _prune(sidecar, name, **plan)
    assert _counts(sidecar, name)[0] <= 15

"""Entries that cannot be written get a clear error and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from grpc import StatusCode
from knnmoe import tensors
from knnmoe.v1 import memory_admin_pb2 as admin_pb

from tests.integration.refusals import (
    INVALID,
    PRECONDITION,
    Case,
    Memories,
    assert_refused,
    params,
    set_fields,
    spoil,
)
from tests.sidecar import (
    ASSIGNMENT,
    CALL_TIMEOUT_S,
    COSINE,
    EXPERTS,
    HIDDEN,
    LAYERS,
    LOGIT_DELTA,
    Sidecar,
    floats,
    random_assignments,
    random_entries,
    refusal,
)


def _ids(*numbers: int) -> Callable[[admin_pb.UpsertRequest], None]:
    return lambda r: r.entries.ids.CopyFrom(tensors.to_tensor(np.array(numbers, np.uint64)))


def _entries(change: Callable[[Any], object]) -> Callable[[admin_pb.UpsertRequest], object]:
    return lambda request: change(request.entries)


UPSERTS = {
    "layer": Case(set_fields(layer=LAYERS), PRECONDITION, "LAYER_NOT_FOUND", ("layer", "got 3", "0 to 2")),
    "memory": Case(set_fields(memory="nope"), StatusCode.NOT_FOUND, "MEMORY_NOT_FOUND", ("'nope'",)),
    "digest": Case(set_fields(model_digest="0" * 16), PRECONDITION, "MODEL_MISMATCH", ("model_digest", "0000")),
    "durability 7": Case(set_fields(durability=7), INVALID, "INVALID_FIELD", ("durability", "got 7", "FSYNC")),
    "id 2^63": Case(_ids(1, 2, 2**63, 4), INVALID, "INVALID_FIELD", ("entries.ids[2]", str(2**63), "below 2^63")),
    "id 2^64-1": Case(_ids(1, 2**64 - 1, 3, 4), INVALID, "INVALID_FIELD", ("entries.ids[1]", str(2**64 - 1))),
    "same id": Case(_ids(1, 2, 3, 2), INVALID, "INVALID_FIELD", ("entries.ids[3]", "got 2", "once")),
    "fewer ids": Case(_ids(1, 2), INVALID, "INVALID_TENSOR", ("entries.ids", "[2]", "[4]")),
    "scalar id": Case(
        _entries(lambda e: e.ids.CopyFrom(tensors.to_tensor(np.array(1, np.uint64)))),
        INVALID, "INVALID_TENSOR", ("entries.ids", "shape []"),
    ),
    "ids f32": Case(
        _entries(lambda e: e.ids.CopyFrom(floats(np.zeros(4)))),
        INVALID, "INVALID_TENSOR", ("entries.ids", "f32", "u64"),
    ),
    "no entries": Case(_entries(lambda e: e.Clear()), INVALID, "INVALID_TENSOR", ("entries.ids", "unspecified", "u64")),
    "0 entries": Case(
        _entries(lambda e: (e.ids.CopyFrom(tensors.to_tensor(np.zeros(0, np.uint64))),
                            e.keys.CopyFrom(floats(np.zeros((0, HIDDEN)))),
                            e.logit_deltas.CopyFrom(floats(np.zeros((0, EXPERTS)))), e.ClearField("provenance"))),
        INVALID, "INVALID_TENSOR", ("entries.keys", "[0, 16]"),
    ),
    "NaN key": Case(_entries(spoil(np.nan, "keys")), INVALID, "NOT_FINITE", ("entries.keys[2][3]", "nan")),
    "Inf delta": Case(
        _entries(spoil(np.inf, "logit_deltas")), INVALID, "NOT_FINITE", ("entries.logit_deltas[2][3]", "inf")
    ),
    "narrow key": Case(
        _entries(lambda e: e.keys.CopyFrom(floats(np.zeros((4, 15))))),
        PRECONDITION, "MODEL_MISMATCH", ("entries.keys", "[4, 15]", "hidden_size"),
    ),
    "wide delta": Case(
        _entries(lambda e: e.logit_deltas.CopyFrom(floats(np.zeros((4, 9))))),
        PRECONDITION, "MODEL_MISMATCH", ("entries.logit_deltas", "[4, 9]", "num_experts"),
    ),
    "scalar delta": Case(
        _entries(lambda e: e.logit_deltas.CopyFrom(floats(np.zeros(())))),
        INVALID, "INVALID_TENSOR", ("entries.logit_deltas", "shape []"),
    ),
    "no values": Case(
        _entries(lambda e: e.ClearField("logit_deltas")), INVALID, "INVALID_FIELD", ("entries.values", "nothing")
    ),
    "kind": Case(
        _entries(lambda e: e.assignments.CopyFrom(random_assignments(np.random.default_rng(0), 4).message())),
        INVALID, "INVALID_FIELD", ("entries.values", "assignments", "logit_deltas"),
    ),
    "provenance of 1": Case(
        _entries(lambda e: e.provenance.pop()), INVALID, "INVALID_FIELD", ("entries.provenance", "got 3", "none or 4")
    ),
    "long source": Case(
        _entries(lambda e: setattr(e.provenance[1], "source", "x" * 2000)),
        INVALID, "INVALID_FIELD", ("entries.provenance[1].source", "2000 characters", "1024"),
    ),
    "NUL": Case(
        _entries(lambda e: setattr(e.provenance[1], "example", "a\0b")),
        INVALID, "INVALID_FIELD", ("entries.provenance[1].example", "a\\x00b", "NUL"),
    ),
    "NaN gain": Case(
        _entries(lambda e: setattr(e.provenance[1], "gain", np.nan)),
        INVALID, "NOT_FINITE", ("entries.provenance[1].gain", "nan"),
    ),
}  # fmt: skip


@params(UPSERTS)
def test_upsert(memories: Memories, case: Case) -> None:
    request = memories.upsert()
    case.change(request)
    assert_refused(refusal(memories.sidecar.admin.Upsert, iter([request])), case)


@pytest.mark.parametrize("expert", [-1, EXPERTS, 2**31 - 1, -(2**31)])
def test_upsert_of_an_expert_that_is_not_there(memories: Memories, expert: int) -> None:
    request = memories.upsert(ASSIGNMENT)
    experts = tensors.to_array(request.entries.assignments.experts).copy()
    experts[1, 1] = expert
    request.entries.assignments.experts.CopyFrom(tensors.to_tensor(experts))
    error = refusal(memories.sidecar.admin.Upsert, iter([request]))
    words = ("entries.assignments.experts[1][1]", "0 to 7")
    assert_refused(error, Case(print, INVALID, "INVALID_FIELD", words))


def test_a_zero_key_has_no_direction(sidecar: Sidecar, memories: Memories, name: str) -> None:
    digest = sidecar.create(name, kind=LOGIT_DELTA, similarity=COSINE)
    entries = random_entries(LOGIT_DELTA, 2)
    entries.keys.CopyFrom(floats(np.zeros((2, HIDDEN))))
    request = admin_pb.UpsertRequest(memory=name, entries=entries, model_digest=digest)
    error = refusal(sidecar.admin.Upsert, iter([request]))
    assert_refused(error, Case(print, INVALID, "INVALID_FIELD", ("keys[0]", "zero")))
    sidecar.admin.DeleteMemory(admin_pb.DeleteMemoryRequest(memory=name), timeout=CALL_TIMEOUT_S)

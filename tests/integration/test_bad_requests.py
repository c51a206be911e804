"""A lookup that cannot be served gets a clear error, changes nothing, and the service goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import StatusCode
from knnmoe.client import service_error
from knnmoe.v1 import routing_pb2 as routing_pb
from knnmoe.v1 import types_pb2 as types_pb

from tests.integration.refusals import (
    INVALID,
    PRECONDITION,
    TOKENS,
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
    EXPERTS,
    HIDDEN,
    TOP_K,
    Assignments,
    floats,
    make_fingerprint,
    random_assignments,
    refusal,
    route_request,
)


def _inputs(array: Any) -> Callable[[routing_pb.RouteRequest], None]:
    return lambda request: request.router_inputs.CopyFrom(floats(np.asarray(array)))


def _tensor(**fields: Any) -> Callable[[routing_pb.RouteRequest], None]:
    def change(request: routing_pb.RouteRequest) -> None:
        for name, value in fields.items():
            if name == "shape":
                request.router_inputs.shape[:] = value
            else:
                setattr(request.router_inputs, name, value)

    return change


WIDE = np.zeros((TOKENS, HIDDEN + 1), np.float32)

ROUTES = {
    "wrong dimension": Case(_inputs(WIDE), PRECONDITION, "MODEL_MISMATCH", ("router_inputs", "[4, 17]", "16")),
    "NaN": Case(spoil(np.nan), INVALID, "NOT_FINITE", ("router_inputs[2][3]", "nan", "finite")),
    "Inf": Case(spoil(np.inf), INVALID, "NOT_FINITE", ("router_inputs[2][3]", "inf", "finite")),
    "-Inf": Case(spoil(-np.inf), INVALID, "NOT_FINITE", ("router_inputs[2][3]", "-inf", "finite")),
    "square overflows": Case(spoil(1e20), INVALID, "NOT_FINITE", ("router_inputs[2][3]", "1.0", "squared norm")),
    "NaN logits": Case(spoil(np.nan, "router_logits"), INVALID, "NOT_FINITE", ("router_logits[2][3]", "nan")),
    "layer 3 of 3": Case(set_fields(layer=3), PRECONDITION, "LAYER_NOT_FOUND", ("layer", "got 3", "0 to 2")),
    "layer 2^32-1": Case(set_fields(layer=2**32 - 1), PRECONDITION, "LAYER_NOT_FOUND", ("4294967295", "0 to 2")),
    "other model": Case(
        set_fields(model_digest="0" * 16), PRECONDITION, "MODEL_MISMATCH", ("model_digest", "0000", "Describe")
    ),
    "no digest": Case(set_fields(model_digest=""), PRECONDITION, "MODEL_MISMATCH", ("model_digest", "''")),
    "no memory": Case(set_fields(memory="nope"), StatusCode.NOT_FOUND, "MEMORY_NOT_FOUND", ("'nope'", "has: ")),
    "empty name": Case(set_fields(memory=""), StatusCode.NOT_FOUND, "MEMORY_NOT_FOUND", ("''",)),
    "byte count": Case(
        _tensor(data=b"123"), INVALID, "INVALID_TENSOR", ("router_inputs", "3 bytes", "expected 256", "[4, 16]")
    ),
    "no bytes": Case(_tensor(data=b""), INVALID, "INVALID_TENSOR", ("router_inputs", "0 bytes", "256")),
    "dtype i32": Case(
        _tensor(dtype=types_pb.DTYPE_I32), INVALID, "INVALID_TENSOR", ("router_inputs", "dtype i32", "f32, f16, bf16")
    ),
    "dtype 99": Case(_tensor(dtype=99), INVALID, "INVALID_TENSOR", ("router_inputs", "unknown(99)", "f32")),
    "no dtype": Case(_tensor(dtype=0), INVALID, "INVALID_TENSOR", ("router_inputs", "unspecified", "f32")),
    "scalar": Case(_inputs(1.0), INVALID, "INVALID_TENSOR", ("router_inputs", "shape []", "16")),
    "vector": Case(_inputs(np.zeros(HIDDEN)), INVALID, "INVALID_TENSOR", ("router_inputs", "[16]", "16]")),
    "cube": Case(_inputs(np.zeros((2, 2, HIDDEN))), INVALID, "INVALID_TENSOR", ("router_inputs", "[2, 2, 16]")),
    "70 dimensions": Case(
        _tensor(shape=[1] * 70), INVALID, "INVALID_TENSOR", ("router_inputs", "70 dimensions", "at most 4")
    ),
    "huge and empty": Case(
        _tensor(shape=[0, *[2**32 - 1] * 3], data=b""), INVALID, "INVALID_TENSOR", ("router_inputs", "4294967295")
    ),
    "T = 0": Case(_inputs(np.zeros((0, HIDDEN))), INVALID, "INVALID_TENSOR", ("router_inputs", "[0, 16]", "T >= 1")),
    "fewer logits than tokens": Case(
        lambda r: r.router_logits.CopyFrom(floats(np.zeros((3, EXPERTS)))),
        INVALID, "INVALID_TENSOR", ("router_logits", "[3, 8]", "[4, 8]"),
    ),
    "experts of another model": Case(
        lambda r: r.router_logits.CopyFrom(floats(np.zeros((TOKENS, 9)))),
        PRECONDITION, "MODEL_MISMATCH", ("router_logits", "[4, 9]", "num_experts"),
    ),
    "K = 0": Case(set_fields(neighbours=0), INVALID, "INVALID_FIELD", ("neighbours", "got 0", "1 to 1024")),
    "K = 2^31": Case(set_fields(neighbours=2**31), INVALID, "INVALID_FIELD", ("neighbours", "2147483648", "1 to 1024")),
    "exclude 2 of 4": Case(
        lambda r: r.exclude.extend([routing_pb.ExampleRef(source="a")] * 2),
        INVALID, "INVALID_FIELD", ("exclude", "got 2", "1, or 4"),
    ),
    "no own routing": Case(
        lambda r: r.ClearField("router_logits"), INVALID, "INVALID_FIELD", ("own", "nothing", "router_logits")
    ),
    "kind": Case(
        lambda r: r.assignment.CopyFrom(random_assignments(np.random.default_rng(0), TOKENS).message()),
        PRECONDITION, "KIND_MISMATCH", ("assignment", "router_logits", "'deltas'"),
    ),
    "nothing set": Case(lambda r: r.Clear(), StatusCode.NOT_FOUND, "MEMORY_NOT_FOUND", ("''",)),
}  # fmt: skip


def _own(experts: Any = None, weights: Any = None) -> Callable[[routing_pb.RouteRequest], None]:
    def change(request: routing_pb.RouteRequest) -> None:
        own = random_assignments(np.random.default_rng(1), TOKENS)
        changed = Assignments(
            own.experts if experts is None else np.asarray(experts, np.int32),
            own.weights if weights is None else np.asarray(weights, np.float32),
        )
        request.assignment.CopyFrom(changed.message())

    return change


def _rows(value: float) -> list[list[float]]:
    return [[0.5, 0.5], [0.5, value], [0.5, 0.5], [0.5, 0.5]]


OWN_ASSIGNMENTS = {
    "expert 8 of 8": Case(
        _own(experts=_rows(8)), INVALID, "INVALID_FIELD", ("assignment.experts[1][1]", "got 8", "0 to 7")
    ),
    "expert -1": Case(_own(experts=_rows(-1)), INVALID, "INVALID_FIELD", ("assignment.experts[1][1]", "-1", "0 to 7")),
    "weight -0.5": Case(
        _own(weights=_rows(-0.5)), INVALID, "INVALID_FIELD", ("assignment.weights[1][1]", "-0.5", "0 or more")
    ),
    "weight NaN": Case(_own(weights=_rows(np.nan)), INVALID, "NOT_FINITE", ("assignment.weights[1][1]", "nan")),
    "weights all 0": Case(
        _own(weights=np.zeros((TOKENS, TOP_K))), INVALID, "INVALID_FIELD", ("weights[0]", "all zero", "above 0")
    ),
    "shapes differ": Case(
        _own(weights=np.ones((TOKENS, 3))), INVALID, "INVALID_TENSOR", ("assignment.weights", "[4, 3]", "[4, 2]")
    ),
    "top-3": Case(
        _own(np.zeros((TOKENS, 3)), np.ones((TOKENS, 3))), PRECONDITION, "MODEL_MISMATCH", ("[4, 3]", "[4, 2]", "top_k")
    ),
    "one token too few": Case(
        _own(np.zeros((3, 2)), np.ones((3, 2))), INVALID, "INVALID_TENSOR", ("assignment.experts", "[3, 2]", "[4, 2]")
    ),
    "scalar": Case(_own(np.zeros(()), np.ones(())), INVALID, "INVALID_TENSOR", ("assignment.experts", "shape []")),
    "kind": Case(
        lambda r: r.router_logits.CopyFrom(floats(np.zeros((TOKENS, EXPERTS)))),
        PRECONDITION, "KIND_MISMATCH", ("router_logits", "expected assignment", "'assignments'"),
    ),
}  # fmt: skip


@params(ROUTES)
def test_route(memories: Memories, case: Case) -> None:
    request = memories.route()
    case.change(request)
    assert_refused(refusal(memories.sidecar.routing.Route, request), case)


@params(OWN_ASSIGNMENTS)
def test_route_with_assignments(memories: Memories, case: Case) -> None:
    request = memories.route(ASSIGNMENT)
    case.change(request)
    assert_refused(refusal(memories.sidecar.routing.Route, request), case)


@params(ROUTES)
def test_route_stream_answers_until_the_bad_request(memories: Memories, case: Case) -> None:
    bad = memories.route()
    case.change(bad)
    replies = memories.sidecar.routing.RouteStream(
        iter([memories.route(), bad, memories.route()]), timeout=CALL_TIMEOUT_S
    )
    assert next(replies).HasField("lambdas")
    with pytest.raises(grpc.RpcError) as caught:
        next(replies)
    assert_refused(service_error(caught.value), case)


def test_too_many_values_for_the_memory_of_the_machine(memories: Memories) -> None:
    tokens = 2**15
    request = route_request(
        "deltas",
        memories.digest,
        np.zeros((tokens, HIDDEN), np.float32),
        np.zeros((tokens, EXPERTS), np.float32),
        neighbours=1024,
    )
    error = refusal(memories.sidecar.routing.Route, request)
    words = ("router_inputs", "32768 tokens", "at most 16384", "K = 1024")
    assert_refused(error, Case(print, INVALID, "INVALID_FIELD", words))


def test_describe_names_both_sides(memories: Memories) -> None:
    fingerprint = make_fingerprint(hidden_size=32, router_hash="beef" * 16)
    request = routing_pb.DescribeRequest(memory="deltas", fingerprint=fingerprint)
    error = refusal(memories.sidecar.routing.Describe, request)
    words = ("hidden_size: memory 16, client 32", "router_hash: memory '5eed", "client 'beef")
    assert_refused(error, Case(print, PRECONDITION, "MODEL_MISMATCH", words))


def test_an_endless_fingerprint_gets_a_short_answer(memories: Memories) -> None:
    fingerprint = make_fingerprint(architecture="x" * 1_000_000)
    request = routing_pb.DescribeRequest(memory="deltas", fingerprint=fingerprint)
    error = refusal(memories.sidecar.routing.Describe, request)
    assert error.reason == "ERROR_REASON_MODEL_MISMATCH"
    assert len(error.message) < 1000

"""The time that a client still waits travels in the message, over one stream for a whole generation too."""

from __future__ import annotations

import numpy as np
import pytest
from grpc import RpcError, StatusCode
from knnmoe import tensors
from knnmoe.client import service_error
from knnmoe.v1 import routing_pb2 as pb

from tests.sidecar import (
    CALL_TIMEOUT_S,
    EXPERTS,
    LOGIT_DELTA,
    Sidecar,
    random_entries,
    random_keys,
    route_request,
)


@pytest.fixture
def memory(sidecar: Sidecar, name: str) -> str:
    """A memory with 20 entries."""
    sidecar.create(name, kind=LOGIT_DELTA)
    sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, 20))
    return name


def lookup(sidecar: Sidecar, memory: str, timeout_us: int) -> pb.RouteRequest:
    rng = np.random.default_rng(0)
    own = random_keys(rng, 2, EXPERTS)
    digest = sidecar.describe(memory).model_digest
    asked = route_request(memory, digest, random_keys(rng, 2), own)
    asked.timeout_us = timeout_us
    return asked


def replies(
    sidecar: Sidecar, requests: list[pb.RouteRequest], streamed: bool
) -> list[pb.RouteResponse]:
    if streamed:
        return list(sidecar.routing.RouteStream(iter(requests), timeout=CALL_TIMEOUT_S))
    return [sidecar.route(request) for request in requests]


@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
def test_what_has_expired_is_refused(sidecar: Sidecar, memory: str, streamed: bool) -> None:
    late = lookup(sidecar, memory, timeout_us=1)
    with pytest.raises(RpcError) as failed:
        replies(sidecar, [late], streamed)
    error = service_error(failed.value)
    expected = (StatusCode.DEADLINE_EXCEEDED, "ERROR_REASON_DEADLINE")
    assert (error.code, error.reason) == expected


@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
def test_messages_that_have_time_are_answered(
    sidecar: Sidecar, memory: str, streamed: bool
) -> None:
    in_time = lookup(sidecar, memory, timeout_us=int(CALL_TIMEOUT_S * 1e6))
    without = lookup(sidecar, memory, timeout_us=0)
    found = replies(sidecar, [in_time, without], streamed)
    lambdas = [tensors.to_array(reply.lambdas) for reply in found]
    np.testing.assert_array_equal(lambdas[0], lambdas[1])
    assert lambdas[0].any()

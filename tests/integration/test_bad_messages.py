"""Bytes that are no request at all."""

from __future__ import annotations

from typing import Any

import pytest
from grpc import StatusCode
from knnmoe import channels
from knnmoe.v1 import routing_pb2 as routing_pb

from tests.integration.refusals import (
    INVALID,
    Case,
    Memories,
    assert_refused,
)
from tests.sidecar import (
    refusal,
)

METHODS = [
    ("/knnmoe.v1.RoutingService/Route", False),
    ("/knnmoe.v1.RoutingService/Describe", False),
    ("/knnmoe.v1.RoutingService/RouteStream", True),
    ("/knnmoe.v1.MemoryAdminService/CreateMemory", False),
    ("/knnmoe.v1.MemoryAdminService/Upsert", True),
]
GARBAGE = {
    "random": b"\xff\xfe\x00garbage",
    "truncated": b"\x0a\x7fabc",
    "surrogate": b"\x0a\x03\xed\xa0\x80",  # field 1, half a character
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=list(GARBAGE))
@pytest.mark.parametrize(("method", "streaming"), METHODS)
def test_garbage_bytes(memories: Memories, method: str, streaming: bool, garbage: bytes) -> None:
    channel = memories.sidecar.channel
    call: Any = channel.stream_stream(method) if streaming else channel.unary_unary(method)
    error = refusal(call, iter([garbage]) if streaming else garbage)
    words = ("request", f"{len(garbage)} bytes", "a message of the method's type")
    assert_refused(error, Case(print, INVALID, "INVALID_FIELD", words))


def test_python_refuses_to_send_lone_surrogates() -> None:
    with pytest.raises(UnicodeEncodeError):
        routing_pb.RouteRequest(memory="\ud800").SerializeToString()


def test_a_message_beyond_the_limit(memories: Memories) -> None:
    request = memories.route()
    request.router_inputs.data = bytes(channels.MAX_MESSAGE_BYTES)
    with channels.open_channel(memories.sidecar.target, 2 * channels.MAX_MESSAGE_BYTES) as channel:
        call = channel.unary_unary("/knnmoe.v1.RoutingService/Route")
        error = refusal(call, request.SerializeToString())
    assert error.code is StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in error.message


def test_a_method_that_is_not_there(memories: Memories) -> None:
    call = memories.sidecar.channel.unary_unary("/knnmoe.v1.RoutingService/Rout")
    assert refusal(call, b"").code is StatusCode.UNIMPLEMENTED

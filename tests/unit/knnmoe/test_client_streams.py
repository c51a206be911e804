"""What a routing client sends and what it makes of the answers; the service is written by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import numpy as np
import pytest
from knnmoe import tensors
from knnmoe.client import NO_PAUSES_S, ExampleRef, RoutingClient, ServiceUnavailable
from knnmoe.v1 import routing_pb2 as pb
from knnmoe.v1.routing_pb2_grpc import (
    RoutingServiceServicer,
    add_RoutingServiceServicer_to_server,
)
from knnmoe.v1.types_pb2 import ModelFingerprint

INPUTS = np.arange(6, dtype=np.float32).reshape(2, 3)
LOGITS = np.ones((2, 4), np.float32)
Answer = Callable[[pb.RouteRequest], pb.RouteResponse | None]


class Scripted(RoutingServiceServicer):
    """Answers by a function of the request; None ends the stream."""

    def __init__(self) -> None:
        self.answer: Answer = lambda request: pb.RouteResponse(request_id=request.request_id)
        self.asked: list[pb.RouteRequest] = []
        self.streams = 0

    def Describe(self, request: pb.DescribeRequest, context: object) -> pb.DescribeResponse:  # noqa: N802
        return pb.DescribeResponse(memory=pb.MemoryDescription(name="law", model_digest="d1gest"))

    def RouteStream(  # noqa: N802
        self, request_iterator: Iterator[pb.RouteRequest], context: object
    ) -> Iterator[pb.RouteResponse]:
        self.streams += 1
        for request in request_iterator:
            self.asked.append(request)
            if (response := self.answer(request)) is None:
                return
            yield response


@pytest.fixture
def service() -> Iterator[tuple[Scripted, str]]:
    scripted, server = Scripted(), grpc.server(futures.ThreadPoolExecutor(4))
    add_RoutingServiceServicer_to_server(scripted, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield scripted, f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def client(service: tuple[Scripted, str]) -> Iterator[RoutingClient]:
    with RoutingClient(service[1], "law", ModelFingerprint(), pauses_s=NO_PAUSES_S) as made:
        yield made


def test_what_is_asked(service: tuple[Scripted, str], client: RoutingClient) -> None:
    exclude = [ExampleRef("s", "a"), ExampleRef("s", "b")]
    client.route(3, INPUTS, LOGITS, timeout_s=60, exclude=exclude, neighbours=7)
    client.route(4, tensors.to_tensor(INPUTS, bf16=True), LOGITS, timeout_s=60)
    first, second = service[0].asked
    assert (first.memory, first.layer, first.model_digest) == ("law", 3, "d1gest")
    assert (first.neighbours, [e.example for e in first.exclude]) == (7, ["a", "b"])
    np.testing.assert_array_equal(tensors.to_array(first.router_inputs), INPUTS)
    np.testing.assert_array_equal(tensors.to_array(second.router_inputs), INPUTS)
    assert not second.HasField("neighbours")
    assert service[0].streams == 1


def test_the_message_says_how_long_its_client_still_waits(
    service: tuple[Scripted, str], client: RoutingClient
) -> None:
    client.route(0, INPUTS, LOGITS, timeout_s=60)  # over a connection that is new
    client.route(0, INPUTS, LOGITS, timeout_s=30)
    left_s = [request.timeout_us / 1e6 for request in service[0].asked]
    assert left_s == [60.0, 30.0]


def test_a_retry_has_less_time_left(service: tuple[Scripted, str], client: RoutingClient) -> None:
    scripted, _ = service
    client.route(0, INPUTS, LOGITS, timeout_s=60)
    replies = iter([None, pb.RouteResponse(request_id=2)])
    scripted.answer = lambda request: next(replies)
    client.route(0, INPUTS, LOGITS, timeout_s=60)
    _, failed, again = scripted.asked
    assert failed.request_id == again.request_id == 2
    assert 0 < again.timeout_us < failed.timeout_us <= 60_000_000
    assert scripted.streams == 2


def test_another_requests_answer_is_never_returned(
    service: tuple[Scripted, str], client: RoutingClient
) -> None:
    scripted, _ = service
    scripted.answer = lambda request: pb.RouteResponse(request_id=request.request_id + 1)
    with pytest.raises(ServiceUnavailable, match="request 1 got the answer to request 2"):
        client.route(0, INPUTS, LOGITS, timeout_s=60)
    scripted.answer = lambda request: pb.RouteResponse(request_id=request.request_id)
    assert client.route(0, INPUTS, LOGITS, timeout_s=60).request_id == 2
    assert scripted.streams == 2


def test_an_answer_that_comes_too_late_is_not_the_next_ones(
    service: tuple[Scripted, str], client: RoutingClient
) -> None:
    scripted, _ = service
    client.route(0, INPUTS, LOGITS, timeout_s=60)
    held, plain = threading.Event(), scripted.answer

    def late(request: pb.RouteRequest) -> pb.RouteResponse | None:
        held.wait(60)
        return plain(request)

    scripted.answer = late
    with pytest.raises(ServiceUnavailable, match=r"no answer within 0.01 s") as failed:
        client.route(0, INPUTS, LOGITS, timeout_s=0.01)
    assert failed.value.cause == "deadline"
    held.set()
    scripted.answer = plain
    assert client.route(0, INPUTS, LOGITS, timeout_s=60).request_id == 3


def test_closing_twice(service: tuple[Scripted, str]) -> None:
    client = RoutingClient(service[1], "law", ModelFingerprint())
    client.route(0, INPUTS, LOGITS, timeout_s=60)
    client.close()
    client.close()

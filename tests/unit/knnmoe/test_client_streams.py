"""What a routing client sends and what it makes of the answers; the service is written by hand."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from knnmoe import tensors
from knnmoe.client import (
    NO_PAUSES_S,
    ClientClosed,
    ExampleRef,
    MemoryNotFound,
    RoutingClient,
    ServiceUnavailable,
    calls,
)
from knnmoe.errors import ERROR_DOMAIN
from knnmoe.v1 import routing_pb2 as pb
from knnmoe.v1.routing_pb2_grpc import (
    RoutingServiceServicer,
    add_RoutingServiceServicer_to_server,
)
from knnmoe.v1.types_pb2 import ModelFingerprint

INPUTS = np.arange(6, dtype=np.float32).reshape(2, 3)
LOGITS = np.ones((2, 4), np.float32)
THREADS = 8
Answer = Callable[[pb.RouteRequest], pb.RouteResponse | None]


# Looks up, forks, and says in the child what the parent's client raises and how a client of its own does.
FORKS = """
import os, sys
import numpy as np
from knnmoe.client import RoutingClient, ServiceError
from knnmoe.v1.types_pb2 import ModelFingerprint
def asked(client):
    floats = np.ones((1, 2), np.float32)
    return client.route(0, floats, floats, timeout_s=60)
with RoutingClient("{target}", "law", ModelFingerprint()) as client:
    asked(client)
    child = os.fork()
    if child:
        sys.exit(os.waitpid(child, 0)[1])
    try:
        asked(client)
    except ServiceError as error:
        print(type(error).__name__)
        print(error, file=sys.stderr)
    with RoutingClient("{target}", "law", ModelFingerprint()) as own:
        print(asked(own).request_id)
"""


class Ended:
    """Counts streams that ended, for who waits for it."""

    def __init__(self) -> None:
        self._number = threading.Semaphore(0)

    def add(self) -> None:
        self._number.release()

    def acquire_all(self, number: int) -> None:
        for _ in range(number):
            assert self._number.acquire(timeout=60)


class Scripted(RoutingServiceServicer):
    """Answers by a function of the request; None ends the stream."""

    def __init__(self) -> None:
        self.answer: Answer = lambda request: pb.RouteResponse(request_id=request.request_id)
        self.asked: list[pb.RouteRequest] = []
        self.streams, self.ended = 0, Ended()
        self.one_each = False  # end each stream after an answer
        self.digest = "d1gest"
        self.describable = threading.Event()
        self.describable.set()
        self.context: Any = None  # of the last stream

    def Describe(self, request: pb.DescribeRequest, context: object) -> pb.DescribeResponse:  # noqa: N802
        self.describable.wait(60)
        return pb.DescribeResponse(
            memory=pb.MemoryDescription(name="law", model_digest=self.digest)
        )

    def RouteStream(  # noqa: N802
        self, request_iterator: Iterator[pb.RouteRequest], context: Any
    ) -> Iterator[pb.RouteResponse]:
        self.streams += 1
        self.context = context
        context.add_callback(self.ended.add)
        for request in request_iterator:
            self.asked.append(request)
            if (response := self.answer(request)) is None:
                return
            yield response
            if self.one_each:
                return


@pytest.fixture
def service() -> Iterator[tuple[Scripted, str]]:
    scripted, server = Scripted(), grpc.server(futures.ThreadPoolExecutor(2 * THREADS))
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
    client.route(0, INPUTS, LOGITS, timeout_s=60)  # connects and describes the memory within it
    client.route(0, INPUTS, LOGITS, timeout_s=30)
    first_s, second_s = (request.timeout_us / 1e6 for request in service[0].asked)
    assert 30 < first_s < 60
    assert second_s == 30


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


def test_a_stream_that_the_service_cancels_is_replaced(
    service: tuple[Scripted, str], client: RoutingClient
) -> None:
    """As it does with those that wait, when it is short of threads: just then this one may have been used again."""
    scripted, plain = service[0], service[0].answer
    client.route(0, INPUTS, LOGITS, timeout_s=60)

    def cancel(request: pb.RouteRequest) -> None:
        scripted.answer = plain
        scripted.context.cancel()

    scripted.answer = cancel
    assert client.route(0, INPUTS, LOGITS, timeout_s=60).request_id == 2
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


def test_the_description_is_waited_for_within_the_lookups_time(
    service: tuple[Scripted, str],
) -> None:
    """Not for as long as describe() would: this test would not end."""
    scripted, target = service
    scripted.describable.clear()
    with RoutingClient(target, "law", ModelFingerprint(), connect_timeout_s=3600) as client:
        with pytest.raises(ServiceUnavailable, match=r"no answer within 0.01 s") as failed:
            client.route(0, INPUTS, LOGITS, timeout_s=0.01)
        assert failed.value.cause == "deadline"
        scripted.describable.set()
        assert client.route(0, INPUTS, LOGITS, timeout_s=60).request_id
    assert len(scripted.asked) == 1


def test_a_memory_that_is_gone_is_described_anew(
    service: tuple[Scripted, str], client: RoutingClient
) -> None:
    scripted, _ = service
    client.route(0, INPUTS, LOGITS, timeout_s=60)
    scripted.digest, plain = "an0ther", scripted.answer
    info = error_details_pb2.ErrorInfo(reason="ERROR_REASON_MEMORY_NOT_FOUND", domain=ERROR_DOMAIN)
    gone = status_pb2.Status(code=grpc.StatusCode.NOT_FOUND.value[0], message="gone")
    gone.details.add().Pack(info)

    def refuse(request: pb.RouteRequest) -> None:
        scripted.context.abort_with_status(rpc_status.to_status(gone))

    scripted.answer = refuse
    with pytest.raises(MemoryNotFound):
        client.route(0, INPUTS, LOGITS, timeout_s=60)
    scripted.answer = plain
    client.route(0, INPUTS, LOGITS, timeout_s=60)
    assert [request.model_digest for request in scripted.asked] == ["d1gest", "d1gest", "an0ther"]


def at_once(client: RoutingClient, layers: int) -> list[pb.RouteResponse]:
    """A lookup of each layer, from as many threads."""
    with futures.ThreadPoolExecutor(layers) as pool:
        ask = partial(client.route, router_inputs=INPUTS, own=LOGITS, timeout_s=60)
        return list(pool.map(ask, range(layers)))


def layer_in_the_answer(request: pb.RouteRequest) -> pb.RouteResponse:
    return pb.RouteResponse(request_id=request.request_id, memory_version=request.layer)


def test_lookups_at_the_same_time_have_a_stream_each(
    service: tuple[Scripted, str], client: RoutingClient
) -> None:
    scripted, together = service[0], threading.Barrier(THREADS)

    def answer(request: pb.RouteRequest) -> pb.RouteResponse:
        together.wait(60)  # all of them are on their way
        return layer_in_the_answer(request)

    scripted.answer = answer
    for _ in range(3):
        assert [reply.memory_version for reply in at_once(client, THREADS)] == [*range(THREADS)]
    assert scripted.streams == THREADS
    assert len({request.request_id for request in scripted.asked}) == 3 * THREADS


def test_threads_that_come_and_go_leave_no_stream(
    service: tuple[Scripted, str], client: RoutingClient
) -> None:
    service[0].answer = layer_in_the_answer
    for layer in range(3 * THREADS):
        thread = threading.Thread(
            target=client.route, args=(layer, INPUTS, LOGITS), kwargs={"timeout_s": 60}
        )
        thread.start()
        thread.join()
    assert service[0].streams == 1


def test_streams_of_a_burst_are_given_up(
    service: tuple[Scripted, str], client: RoutingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes a thread of the service."""
    scripted, together = service[0], threading.Barrier(THREADS)

    def answer(request: pb.RouteRequest) -> pb.RouteResponse:
        together.wait(60)
        return layer_in_the_answer(request)

    scripted.answer = answer
    monkeypatch.setattr(calls, "IDLE_STREAMS", 2)
    at_once(client, THREADS)
    scripted.ended.acquire_all(THREADS - 2)
    monkeypatch.setattr(calls, "IDLE_STREAM_S", 0.0)
    scripted.answer = layer_in_the_answer
    client.route(0, INPUTS, LOGITS, timeout_s=60)
    scripted.ended.acquire_all(1)


def test_a_stream_that_ended_unused_costs_no_retry(
    service: tuple[Scripted, str], client: RoutingClient
) -> None:
    """Three such: more than a lookup is tried again."""
    scripted, together = service[0], threading.Barrier(3)

    def last(request: pb.RouteRequest) -> pb.RouteResponse:
        together.wait(60)
        return layer_in_the_answer(request)

    scripted.answer, scripted.one_each = last, True
    at_once(client, 3)
    scripted.ended.acquire_all(3)
    scripted.answer = layer_in_the_answer
    assert client.route(7, INPUTS, LOGITS, timeout_s=60).memory_version == 7
    assert client.route(8, INPUTS, LOGITS, timeout_s=60).memory_version == 8


def test_closing_while_others_look_up(service: tuple[Scripted, str], client: RoutingClient) -> None:
    scripted, asked, never = service[0], threading.Semaphore(0), threading.Event()

    def answer(request: pb.RouteRequest) -> pb.RouteResponse:
        asked.release()
        never.wait(60)
        return layer_in_the_answer(request)

    scripted.answer = answer
    with futures.ThreadPoolExecutor(THREADS) as pool:
        ask = partial(client.route, router_inputs=INPUTS, own=LOGITS, timeout_s=3600)
        waiting = [pool.submit(ask, layer) for layer in range(THREADS)]
        for _ in waiting:
            asked.acquire()
        client.close()
        errors = [future.exception() for future in waiting]
    never.set()
    assert {type(error) for error in errors} == {ClientClosed}
    with pytest.raises(ClientClosed, match="close it when the threads that use it have ended"):
        ask(0)


def test_a_client_of_another_process(service: tuple[Scripted, str]) -> None:
    """Nothing of gRPC's survives a fork but the object; a lock that a thread held is held for ever."""
    script = FORKS.format(target=service[1])
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["ClientClosed", "1"], done.stderr
    assert "make one in each process" in done.stderr


def test_closing_twice(service: tuple[Scripted, str]) -> None:
    client = RoutingClient(service[1], "law", ModelFingerprint())
    client.route(0, INPUTS, LOGITS, timeout_s=60)
    client.close()
    client.close()

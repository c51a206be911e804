"""Lookups over the socket beside gRPC's: the answers, the refusals and the ends are those of RouteStream."""

from __future__ import annotations

import fcntl
import resource
import socket
import struct
import termios
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from knnmoe import tensors
from knnmoe.client import ExampleRef, RoutingClient, ServiceError, ServiceUnavailable
from knnmoe.client.calls import DuplexStream
from knnmoe.client.direct import SUFFIX, DirectStream, socket_path
from knnmoe.v1 import routing_pb2 as pb

from tests.integration.server_snapshots import until
from tests.sidecar import (
    CALL_TIMEOUT_S,
    EXPERTS,
    HIDDEN,
    LOGIT_DELTA,
    Sidecar,
    make_fingerprint,
    random_entries,
    random_keys,
    route_request,
)

MEMORY = "law"
# More than a socket holds on its way.
MANY = 20_000


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sidecar, str]]:
    directory = tmp_path_factory.mktemp("direct")
    with Sidecar(directory / "data", listen=f"unix:{directory}/s", backend="exact") as sidecar:
        digest = sidecar.create(MEMORY, kind=LOGIT_DELTA, neighbours=3, gamma=[0.05])
        sidecar.upsert(MEMORY, 0, random_entries(LOGIT_DELTA, 50))
        yield sidecar, digest


def direct(sidecar: Sidecar) -> DirectStream:
    stream = DirectStream.connected(sidecar.target)
    assert stream is not None
    return stream


def asked(digest: str, tokens: int = 1, **fields: object) -> pb.RouteRequest:
    rng = np.random.default_rng(tokens)
    inputs, logits = random_keys(rng, tokens), random_keys(rng, tokens, EXPERTS)
    return route_request(MEMORY, digest, inputs, logits, **fields)  # type: ignore[arg-type]


def without_times(response: pb.RouteResponse) -> pb.RouteResponse:
    response.ClearField("times")
    return response


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "f16"},
        {"dtype": "bf16", "neighbours": 7},
        {"with_neighbours": True, "exclude": [pb.ExampleRef(source="text-1", example="example-3")]},
        {"layer": 1},
        {"timeout_us": 60_000_000},
    ],
)
def test_answers_are_those_of_grpc(serving: tuple[Sidecar, str], fields: dict[str, object]) -> None:
    sidecar, digest = serving
    request = asked(digest, 5, **fields)
    by_grpc: DuplexStream[pb.RouteRequest, pb.RouteResponse] = DuplexStream(
        sidecar.routing.RouteStream, sidecar.target
    )
    found = []
    for stream in (by_grpc, direct(sidecar)):
        stream.send(request)
        found.append(without_times(stream.receive(CALL_TIMEOUT_S)))
        stream.close()
    assert found[0] == found[1]


def test_several_requests_on_their_way_are_answered_in_order(serving: tuple[Sidecar, str]) -> None:
    sidecar, digest = serving
    stream = direct(sidecar)
    tokens = [3, 1, MANY, 2, 5]
    for number in tokens:
        request = asked(digest, number)
        request.request_id = number
        stream.send(request)
    for number in tokens:
        response = stream.receive(CALL_TIMEOUT_S)
        assert response.request_id == number
        assert tensors.to_array(response.router_logits).shape == (number, EXPERTS)
    assert not stream.ended
    stream.close()
    assert stream.ended


@pytest.mark.parametrize(
    "wrong", [{"layer": 7}, {"neighbours": 5000}, {"timeout_us": 1}, {"memory": "none"}]
)
def test_a_refusal_ends_the_stream_with_the_error_of_grpc(
    serving: tuple[Sidecar, str], wrong: dict[str, object]
) -> None:
    sidecar, digest = serving
    request = asked(digest)
    for name, value in wrong.items():
        setattr(request, name, value)
    by_grpc: DuplexStream[pb.RouteRequest, pb.RouteResponse] = DuplexStream(
        sidecar.routing.RouteStream, sidecar.target
    )
    errors = []
    for stream in (by_grpc, direct(sidecar)):
        stream.send(request)
        with pytest.raises(ServiceError) as refused:
            stream.receive(CALL_TIMEOUT_S)
        errors.append(refused.value)
        assert stream.ended
    assert type(errors[0]) is type(errors[1])
    assert vars(errors[0]) == vars(errors[1])


def test_what_is_no_message_is_refused(serving: tuple[Sidecar, str]) -> None:
    sidecar, digest = serving
    for frame in (b"\x03\0\0\0abc", struct.pack("<I", 2**32 - 2)):
        stream = direct(sidecar)
        stream._socket.sendall(frame)
        with pytest.raises(ServiceError, match=r"request: got '\d+ bytes', expected"):
            stream.receive(CALL_TIMEOUT_S)
    half = direct(sidecar)
    half._socket.sendall(b"\x03\0")
    half.close()  # in the middle of a message
    assert without_times(_answer(sidecar, digest)).router_logits.data


def test_both_forms_of_an_address_lead_there(serving: tuple[Sidecar, str]) -> None:
    path = serving[0].target.removeprefix("unix:")
    for target in (f"unix:{path}", f"unix://{path}"):
        stream = DirectStream.connected(target)
        assert stream is not None
        stream.close()
    assert DirectStream.connected(f"dns:{path}") is None


def _answer(sidecar: Sidecar, digest: str) -> pb.RouteResponse:
    stream = direct(sidecar)
    stream.send(asked(digest))
    response = stream.receive(CALL_TIMEOUT_S)
    stream.close()
    return response


def test_a_client_takes_it_and_grpc_where_it_is_not(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/s"
    inputs, logits = np.ones((2, HIDDEN), np.float32), np.ones((2, EXPERTS), np.float32)

    def lookup(client: RoutingClient) -> pb.RouteResponse:
        exclude = [ExampleRef("text-0", "example-1"), ExampleRef("text-1", "example-2")]
        return client.route(0, inputs, logits, timeout_s=CALL_TIMEOUT_S, exclude=exclude)

    with Sidecar(tmp_path / "data", listen=listen, backend="exact") as sidecar:
        sidecar.create(MEMORY, kind=LOGIT_DELTA, gamma=[0.05])
        sidecar.upsert(MEMORY, 0, random_entries(LOGIT_DELTA, 50))
        with RoutingClient(sidecar.target, MEMORY, make_fingerprint()) as client:
            found = lookup(client)
            (stream,) = (stream for _, stream in client._streams._idle)
            assert isinstance(stream, DirectStream)
        Path(f"{tmp_path}/s{SUFFIX}").unlink()  # as beside an earlier version
        with RoutingClient(sidecar.target, MEMORY, make_fingerprint()) as client:
            again = lookup(client)
            (stream,) = (stream for _, stream in client._streams._idle)
            assert isinstance(stream, DuplexStream)
        assert again.router_logits == found.router_logits


def test_a_stop_answers_what_is_under_way_and_a_start_takes_the_path_again(tmp_path: Path) -> None:
    listen, path = f"unix:{tmp_path}/s", Path(f"{tmp_path}/s{SUFFIX}")
    with Sidecar(tmp_path / "data", listen=listen) as sidecar:
        digest = sidecar.create(MEMORY, kind=LOGIT_DELTA, gamma=[0.05])
        sidecar.upsert(MEMORY, 0, random_entries(LOGIT_DELTA, 50))
        sidecar.close_channel()
        stream, silent = direct(sidecar), direct(sidecar)
        stream.send(asked(digest))
        stream.receive(CALL_TIMEOUT_S)
        sidecar.stop_cleanly()
        assert not path.exists()
        for each in (stream, silent):
            with pytest.raises(ServiceUnavailable):
                each.receive(CALL_TIMEOUT_S)
    left_behind = socket.socket(socket.AF_UNIX)
    left_behind.bind(str(path))
    left_behind.close()  # as SIGKILL leaves it
    assert DirectStream.connected(listen) is None
    with Sidecar(tmp_path / "data", listen=listen) as sidecar:
        assert _answer(sidecar, digest).router_logits.data
        sidecar.stop_cleanly()


def test_an_answer_that_does_not_come_in_time_ends_the_stream(
    serving: tuple[Sidecar, str],
) -> None:
    sidecar, digest = serving
    with sidecar.paused():
        stream = direct(sidecar)
        stream.send(asked(digest, MANY))  # more than the socket takes
        with pytest.raises(ServiceUnavailable, match=r"no answer within 0.05 s"):
            stream.receive(0.05)
        assert stream.ended
    assert _answer(sidecar, digest).router_logits.data


def test_a_refusal_is_heard_while_a_message_is_on_its_way(tmp_path: Path) -> None:
    flags = ["--max-message-bytes", "100000"]
    listen = f"unix:{tmp_path}/s"
    with Sidecar(tmp_path / "data", listen=listen, backend="exact", flags=flags) as sidecar:
        digest = sidecar.create(MEMORY, kind=LOGIT_DELTA, gamma=[0.05])
        stream = direct(sidecar)
        stream.send(asked(digest, MANY))  # more than the socket takes
        with pytest.raises(
            ServiceError, match=r"request: got '\d+ bytes', expected at most 100000"
        ):
            stream.receive(CALL_TIMEOUT_S)
        with pytest.raises(ServiceUnavailable, match="ended"):
            stream.receive(CALL_TIMEOUT_S)


def test_a_message_that_does_not_come_takes_no_memory(serving: tuple[Sidecar, str]) -> None:
    sidecar, digest = serving
    status = Path(f"/proc/{sidecar.process.pid}/statm")

    def resident_bytes() -> int:
        return int(status.read_text().split()[1]) * resource.getpagesize()

    before = resident_bytes()
    with ExitStack() as stack:
        for _ in range(8):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(socket_path(sidecar.target))
            connection.sendall(struct.pack("<I", 64 << 20) + bytes(MANY))
            until(lambda taken=connection: not _unread(taken))
        _answer(sidecar, digest)
        assert resident_bytes() - before < 64 << 20


def _unread(connection: socket.socket) -> int:
    """Bytes that the other end has not taken yet."""
    (unread,) = struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))
    return int(unread)

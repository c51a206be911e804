"""The proxy that breaks connections."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import grpc
import pytest
import qdrant_client.grpc as pb
from standin_uses import refused, stubs, wait_for

from tests.qdrant_standin import QdrantStandIn, TcpFaults

LIST = pb.ListCollectionsRequest()


@pytest.fixture
def proxy(standin: QdrantStandIn) -> Iterator[TcpFaults]:
    with TcpFaults(standin.port) as proxy:
        yield proxy


@pytest.fixture
def collections(proxy: TcpFaults) -> Iterator[pb.CollectionsStub]:
    """A stub whose connection is open."""
    channel, stub, _, _ = stubs(proxy.port)
    with channel:
        stub.List(LIST, timeout=10)
        yield stub


def read_to_the_end(connection: socket.socket) -> None:
    while connection.recv(1000):
        pass


def test_bytes_pass(proxy: TcpFaults, collections: pb.CollectionsStub) -> None:
    assert not collections.List(LIST, timeout=10).collections
    assert proxy.url == f"http://127.0.0.1:{proxy.port}"


def test_reset_ends_open_connections_only(standin: QdrantStandIn, proxy: TcpFaults) -> None:
    channel, collections, _, _ = stubs(proxy.port)
    with channel:
        collections.List(LIST, timeout=10)
        hole = standin.faults.black_hole(calls=1)
        pending = collections.List.future(LIST, timeout=30)
        wait_for(lambda: not hole.left)
        proxy.reset()
        assert pending.exception(30).code() == grpc.StatusCode.UNAVAILABLE
        collections.List(LIST, timeout=10, wait_for_ready=True)


def test_reset_is_a_reset(proxy: TcpFaults) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        connection.recv(1)
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            read_to_the_end(connection)


def test_refuse_and_heal_on_the_same_port(
    proxy: TcpFaults, collections: pb.CollectionsStub
) -> None:
    port = proxy.port
    proxy.refuse()
    collections.List(LIST, timeout=10)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    proxy.heal()
    socket.create_connection(("127.0.0.1", port)).close()


def test_black_hole_holds_what_was_sent(proxy: TcpFaults, collections: pb.CollectionsStub) -> None:
    proxy.black_hole()
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED, ""):
        collections.List(LIST, timeout=0.1)
    proxy.heal()
    collections.List(LIST, timeout=10)


def test_slow(proxy: TcpFaults, collections: pb.CollectionsStub) -> None:
    proxy.slow(bytes_per_s=20)
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED, ""):
        collections.List(LIST, timeout=0.2)
    proxy.slow(bytes_per_s=100_000)
    collections.List(LIST, timeout=30)


def test_a_server_that_is_not_there(standin: QdrantStandIn) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with TcpFaults(port) as proxy:
        channel, stub, _, _ = stubs(proxy.port)
        with channel, refused(grpc.StatusCode.UNAVAILABLE, ""):
            stub.List(LIST, timeout=10)

"""Faults that the stand-in shows, and the API key."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import qdrant_client.grpc as pb
from qdrant_client import QdrantClient
from standin_uses import NAME, TIMEOUT_S, create, refused, stubs, wait_for

from tests import qdrant_standin
from tests.qdrant_standin import QdrantStandIn

COUNT = pb.CountPoints(collection_name=NAME)
GET = pb.GetCollectionInfoRequest(collection_name=NAME)


@pytest.fixture
def calls(standin: QdrantStandIn, client: QdrantClient) -> Iterator[tuple[Any, Any, Any]]:
    """Raw calls of a collection: Points.Count, Collections.Get, HealthCheck."""
    create(client)
    channel, collections, found, health = stubs(standin.port)
    with channel:
        yield found.Count, collections.Get, health


def test_delay(standin: QdrantStandIn, calls: Any) -> None:
    count, get, _ = calls
    standin.faults.delay(60.0, "Count")
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED, ""):
        count(COUNT, timeout=0.1)
    get(GET, timeout=10)


def test_a_short_delay_ends(standin: QdrantStandIn, calls: Any) -> None:
    standin.faults.delay(0.05)
    assert calls[0](COUNT, timeout=10).result.count == 0


def test_black_hole_for_so_many_calls(standin: QdrantStandIn, calls: Any) -> None:
    hole = standin.faults.black_hole("Points/Count", calls=1)
    held = calls[0].future(COUNT, timeout=TIMEOUT_S)
    wait_for(lambda: not hole.left)  # a deadline of its own could pass before the call arrives
    calls[0](COUNT, timeout=TIMEOUT_S)
    assert not held.done()
    held.cancel()


def test_lifting_a_black_hole_lets_the_calls_go_on(standin: QdrantStandIn, calls: Any) -> None:
    hole, before = standin.faults.black_hole(), standin.faults.calls["Count"]
    pending = calls[0].future(COUNT, timeout=30)
    wait_for(lambda: standin.faults.calls["Count"] > before)
    hole.lift()
    assert pending.result().result.count == 0


def test_a_status(standin: QdrantStandIn, calls: Any) -> None:
    standin.faults.fail(grpc.StatusCode.UNAVAILABLE, "restarting", calls=2)
    for call, request in ((calls[0], COUNT), (calls[1], GET)):
        with refused(grpc.StatusCode.UNAVAILABLE, "restarting"):
            call(request)
    calls[0](COUNT)


def test_methods_of_the_same_name_are_told_apart(standin: QdrantStandIn, calls: Any) -> None:
    fault = standin.faults.fail(grpc.StatusCode.INTERNAL, method="Points/Get")
    calls[1](GET)
    fault.lift()
    standin.faults.fail(grpc.StatusCode.INTERNAL, method="Collections/Get")
    with refused(grpc.StatusCode.INTERNAL, "injected"):
        calls[1](GET)


def test_rate_limit_says_when_to_come_again(standin: QdrantStandIn, calls: Any) -> None:
    standin.faults.rate_limit(3, "Count", calls=1)
    with pytest.raises(grpc.RpcError) as caught:
        calls[0](COUNT)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert ("retry-after", "3") in tuple(caught.value.trailing_metadata())
    calls[0](COUNT)


def test_version(standin: QdrantStandIn, calls: Any) -> None:
    reply = calls[2](pb.HealthCheckRequest())
    assert (reply.title, reply.version) == ("qdrant - vector search engine", "1.20.0")
    standin.faults.version = "1.10.0"
    assert calls[2](pb.HealthCheckRequest()).version == "1.10.0"
    standin.faults.version = "1.20.0"


def test_stop_ends_what_a_black_hole_holds(directory: Path) -> None:
    with QdrantStandIn(directory / "held") as server:
        server.faults.black_hole()
        channel, _, found, _ = stubs(server.port)
        with channel:
            pending = found.Count.future(COUNT, timeout=30)
            wait_for(lambda: server.faults.calls["Count"])
            server.stop()
            assert pending.exception(30).code() == grpc.StatusCode.UNAVAILABLE


def test_a_server_that_comes_back_on_its_port(standin: QdrantStandIn, calls: Any) -> None:
    port = standin.port
    standin.stop()
    with refused(grpc.StatusCode.UNAVAILABLE, ""):
        calls[0](COUNT)
    standin.start()
    assert standin.port == port
    assert calls[0](COUNT, timeout=10, wait_for_ready=True).result.count == 0


def test_a_taken_port_is_an_error(standin: QdrantStandIn, directory: Path) -> None:
    server = QdrantStandIn(directory / "second", port=standin.port)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Failed to bind"):
            server.start()


def test_tls(directory: Path) -> None:
    files = Path(qdrant_standin.__file__).parent
    chain, key = (files / f"localhost.{end}" for end in ("pem", "key"))
    pair = key.read_bytes(), chain.read_bytes()
    with QdrantStandIn(directory / "tls", certificate=pair) as server:
        trusted = grpc.ssl_channel_credentials(pair[1])
        with grpc.secure_channel(f"localhost:{server.port}", trusted) as channel:
            assert pb.QdrantStub(channel).HealthCheck(pb.HealthCheckRequest(), timeout=10).version
        context = ssl.create_default_context(cafile=chain)
        assert httpx.get(server.rest_url, verify=context).status_code == 200
        assert server.url.startswith("https://")


def test_api_key(directory: Path) -> None:
    with QdrantStandIn(directory / "key", api_key="secret") as server:
        channel, collections, _, health = stubs(server.port)
        with channel:
            request = pb.ListCollectionsRequest()
            text = "Must provide an API key or an Authorization bearer token"
            with refused(grpc.StatusCode.UNAUTHENTICATED, text):
                collections.List(request)
            with refused(grpc.StatusCode.UNAUTHENTICATED, "Invalid API key or JWT"):
                collections.List(request, metadata=(("api-key", "other"),))
            collections.List(request, metadata=(("api-key", "secret"),))
            collections.List(request, metadata=(("authorization", "Bearer secret"),))
            assert health(pb.HealthCheckRequest()).version

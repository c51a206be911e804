"""A memory on a Qdrant server is replaced while several services use it, and when it or a service goes away."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import grpc
import pytest
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from qdrant_client import grpc as q

from tests.integration.replaced_memories import (
    answer,
    answers,
    asking,
    contents,
    fill,
    fill_both,
    names,
    replace,
    request_of,
    stats,
)
from tests.integration.server_snapshots import until
from tests.qdrant_standin import QdrantStandIn
from tests.sidecar import COSINE, LAYERS, Sidecar, refusal, running_sidecar

OFTEN = ["--flush-interval-s", "0.1", "--qdrant-timeout-s", "30"]
REQUEST = admin_pb.ReplaceMemoryRequest(memory="law", by="law-2")


@pytest.fixture
def server(data: Path) -> Iterator[QdrantStandIn]:
    with QdrantStandIn(data.parent / "qdrant") as running:
        yield running


@pytest.fixture
def service(server: QdrantStandIn, data: Path) -> Iterator[Sidecar]:
    """With both memories."""
    with Sidecar(data, backend=server.url, flags=OFTEN) as running:
        fill_both(running, "law", "law-2")
        yield running
        if running.process.poll() is None:
            running.stop_cleanly()


def _collections(server: QdrantStandIn) -> list[str]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        reply = q.CollectionsStub(channel).List(q.ListCollectionsRequest())
    return [each.name for each in reply.collections if "~layer-" in each.name]


def test_another_service_goes_on_without_an_error(
    server: QdrantStandIn, service: Sidecar, data: Path
) -> None:
    new = answers(service, "law-2")
    with running_sidecar(data.parent / "b", backend=server.url, flags=OFTEN) as other:
        old, version = answers(other, "law")[0], other.describe("law").version
        with asking(other, "law") as end:
            replace(service, "law", "law-2")
            until(lambda: answers(other, "law") == new)
            replies = [answer(reply) for reply in end()]
        assert [each for each, _ in groupby(replies)] == [old, new[0]]
        assert names(other) == ["law"]
        assert other.describe("law").version > version
        assert other.describe("law").settings == service.describe("law").settings
        assert contents(other, "law") == contents(service, "law")


def test_what_is_stored_follows_the_names(
    server: QdrantStandIn, service: Sidecar, data: Path
) -> None:
    """Twice replaced, the second time by one of another similarity, over a restart, until it is deleted."""
    fill(service, "law-3", 5, similarity=COSINE)
    expected = answers(service, "law-3")
    with running_sidecar(data.parent / "b", backend=server.url, flags=OFTEN) as other:
        version = other.describe("law").version
        replace(service, "law", "law-2")
        replace(service, "law", "law-3")
        assert len(_collections(server)) == LAYERS
        until(lambda: other.describe("law").settings.similarity == COSINE)
        assert answers(other, "law") == expected
        assert other.describe("law").version > version
    hits = [layer[2] for layer in stats(service, "law")]
    service.stop_cleanly()
    with running_sidecar(data, backend=server.url, flags=OFTEN) as again:
        assert [layer[2] for layer in stats(again, "law")] == hits != [0] * LAYERS
        assert answers(again, "law") == expected
        again.admin.DeleteMemory(admin_pb.DeleteMemoryRequest(memory="law"))
        assert _collections(server) == []


def test_aliases_that_cannot_be_changed_change_nothing(
    server: QdrantStandIn, service: Sidecar
) -> None:
    before = [(answers(service, name), service.describe(name)) for name in ("law", "law-2")]
    fault = server.faults.fail(grpc.StatusCode.INTERNAL, method="UpdateAliases")
    assert "injected" in refusal(service.admin.ReplaceMemory, REQUEST).message
    fault.lift()
    after = [(answers(service, name), service.describe(name)) for name in ("law", "law-2")]
    assert after == before


@pytest.mark.parametrize("method", ["UpdateAliases", "Collections/Delete"])
def test_what_a_killed_service_began_the_next_one_finishes(
    server: QdrantStandIn, service: Sidecar, data: Path, method: str
) -> None:
    """Killed before the aliases change, and before the replaced entries are removed."""
    expected = answers(service, "law-2")
    calls = server.faults.calls[method.rsplit("/", 1)[-1]]
    fault = server.faults.black_hole(method)
    call = service.admin.ReplaceMemory.future(REQUEST)
    until(lambda: server.faults.calls[method.rsplit("/", 1)[-1]] > calls)
    service.kill()
    call.cancel()
    fault.lift()
    with running_sidecar(data, backend=server.url, flags=OFTEN) as again:
        assert names(again) == ["law"]
        assert answers(again, "law") == expected
        assert answer(again.route(request_of(again, "law"))) == expected[0]
    assert len(_collections(server)) == LAYERS


def test_a_server_that_goes_away_meanwhile(
    server: QdrantStandIn, service: Sidecar, data: Path
) -> None:
    """The error says that it may be done later; it is done soon after the server's return."""
    expected = answers(service, "law-2")
    server.faults.fail(grpc.StatusCode.UNAVAILABLE, method="UpdateAliases")
    error = refusal(service.admin.ReplaceMemory, REQUEST)
    assert error.reason == "ERROR_REASON_BACKEND_UNAVAILABLE"
    assert "shows soon after the server's return" in error.message
    server.faults.lift()
    until(lambda: names(service) == ["law"])
    assert answers(service, "law") == expected
    service.stop_cleanly()
    with running_sidecar(data, backend=server.url, flags=OFTEN) as again:
        assert answers(again, "law") == expected

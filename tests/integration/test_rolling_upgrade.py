"""Several sidecars on one Qdrant server, upgraded one after the other, and gone back to: memories serve throughout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import types_pb2 as types_pb

from router_service import __version__
from router_service.backends.qdrant_server.connection import Connection
from router_service.backends.qdrant_server.options import ServerOptions
from router_service.backends.qdrant_server.records import Records
from tests.integration.replaced_memories import (
    answer,
    answers,
    asking,
    fill_both,
    names,
    request_of,
)
from tests.integration.server_snapshots import until
from tests.qdrant_standin import QdrantStandIn
from tests.sidecar import CALL_TIMEOUT_S, LAYERS, Sidecar, refusal

OFTEN = ["--flush-interval-s", "0.1", "--qdrant-timeout-s", "30"]
# What 0.1.0 did not write, and today's version does.
LATER_THAN_0_1_0 = ("crc32", "service_version", "collections")


@pytest.fixture
def server(data: Path) -> Iterator[QdrantStandIn]:
    with QdrantStandIn(data.parent / "qdrant") as running:
        yield running


@pytest.fixture
def services(server: QdrantStandIn, data: Path) -> Iterator[list[Sidecar]]:
    """Two on one server, with the memories `law` and `law-2`, whose records are those of 0.1.0."""
    with service_on(server, data, "a") as a, service_on(server, data, "b") as b:
        fill_both(a, "law", "law-2")
        for name in ("law", "law-2"):
            change_record(server, name, without=LATER_THAN_0_1_0)
        yield [a, b]


@contextmanager
def service_on(server: QdrantStandIn, data: Path, name: str) -> Iterator[Sidecar]:
    with Sidecar(data.parent / name, backend=server.url, flags=OFTEN) as running:
        yield running
        if running.process.poll() is None:
            running.stop_cleanly()


def change_record(
    server: QdrantStandIn,
    memory: str,
    changes: dict[str, Any] | None = None,
    *,
    without: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Writes a memory's record as another version would; returns what it was."""
    connection = Connection(ServerOptions(url=server.url))
    try:
        records = Records(connection, "knnmoe~memories")
        payload = records.read(memory)
        assert payload is not None
        was: dict[str, Any] = json.loads(payload["record"])
        kept = {field: value for field, value in was.items() if field not in without}
        record = json.dumps(kept | (changes or {}))
        records.write(memory, {"name": memory, "state": payload["state"], "record": record})
        return was
    finally:
        connection.close()


def test_one_after_the_other(server: QdrantStandIn, services: list[Sidecar], data: Path) -> None:
    """Whichever is asked while the other one is exchanged answers as before, from records of 0.1.0 and of today."""
    a, b = services
    before, other = answers(a, "law"), answers(a, "law-2")
    with asking(b, "law") as end:
        a.stop_cleanly()
        with service_on(server, data, "a") as upgraded:
            assert (answers(upgraded, "law"), answers(upgraded, "law-2")) == (before, other)
            assert {answer(reply) for reply in end()} == {before[0]}
            with asking(upgraded, "law") as last:
                b.stop_cleanly()
                with service_on(server, data, "b") as again:
                    settings = types_pb.MemorySettings(
                        neighbours=4
                    )  # as it is: the record is written anew
                    request = admin_pb.UpdateSettingsRequest(memory="law", settings=settings)
                    again.admin.UpdateSettings(request, timeout=CALL_TIMEOUT_S)
                    assert answers(again, "law") == before
                assert {answer(reply) for reply in last()} == {before[0]}
            record = change_record(server, "law")
            assert record["service_version"] == __version__
            assert len(record["collections"]) == LAYERS


def test_a_record_of_a_later_version_sets_its_memory_aside_and_no_other(
    server: QdrantStandIn, services: list[Sidecar]
) -> None:
    """Nothing of it is changed; when it is written as before, the memory serves again without a restart."""
    a, later = services[0], {"format": 2, "service_version": "9.8.7"}
    request, before, other = request_of(a, "law"), answers(a, "law"), answers(a, "law-2")
    was = change_record(server, "law", later)
    until(lambda: names(a) == ["law-2"])
    refused = refusal(a.routing.Route, request)
    assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
    assert refused.reason == "ERROR_REASON_NEWER_FORMAT"
    assert "format 2, written by router-service '9.8.7'" in refused.message
    assert f"router-service {__version__}, reads up to 1" in refused.message
    assert answers(a, "law-2") == other
    assert change_record(server, "law", was) == was | later
    until(lambda: names(a) == ["law", "law-2"])
    assert answers(a, "law") == before

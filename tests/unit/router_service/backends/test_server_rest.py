"""Files of snapshots on the real wire: whole ones pass, others are refused, and each failure names what to change."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from qdrant_client import grpc as q

from router_service.backends.qdrant_server.connection import Connection
from router_service.backends.qdrant_server.options import ServerOptions
from router_service.backends.qdrant_server.rest import RestSide, SnapshotFile
from router_service.backends.qdrant_server.snapshots import CollectionSnapshots
from router_service.errors import (
    BackendMisconfigured,
    BackendUnavailable,
    CollectionClosed,
    SnapshotInvalid,
    StorageError,
)
from tests import qdrant_standin
from tests.qdrant_standin import QdrantStandIn
from tests.qdrant_standin.tcp_faults import TcpFaults

CERTIFICATE = Path(qdrant_standin.__file__).with_name("localhost.pem")
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QdrantStandIn]:
    """Over TLS, with a key."""
    pair = (CERTIFICATE.with_suffix(".key").read_bytes(), CERTIFICATE.read_bytes())
    directory = tmp_path_factory.mktemp("rest") / "qdrant"
    with QdrantStandIn(directory, api_key="right", certificate=pair) as running:
        yield running


@pytest.fixture
def connection(server: QdrantStandIn) -> Iterator[Connection]:
    ca = CERTIFICATE.read_bytes()
    made = Connection(ServerOptions(server.url, "right", ca, rest_port=server.rest_port))
    yield made
    made.close()


@pytest.fixture
def snapshots(connection: Connection) -> CollectionSnapshots:
    return CollectionSnapshots(connection)


@pytest.fixture
def file(connection: Connection, snapshots: CollectionSnapshots) -> Iterator[SnapshotFile]:
    """A snapshot of an empty collection, which is dropped at the end."""
    params = q.VectorsConfig(params=q.VectorParams(size=4, distance=q.Distance.Euclid))
    create = q.CreateCollection(collection_name="a~b", vectors_config=params)
    connection.call("collections", "Create", create, TIMEOUT_S)
    yield snapshots.create("a~b", lambda: None)
    for name in names_of(connection):
        drop(connection, name)


def names_of(connection: Connection) -> list[str]:
    reply = connection.call("collections", "List", q.ListCollectionsRequest(), TIMEOUT_S)
    return sorted(each.name for each in reply.collections)


def drop(connection: Connection, name: str) -> None:
    connection.call("collections", "Delete", q.DeleteCollection(collection_name=name), TIMEOUT_S)


def changed(connection: Connection, **options: Any) -> RestSide:
    """As if the settings had been others."""
    connection.options = replace(connection.options, **options)
    return RestSide(connection)


def test_a_copy(connection: Connection, snapshots: CollectionSnapshots, file: SnapshotFile) -> None:
    seen: list[int] = []
    snapshots.read(file, seen.append)
    snapshots.restore(file, "c~d", seen.append)
    assert seen[0] == 0
    assert max(seen) in (0, file.content_bytes)
    assert names_of(connection) == ["a~b", "c~d"]
    assert snapshots.list("c~d") == []  # the upload is not kept
    assert snapshots.count("c~d") == 0


def test_snapshots_of_a_collection_that_is_gone(
    connection: Connection, snapshots: CollectionSnapshots, file: SnapshotFile
) -> None:
    with snapshots.reachable("a~b"):  # nothing happens to one that is there
        snapshots.require_listed(file)
    drop(connection, "a~b")
    with pytest.raises(CollectionClosed):
        snapshots.list("a~b")
    with snapshots.reachable("a~b"):
        snapshots.require_listed(file)
        snapshots.read(file, lambda _: None)
        snapshots.delete("a~b", file.name)
        snapshots.delete("a~b", file.name)
        with pytest.raises(SnapshotInvalid, match="any more"):
            snapshots.require_listed(file)
    assert names_of(connection) == []


@pytest.mark.parametrize(
    "wrong",
    [{"content_bytes": 10**6}, {"content_bytes": 100}, {"sha256": "0" * 64}, {"name": "nope"}],
    ids=str,
)
def test_another_file_than_was_made(
    connection: Connection, file: SnapshotFile, wrong: dict[str, Any]
) -> None:
    other = replace(file, **wrong)
    with pytest.raises(SnapshotInvalid, match=r"damaged on the server|has it no more"):
        RestSide(connection).read(other)
    with pytest.raises(SnapshotInvalid, match=r"damaged on the server|has it no more"):
        RestSide(connection).copy(other, "c~d")
    assert names_of(connection) == ["a~b"]


def test_what_the_server_refuses(connection: Connection, file: SnapshotFile) -> None:
    """Its own words are told, also when it does not read to the end."""
    with pytest.raises(StorageError, match="400"):
        RestSide(connection).copy(file, "a" * 300)


@pytest.mark.parametrize("key", [None, "wrong"])
def test_a_wrong_key(connection: Connection, file: SnapshotFile, key: str | None) -> None:
    with pytest.raises(BackendMisconfigured, match="ROUTER_SERVICE_QDRANT_API_KEY") as refused:
        changed(connection, api_key=key).read(file)
    assert "right" not in str(refused.value)
    assert "wrong" not in str(refused.value)


def test_a_certificate_that_nobody_trusts(connection: Connection, file: SnapshotFile) -> None:
    with pytest.raises(BackendMisconfigured, match="--qdrant-ca-file"):
        changed(connection, ca_certificate=None).read(file)


def test_a_port_that_is_not_rest(
    connection: Connection, file: SnapshotFile, server: QdrantStandIn
) -> None:
    for port in (9, server.port):
        with pytest.raises(BackendUnavailable, match=f":{port} .*--qdrant-rest-port"):
            changed(connection, rest_port=port).read(file)
    default = changed(connection, rest_port=None)
    assert default.url == f"https://127.0.0.1:{server.port - 1}"


def test_an_end_from_elsewhere(
    connection: Connection, file: SnapshotFile, server: QdrantStandIn
) -> None:
    with TcpFaults(server.rest_port) as proxy, ThreadPoolExecutor(1) as pool:
        proxy.slow(2000)
        rest = changed(connection, rest_port=proxy.port)
        reading = pool.submit(rest.read, file)
        until = time.monotonic() + TIMEOUT_S
        while not reading.running() and time.monotonic() < until:
            time.sleep(0.01)
        rest.abort()
        with pytest.raises(BackendUnavailable):
            reading.result(TIMEOUT_S)
        with pytest.raises(BackendUnavailable):
            rest.read(file)

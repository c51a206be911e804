"""Snapshots over gRPC, and recovery over REST."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from qdrant_client import QdrantClient, models
from standin_uses import NAME, connect, create, ids, points, refused, rows, upsert

from tests.qdrant_standin import QdrantStandIn

KEY = {"api-key": "secret"}
KEYS = rows(20)


@pytest.fixture(scope="module")
def other(directory: Path) -> Iterator[QdrantStandIn]:
    with QdrantStandIn(directory / "other", api_key="secret") as server:
        yield server


@pytest.fixture
def snapshot(client: QdrantClient) -> str:
    """Of a collection with 20 points."""
    create(client)
    client.create_payload_index(NAME, "source", "keyword")
    upsert(client, points(KEYS, source="a"))
    found = client.create_snapshot(NAME)
    assert found is not None
    return found.name


def url(server: QdrantStandIn, rest: str, name: str = NAME) -> str:
    return f"{server.rest_url}/collections/{name}/snapshots/{rest}"


def download(server: QdrantStandIn, snapshot: str) -> bytes:
    answer = httpx.get(url(server, snapshot))
    assert answer.status_code == 200
    return answer.content


def upload(server: QdrantStandIn, name: str, content: Any, **headers: str) -> httpx.Response:
    form = {"snapshot": ("from-elsewhere.snapshot", content)}
    query = "upload?priority=snapshot&wait=true"
    return httpx.post(url(server, query, name), files=form, headers=headers, timeout=60)


def recover(server: QdrantStandIn, location: str, **more: str) -> httpx.Response:
    wanted = {"location": location, **more}
    return httpx.put(url(server, "recover"), json=wanted, headers=KEY, timeout=60)


def test_create_list_delete(standin: QdrantStandIn, client: QdrantClient, snapshot: str) -> None:
    assert snapshot.startswith(f"{NAME}-")
    found = client.list_snapshots(NAME)
    content = download(standin, snapshot)
    assert [each.name for each in found] == [snapshot]
    assert found[0].size == len(content)
    assert found[0].checksum == hashlib.sha256(content).hexdigest()
    client.delete_snapshot(NAME, snapshot)
    assert client.list_snapshots(NAME) == []


def test_what_is_not_there(client: QdrantClient, snapshot: str) -> None:
    with refused(grpc.StatusCode.NOT_FOUND, "Snapshot nope not found"):
        client.delete_snapshot(NAME, "nope")
    with refused(grpc.StatusCode.NOT_FOUND, "Collection `nope` doesn't exist!"):
        client.create_snapshot("nope")


def test_an_upload_replaces_what_was_there(
    standin: QdrantStandIn, client: QdrantClient, snapshot: str
) -> None:
    client.delete(NAME, list(range(10)))
    upsert(client, points(rows(5, seed=1), first=100))
    answer = upload(standin, NAME, download(standin, snapshot))
    assert (answer.status_code, answer.json()["result"]) == (200, True)
    assert ids(client.scroll(NAME, limit=99)[0]) == list(range(20))


def test_a_recovered_collection_takes_writes(
    standin: QdrantStandIn, client: QdrantClient, snapshot: str
) -> None:
    assert upload(standin, NAME, download(standin, snapshot)).status_code == 200
    client.delete(NAME, [0, 1])
    client.set_payload(NAME, {"source": "b"}, points=[2])
    assert client.count(NAME).count == 18
    assert client.retrieve(NAME, [2])[0].payload == {"source": "b"}


def test_an_upload_creates_the_collection_elsewhere(
    standin: QdrantStandIn, other: QdrantStandIn, snapshot: str
) -> None:
    content = download(standin, snapshot)
    assert upload(other, "new", content).status_code == 401
    assert upload(other, "new", content, **KEY).status_code == 200
    other.stop()
    with QdrantStandIn(other.directory) as open_to_all, connect(open_to_all.port) as client:
        assert client.get_collection("new").payload_schema["source"].points == 20
        found = client.query_points("new", KEYS[3].tolist(), limit=1).points
        assert ids(found) == [3]
        client.delete_collection("new")
    other.start()


def test_recovery_from_another_server(
    standin: QdrantStandIn, other: QdrantStandIn, snapshot: str
) -> None:
    checksum = hashlib.sha256(download(standin, snapshot)).hexdigest()
    assert recover(other, url(standin, snapshot), checksum="0" * 64).status_code == 400
    answer = recover(other, url(standin, snapshot), checksum=checksum)
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")


def test_files_outside_the_snapshots_are_forbidden(other: QdrantStandIn, tmp_path: Path) -> None:
    outside = tmp_path / "outside.snapshot"
    outside.write_bytes(b"")
    answer = recover(other, outside.as_uri())
    assert answer.status_code == 403
    assert "must be inside the snapshots directory" in answer.json()["status"]["error"]
    assert recover(other, "file:///nope").status_code == 400


def test_a_snapshot_of_another_dimension_is_refused(
    standin: QdrantStandIn, client: QdrantClient, snapshot: str
) -> None:
    content = download(standin, snapshot)
    params = models.VectorParams(size=4, distance=models.Distance.EUCLID)
    create(client, "narrow", vectors_config=params)
    answer = upload(standin, "narrow", content)
    assert answer.status_code == 400
    assert "not compatible with existing collection" in answer.json()["status"]["error"]


def test_what_is_no_snapshot_changes_nothing(
    standin: QdrantStandIn, client: QdrantClient, snapshot: str
) -> None:
    assert upload(standin, NAME, os.urandom(5000)).status_code == 500
    assert client.count(NAME).count == 20


def test_about_and_errors(standin: QdrantStandIn, client: QdrantClient) -> None:
    about = httpx.get(standin.rest_url).json()
    assert (about["title"], about["version"]) == ("qdrant - vector search engine", "1.20.0")
    assert httpx.get(f"{standin.rest_url}/readyz").status_code == 200
    answer = httpx.get(url(standin, "x", "nope"))
    assert answer.status_code == 404
    assert answer.json()["status"]["error"] == "Not found: Collection `nope` doesn't exist!"
    assert httpx.get(f"{standin.rest_url}/telemetry").status_code == 404


def test_a_body_in_chunks(standin: QdrantStandIn, client: QdrantClient, snapshot: str) -> None:
    head = b'--xx\r\nContent-Disposition: form-data; name="snapshot"; filename="a.snapshot"\r\n\r\n'
    blocks = [head, download(standin, snapshot), b"\r\n--xx--\r\n"]
    headers = {"content-type": "multipart/form-data; boundary=xx"}
    answer = httpx.post(url(standin, "upload"), content=iter(blocks), headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text

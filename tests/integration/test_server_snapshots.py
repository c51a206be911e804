"""Snapshots of memories on a Qdrant server: made, checked, restored while lookups go on; refusals change nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from qdrant_client import grpc as q

from router_service.backends.qdrant_server.connection import Connection
from router_service.backends.qdrant_server.options import ServerOptions
from router_service.backends.qdrant_server.records import Records
from tests.integration.server_snapshots import (
    ENTRIES,
    KEY,
    LAYERS,
    METADATA,
    Admin,
    answer_of,
    channel_of,
    collections_of,
    fill,
    records_of,
    request_of,
    serve,
    write,
)
from tests.qdrant_standin import QdrantStandIn
from tests.sidecar import RBF, Sidecar, running_sidecar


@pytest.fixture(scope="module")
def server(fast_dir: Path) -> Iterator[QdrantStandIn]:
    with QdrantStandIn(fast_dir / "snapshots" / "qdrant", api_key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def service(server: QdrantStandIn, fast_dir: Path) -> Iterator[Sidecar]:
    with serve(server, fast_dir / "snapshots" / "data") as running:
        yield running
        running.stop_cleanly()


@pytest.fixture
def admin(service: Sidecar) -> Admin:
    return Admin(service)


@pytest.fixture
def memory(service: Sidecar, name: str) -> str:
    return fill(service, name)


def state_of(server: QdrantStandIn, memory: str) -> tuple[object, ...]:
    """What a refusal must leave as it was."""
    return collections_of(server, memory), records_of(server)


def directory_of(service: Sidecar, memory: str) -> Path:
    """Of a memory's snapshots."""
    return service.data / "snapshots" / memory


def test_from_creation_to_deletion(
    server: QdrantStandIn, service: Sidecar, admin: Admin, memory: str
) -> None:
    made = admin.json("snapshot", "create", memory, "--as", "monday")
    assert (made["memory"], made["name"], made["entries"]) == (memory, "monday", LAYERS * ENTRIES)
    assert Path(made["path"]) == directory_of(service, memory) / "monday"
    assert made["write_pause_ms"] == 0
    assert admin.listed(memory) == ["monday"]
    assert "whole:" in admin("snapshot", "verify", memory, "monday").stdout
    before = answer_of(service, request_of(service, memory))

    admin("delete", memory, "--source", "text-0", "--yes")
    copy = f"{memory}-copy"
    assert "already exists" in admin.refused("snapshot", "restore", memory, "monday")
    admin("snapshot", "restore", memory, "monday", "--as", copy)
    assert answer_of(service, request_of(service, copy)) == before
    admin("snapshot", "restore", memory, "monday", "--replace", "--yes")
    assert answer_of(service, request_of(service, memory)) == before
    assert len(collections_of(server, memory)) == LAYERS

    admin("snapshot", "verify", memory, "monday")  # its files were not opened
    admin("snapshot", "delete", memory, "monday", "--yes")
    assert admin.listed(memory) == []
    assert [path.name for path in directory_of(service, memory).iterdir()] == ["LOCK"]
    assert "'monday' not found" in admin.refused("snapshot", "verify", memory, "monday")
    assert len(collections_of(server, memory)) == LAYERS


def test_into_an_embedded_sidecar_and_back(
    service: Sidecar, admin: Admin, memory: str, fast_dir: Path
) -> None:
    """Packed, and by the path of the directory."""
    before = answer_of(service, request_of(service, memory))
    admin("snapshot", "create", memory, "--as", "monday")
    packed = admin.json("snapshot", "pack", memory, "monday", f"{memory}.tar")["archive"]
    with running_sidecar(fast_dir / f"embedded-{memory}") as embedded:
        there = Admin(embedded)
        there("snapshot", "restore", memory, packed)
        assert answer_of(embedded, request_of(embedded, memory)) == before
        path = there.json("snapshot", "create", memory, "--as", "tuesday")["path"]
        admin("delete", memory, "--source", "text-1", "--yes")
        admin("snapshot", "restore", memory, path, "--replace", "--yes")
        assert answer_of(service, request_of(service, memory)) == before


def test_a_directory_that_services_share(
    server: QdrantStandIn, service: Sidecar, admin: Admin, memory: str, tmp_path: Path
) -> None:
    """What another service made there is seen, and restored."""
    with serve(server, tmp_path / "data", "--snapshot-dir", str(tmp_path / "kept")) as other:
        before = answer_of(other, request_of(other, memory))
        made = Admin(other).json("snapshot", "create", memory, "--as", "monday")
        assert Path(made["path"]) == tmp_path / "kept" / memory / "monday"
        with serve(server, tmp_path / "more", "--snapshot-dir", str(tmp_path / "kept")) as third:
            assert Admin(third).listed() == ["monday"]
            admin("delete", memory, "--source", "text-0", "--yes")
            Admin(third)("snapshot", "restore", memory, "monday", "--replace", "--yes")
        assert answer_of(service, request_of(service, memory)) == before


def test_look_ups_go_on_while_a_memory_is_replaced(
    service: Sidecar, admin: Admin, memory: str
) -> None:
    """Each answer is of the old entries or of the new ones; settings and versions go with them."""
    request, seen, done = request_of(service, memory), list[bytes](), threading.Event()
    monday = answer_of(service, request)
    admin("snapshot", "create", memory, "--as", "monday")
    write(service, memory, seed=1)
    admin("memory", "set", memory, "--gamma", "0.06")
    tuesday, version = answer_of(service, request), service.describe(memory).version

    def look_up() -> None:
        while not done.is_set():
            seen.append(answer_of(service, request))

    thread = threading.Thread(target=look_up)
    thread.start()
    admin("snapshot", "restore", memory, "monday", "--replace", "--yes")
    done.set()
    thread.join()
    assert set(seen) <= {monday, tuesday}
    assert answer_of(service, request) == monday != tuesday
    assert service.describe(memory).version > version
    assert list(service.describe(memory).settings.gamma) == pytest.approx([0.05])


def test_a_deleted_memory_comes_back(service: Sidecar, admin: Admin, memory: str) -> None:
    before = answer_of(service, request_of(service, memory))
    admin("snapshot", "create", memory, "--as", "monday")
    admin("memory", "delete", memory, "--yes")
    assert admin.listed(memory) == ["monday"]
    admin("snapshot", "restore", memory, "monday")
    assert answer_of(service, request_of(service, memory)) == before
    write(service, memory, seed=3)  # what was restored takes writes


def test_two_memories(service: Sidecar, admin: Admin, memory: str) -> None:
    other = fill(service, f"{memory}-b", seed=4, model={"num_layers": 1 + LAYERS})
    admin("snapshot", "create", memory, "--as", "monday")
    named = admin.json("snapshot", "create", other)["name"]
    assert admin.listed(memory) == ["monday"]
    assert admin.listed(other) == [named]
    assert {"monday", named} <= set(admin.listed())
    taken = admin.refused("snapshot", "create", memory, "--as", "monday")
    assert "a name that no snapshot of the memory has" in taken
    refused = admin.refused(
        "snapshot", "restore", memory, "monday", "--as", other, "--replace", "--yes"
    )
    assert f"num_layers: snapshot {LAYERS}, memory {1 + LAYERS}" in refused
    admin("snapshot", "delete", memory, "monday", "--yes")
    admin("snapshot", "verify", other, named)


def test_what_is_damaged_changes_nothing(
    server: QdrantStandIn, service: Sidecar, admin: Admin, memory: str
) -> None:
    admin("snapshot", "create", memory, "--as", "monday")
    before, kept = answer_of(service, request_of(service, memory)), state_of(server, memory)
    victim = directory_of(service, memory) / "monday" / "layer-001" / "gen-000000" / "values.npz"
    whole = victim.read_bytes()
    for damage, said in ((whole[:-1], "expected"), (b"x" + whole[1:], "other content")):
        victim.write_bytes(damage)
        for command in (["verify"], ["restore", "--replace", "--yes"]):
            arguments = ("snapshot", command[0], memory, "monday", *command[1:])
            assert said in admin.refused(*arguments)
    victim.write_bytes(whole)
    assert state_of(server, memory) == kept
    assert answer_of(service, request_of(service, memory)) == before
    admin("snapshot", "verify", memory, "monday")


def test_what_the_server_refuses_leaves_nothing(
    server: QdrantStandIn, service: Sidecar, admin: Admin, memory: str
) -> None:
    admin("snapshot", "create", memory, "--as", "monday")
    kept = state_of(server, memory)
    for method, command in {
        "UpdateAliases": ("--as", f"{memory}-b"),
        "CreateFieldIndex": ("--replace", "--yes"),
        "Points/Upsert": ("--as", f"{memory}-b"),
    }.items():
        server.faults.fail(grpc.StatusCode.UNAUTHENTICATED, "Invalid API key", method)
        refused = admin.refused("snapshot", "restore", memory, "monday", *command)
        server.faults.lift()
        assert "ROUTER_SERVICE_QDRANT_API_KEY" in refused
        assert KEY not in refused
        assert state_of(server, memory) == kept
    server.faults.fail(grpc.StatusCode.UNAUTHENTICATED, "Invalid API key", "Scroll")
    refused = admin.refused("snapshot", "create", memory, "--as", "tuesday")
    server.faults.lift()
    assert "ROUTER_SERVICE_QDRANT_API_KEY" in refused
    assert state_of(server, memory) == kept
    assert admin.listed(memory) == ["monday"]
    assert f"{memory}-b" not in admin("memory", "list").stdout


def test_names_that_are_refused(admin: Admin, memory: str) -> None:
    assert "memory" in admin.refused("snapshot", "list", "../x")
    assert "snapshot" in admin.refused("snapshot", "create", memory, "--as", ".hidden")


def test_a_restored_memory_of_another_similarity(
    service: Sidecar, admin: Admin, memory: str
) -> None:
    """Its collections have another distance: they are opened anew."""
    other = f"{memory}-cosine"
    fill(service, other, seed=2, similarity=RBF + 1, gamma=[])
    admin("snapshot", "create", memory, "--as", "monday")
    before = answer_of(service, request_of(service, memory))
    admin("snapshot", "restore", memory, "monday", "--as", other, "--replace", "--yes")
    assert answer_of(service, request_of(service, other)) == before


def test_what_version_0_1_0_left_on_the_server(
    server: QdrantStandIn, service: Sidecar, admin: Admin, memory: str
) -> None:
    """It is listed with what can be done about it, and can be removed."""
    collection = collections_of(server, memory)[0]
    left_by_0_1_0(server, memory, "old", collection)
    admin("snapshot", "create", memory, "--as", "new")
    listed = admin.json("snapshot", "list", memory)["snapshots"]
    assert [each["name"] for each in listed] == ["old", "new"]
    assert "made by router-service 0.1.0" in listed[0]["problem"]
    assert listed[1]["problem"] == ""
    for command in (("verify",), ("restore", "--replace", "--yes")):
        refused = admin.refused("snapshot", command[0], memory, "old", *command[1:])
        assert "restore it with that version, or by Qdrant's own means" in refused
    assert kept_by_qdrant(server, collection)
    admin("snapshot", "delete", memory, "old", "--yes")
    assert kept_by_qdrant(server, collection) == []
    assert admin.listed(memory) == ["new"]


def left_by_0_1_0(server: QdrantStandIn, memory: str, name: str, collection: str) -> None:
    """A snapshot by Qdrant's own means, and the record of it as that version wrote it."""
    with channel_of(server) as channel:
        request = q.CreateSnapshotRequest(collection_name=collection)
        made = q.SnapshotsStub(channel).Create(request, metadata=METADATA).snapshot_description
    file = {"collection": collection, "name": made.name, "content_bytes": made.size}
    layer = {"file": file | {"sha256": made.checksum}, "entries": ENTRIES, "exact": True}
    body = {"format": 1, "record": "{}", "service_version": "0.1.0", "layers": [layer]}
    options = ServerOptions(url=server.url, api_key=KEY)
    connection = Connection(options)
    records = Records(connection, "knnmoe~snapshots")
    records.ensure()
    fields = {"kind": "snapshot", "memory": memory, "name": name, "state": "ready"}
    records.write(f"snapshot/{memory}/{name}", fields | {"body": json.dumps(body)})
    connection.close()


def kept_by_qdrant(server: QdrantStandIn, collection: str) -> list[str]:
    with channel_of(server) as channel:
        request = q.ListSnapshotsRequest(collection_name=collection)
        reply = q.SnapshotsStub(channel).List(request, metadata=METADATA)
    return [each.name for each in reply.snapshot_descriptions]

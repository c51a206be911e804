"""Snapshots of memories on a Qdrant server: made, checked, restored while lookups go on; refusals change nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.integration.server_snapshots import (
    ENTRIES,
    KEY,
    LAYERS,
    Admin,
    answer_of,
    collections_of,
    files_of,
    fill,
    records_of,
    request_of,
    serve,
    write,
)
from tests.qdrant_standin import QdrantStandIn
from tests.qdrant_standin.tcp_faults import TcpFaults
from tests.sidecar import RBF, Sidecar


@pytest.fixture(scope="module")
def server(fast_dir: Path) -> Iterator[QdrantStandIn]:
    with QdrantStandIn(fast_dir / "snapshots" / "qdrant", api_key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def rest(server: QdrantStandIn) -> Iterator[TcpFaults]:
    """Between the service and the server's REST side."""
    with TcpFaults(server.rest_port) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def service(server: QdrantStandIn, rest: TcpFaults, fast_dir: Path) -> Iterator[Sidecar]:
    flags = ["--qdrant-rest-port", str(rest.port)]
    with serve(server, fast_dir / "snapshots" / "data", *flags) as running:
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
    return collections_of(server, memory), files_of(server, memory), records_of(server)


def test_from_creation_to_deletion(
    server: QdrantStandIn, service: Sidecar, admin: Admin, memory: str
) -> None:
    made = admin.json("snapshot", "create", memory, "--as", "monday")
    assert (made["memory"], made["name"], made["entries"]) == (memory, "monday", LAYERS * ENTRIES)
    assert server.url in made["path"]
    assert made.get("remark", "") == ""
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
    assert not [path for path in files_of(server, copy) if path.suffix == ".snapshot"]

    admin("snapshot", "verify", memory, "monday")  # of collections that are gone
    admin("snapshot", "delete", memory, "monday", "--yes")
    assert admin.listed(memory) == []
    assert files_of(server, memory) == []
    assert "'monday' not found" in admin.refused("snapshot", "verify", memory, "monday")
    assert len(collections_of(server, memory)) == LAYERS


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


def test_what_is_gone_or_damaged_on_the_server(
    server: QdrantStandIn, service: Sidecar, admin: Admin, memory: str
) -> None:
    admin("snapshot", "create", memory, "--as", "monday")
    before = answer_of(service, request_of(service, memory))
    victim = [path for path in files_of(server, memory) if path.suffix == ".snapshot"][-1]
    whole, kept = victim.read_bytes(), state_of(server, memory)
    victim.write_bytes(whole[:5000] + b"damaged" + whole[5007:])
    for command in (["verify"], ["restore", "--replace", "--yes"]):
        arguments = ("snapshot", command[0], memory, "monday", *command[1:])
        assert "damaged on the server" in admin.refused(*arguments)
    victim.write_bytes(whole[:-1])
    assert "the server now lists" in admin.refused("snapshot", "verify", memory, "monday")
    victim.unlink()
    for command in (["verify"], ["restore", "--replace", "--yes"]):
        arguments = ("snapshot", command[0], memory, "monday", *command[1:])
        assert "any more" in admin.refused(*arguments)
    victim.write_bytes(whole)
    assert state_of(server, memory) == kept
    assert answer_of(service, request_of(service, memory)) == before
    admin("snapshot", "verify", memory, "monday")


def test_a_rest_side_that_is_away(
    server: QdrantStandIn, rest: TcpFaults, admin: Admin, memory: str
) -> None:
    admin("snapshot", "create", memory, "--as", "monday")
    kept = state_of(server, memory)[:2]
    rest.refuse()
    try:
        refused = admin.refused("snapshot", "restore", memory, "monday", "--as", f"{memory}-b")
    finally:
        rest.heal()
    assert "--qdrant-rest-port" in refused
    assert str(rest.port) in refused
    assert state_of(server, memory)[:2] == kept
    assert collections_of(server, f"{memory}-b") == []
    admin("snapshot", "restore", memory, "monday", "--as", f"{memory}-b")


def test_what_the_server_refuses_leaves_nothing(
    server: QdrantStandIn, service: Sidecar, admin: Admin, memory: str
) -> None:
    admin("snapshot", "create", memory, "--as", "monday")
    kept = state_of(server, memory)
    for method, command in {
        "UpdateAliases": ("--as", f"{memory}-b"),
        "CreateFieldIndex": ("--replace", "--yes"),
    }.items():
        server.faults.fail(grpc.StatusCode.INTERNAL, "no space left", method)
        assert "no space left" in admin.refused("snapshot", "restore", memory, "monday", *command)
        server.faults.lift()
        assert state_of(server, memory) == kept
    server.faults.fail(grpc.StatusCode.UNAUTHENTICATED, "Invalid API key", "Snapshots/Create")
    refused = admin.refused("snapshot", "create", memory, "--as", "tuesday")
    server.faults.lift()
    assert "ROUTER_SERVICE_QDRANT_API_KEY" in refused
    assert KEY not in refused
    assert state_of(server, memory) == kept
    assert admin.listed(memory) == ["monday"]
    assert f"{memory}-b" not in admin("memory", "list").stdout


def test_paths_are_refused_with_what_to_use_instead(admin: Admin, memory: str) -> None:
    admin("snapshot", "create", memory, "--as", "monday")
    for command in (
        ("pack", memory, "monday", "/backup/monday.tar"),
        ("verify", memory, "/backup/monday.tar"),
        ("restore", memory, "/backup/monday.tar"),
    ):
        refused = admin.refused("snapshot", *command)
        assert "router-admin export" in refused
        assert "router-admin migrate" in refused
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

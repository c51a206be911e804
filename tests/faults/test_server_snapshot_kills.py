"""SIGKILL while snapshots are made and restored on a Qdrant server: the next service finishes or removes what was left.

The server goes on with the call that it was at when the service was killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from knnmoe.v1 import snapshots_pb2 as pb
from knnmoe.v1 import snapshots_pb2_grpc

from router_service.snapshots import server_book
from router_service.snapshots.base import SnapshotRef
from tests.congruence.fast_dir import fast_dir
from tests.integration.server_snapshots import (
    KEY,
    KEY_VARIABLE,
    LAYERS,
    Admin,
    collections_of,
    fill,
    opened_snapshots,
    records_of,
    serve,
    until,
    write,
)
from tests.qdrant_standin import QdrantStandIn
from tests.sidecar import Sidecar

__all__ = ["fast_dir"]

MEMORY = "bible"
MONDAY = SnapshotRef(MEMORY, "monday")
REF = pb.SnapshotRef(memory=MEMORY, name="monday")


@pytest.fixture
def server(fast_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[QdrantStandIn]:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with QdrantStandIn(fast_dir / "qdrant", api_key=KEY) as running:
        yield running


@pytest.fixture
def service(server: QdrantStandIn, fast_dir: Path) -> Iterator[Sidecar]:
    """To be killed; with a memory, and a snapshot of it from before a write and a change of settings."""
    with serve(server, fast_dir / "data") as running:
        fill(running, MEMORY)
        yield running


@pytest.fixture
def changed(service: Sidecar) -> None:
    """The memory is no longer what its snapshot holds."""
    admin = Admin(service)
    admin("snapshot", "create", MEMORY, "--as", "monday")
    write(service, MEMORY, seed=1)
    admin("memory", "set", MEMORY, "--gamma", "0.5")


@pytest.fixture
def much_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """No work that is written down can be under way any more."""
    monkeypatch.setattr(server_book, "PATIENCE_MS", -1)


def kill_at(
    server: QdrantStandIn, service: Sidecar, method: str, call: Any, request: Any, times: int = 1
) -> None:
    """Kills the service when it has made a call to the server for the so-manieth time."""
    name = method.rsplit("/", 1)[-1]
    before = server.faults.calls[name]
    fault = server.faults.delay(0.3 if times > 1 else 30.0, method)
    begun = call(request)
    until(lambda: server.faults.calls[name] >= before + times)
    service.kill()
    begun.cancel()
    fault.lift()


def stub(service: Sidecar) -> snapshots_pb2_grpc.SnapshotServiceStub:
    return snapshots_pb2_grpc.SnapshotServiceStub(service.channel)


@pytest.mark.parametrize(
    ("method", "times"), [("Points/Scroll", 1), ("Points/Scroll", 6), ("ListCollectionAliases", 1)]
)
def test_while_a_snapshot_is_made(
    server: QdrantStandIn, service: Sidecar, method: str, times: int
) -> None:
    """At its pages, at its listings, at its end: nothing is listed, and the next one can be made."""
    request = pb.CreateSnapshotRequest(memory=MEMORY, name="monday")
    kill_at(server, service, method, stub(service).CreateSnapshot, request, times)
    with opened_snapshots(server, service.data) as (snapshots, _):
        snapshots.sweep()
        assert snapshots.list("") == []
        home = service.data / "snapshots" / MEMORY
        assert {path.name for path in home.glob("*")} <= {"LOCK"}
        [made] = snapshots.create(MEMORY, "monday", lambda *_: None)
        assert snapshots.list(MEMORY) == list(snapshots.verify(MONDAY, lambda *_: None)) == [made]


@pytest.mark.usefixtures("changed", "much_later")
@pytest.mark.parametrize(("method", "times"), [("CreateFieldIndex", 1), ("Points/Upsert", 4)])
def test_while_collections_are_filled(
    server: QdrantStandIn, service: Sidecar, method: str, times: int
) -> None:
    """What served before serves on."""
    request = pb.RestoreSnapshotRequest(snapshot=REF, as_memory=MEMORY, replace=True)
    before = collections_of(server, MEMORY)
    kill_at(server, service, method, stub(service).RestoreSnapshot, request, times)
    assert len(collections_of(server, MEMORY)) > LAYERS
    with opened_snapshots(server, service.data) as (snapshot_store, store):
        snapshot_store.sweep()
        assert store.get(MEMORY).record.settings.gamma == (0.5,)
        assert (collections_of(server, MEMORY), records_of(server)) == (before, 0)
        assert [path.name for path in (service.data / "snapshots").iterdir()] == [MEMORY]


@pytest.mark.usefixtures("changed")
def test_between_the_names_and_the_record(
    server: QdrantStandIn, service: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names lead to what was restored: its settings follow at the next start, and the old entries go."""
    request = pb.RestoreSnapshotRequest(snapshot=REF, as_memory=MEMORY, replace=True)
    before = set(collections_of(server, MEMORY))
    kill_at(server, service, "UpdateAliases", stub(service).RestoreSnapshot, request)
    with opened_snapshots(server, service.data) as (snapshot_store, store):
        snapshot_store.sweep()
        assert store.get(MEMORY).record.settings.gamma == (0.05,)
        monkeypatch.setattr(server_book, "PATIENCE_MS", -1)
        snapshot_store.sweep()
        now = set(collections_of(server, MEMORY))
        assert len(now) == LAYERS
        assert now.isdisjoint(before)
        assert records_of(server) == 0
        [info] = snapshot_store.list(MEMORY)
        assert info.entries == sum(layer.info().entries for layer in store.get(MEMORY).layers)

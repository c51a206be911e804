"""Files that a client names, and the service's own: no hang, no INTERNAL, nothing overwritten, none for others."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest
from grpc import StatusCode
from knnmoe.v1 import operations_pb2 as operations_pb
from knnmoe.v1 import operations_pb2_grpc, snapshots_pb2_grpc
from knnmoe.v1 import snapshots_pb2 as pb

from tests.sidecar import (
    CALL_TIMEOUT_S,
    LOGIT_DELTA,
    Sidecar,
    random_entries,
    refusal,
    running_sidecar,
    serve_and_fail,
)

KEY = "s3cr3t-k3y"


def _snapshots(sidecar: Sidecar) -> snapshots_pb2_grpc.SnapshotServiceStub:
    return snapshots_pb2_grpc.SnapshotServiceStub(sidecar.channel)


def _filled(sidecar: Sidecar, name: str) -> None:
    sidecar.create(name, model={"num_layers": 1})
    sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, 20))
    request = pb.CreateSnapshotRequest(memory=name, name="monday")
    list(_snapshots(sidecar).CreateSnapshot(request, timeout=CALL_TIMEOUT_S))


@pytest.fixture
def odd(tmp_path: Path) -> dict[str, Path]:
    """What is no snapshot, by what it is."""
    places = {name: tmp_path / name for name in ("fifo", "socket", "link", "empty", "noise")}
    os.mkfifo(places["fifo"])
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(places["socket"]))
    places["link"].symlink_to(places["fifo"])
    places["empty"].touch()
    places["noise"].write_bytes(b"private words of this machine" * 100)
    return places | {
        "nothing": tmp_path / "nothing",
        "below a file": places["noise"] / "x",
        "device": Path("/dev/zero"),
        "environment": Path("/proc/self/environ"),
        "directory": tmp_path,
        "long": Path("/" + "x" * 300),
    }


def test_paths_that_are_no_snapshots(
    edge_sidecar: Sidecar, name: str, odd: dict[str, Path]
) -> None:
    _filled(edge_sidecar, name)
    snapshots = _snapshots(edge_sidecar)
    for what, path in odd.items():
        ref = pb.SnapshotRef(memory=name, path=str(path))
        calls = (
            (snapshots.VerifySnapshot, pb.VerifySnapshotRequest(snapshot=ref)),
            (snapshots.RestoreSnapshot, pb.RestoreSnapshotRequest(snapshot=ref, as_memory="new")),
        )
        for call, request in calls:
            error = refusal(call, request)
            expected = (StatusCode.INVALID_ARGUMENT, StatusCode.NOT_FOUND, StatusCode.DATA_LOSS)
            assert error.code in expected, (what, error)
            assert "private" not in error.message
    whole = pb.VerifySnapshotRequest(snapshot=pb.SnapshotRef(memory=name, name="monday"))
    replies = list(snapshots.VerifySnapshot(whole, timeout=CALL_TIMEOUT_S))
    assert max(reply.snapshot.entries for reply in replies) == 20


def test_packing_outside_of_the_directory_of_archives(
    edge_sidecar: Sidecar, name: str, odd: dict[str, Path]
) -> None:
    _filled(edge_sidecar, name)
    places = [*map(str, odd.values()), "../x", "a/b", "", str(edge_sidecar.data / "memories" / "x")]
    for path in places:
        request = pb.PackSnapshotRequest(memory=name, name="monday", path=path)
        error = refusal(_snapshots(edge_sidecar).PackSnapshot, request)
        assert error.code is StatusCode.INVALID_ARGUMENT, (path, error)
        assert error.metadata["field"] == "path"
    assert not (edge_sidecar.data / "memories" / "x").exists()


def test_no_operation_outlasts_the_service(data: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with running_sidecar(data) as sidecar:
        _filled(sidecar, "bible")
        ref = pb.SnapshotRef(memory="bible", path=str(tmp_path / "fifo"))
        refusal(_snapshots(sidecar).VerifySnapshot, pb.VerifySnapshotRequest(snapshot=ref))
        operations = operations_pb2_grpc.OperationServiceStub(sidecar.channel)
        listed = operations.ListOperations(operations_pb.ListOperationsRequest())
        states = {operation.state for operation in listed.operations}
        assert operations_pb.OPERATION_STATE_RUNNING not in states


def test_no_restored_memory_has_a_name_of_the_service(edge_sidecar: Sidecar, name: str) -> None:
    _filled(edge_sidecar, name)
    ref = pb.SnapshotRef(memory=name, name="monday")
    for reserved in ("LOCK", "lock", "CURRENT", "gen-1", "x.deleted"):
        request = pb.RestoreSnapshotRequest(snapshot=ref, as_memory=reserved)
        error = refusal(_snapshots(edge_sidecar).RestoreSnapshot, request)
        assert (error.code, error.metadata["field"]) == (StatusCode.INVALID_ARGUMENT, "name")
    request = pb.CreateSnapshotRequest(memory=name, name="Lock")
    error = refusal(_snapshots(edge_sidecar).CreateSnapshot, request)
    assert (error.code, error.metadata["field"]) == (StatusCode.INVALID_ARGUMENT, "snapshot")


def test_files_are_the_services_own(data: Path) -> None:
    before = os.umask(0o022)  # which the service inherits
    try:
        with running_sidecar(data, flags=["--isolate-above-mib", "0"]) as sidecar:
            _filled(sidecar, "bible")
            request = pb.PackSnapshotRequest(memory="bible", name="monday", path="monday.tar")
            list(_snapshots(sidecar).PackSnapshot(request, timeout=CALL_TIMEOUT_S))
    finally:
        os.umask(before)
    paths = [data, *data.rglob("*")]
    assert {"packs", "snapshots", "memories"} <= {path.name for path in paths}
    assert [path for path in paths if stat.S_IMODE(path.stat().st_mode) & 0o077] == []


def test_directories_of_an_earlier_version_are_closed_to_others(data: Path) -> None:
    for name in ("memories", "snapshots"):
        (data / name).mkdir(parents=True)
        (data / name).chmod(0o755)
    with running_sidecar(data) as sidecar:
        _filled(sidecar, "bible")
    for name in ("memories", "snapshots"):
        assert stat.S_IMODE((data / name).stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "place",
    [
        f"http://user:{KEY}@localhost:6334",
        f"http://{KEY}@localhost:6334",
        f"https://user:p@ss{KEY}@localhost",
        f"grpc://user:{KEY}@localhost:6334",
        f"user:{KEY}@localhost:6334",
        f"http://localhost:6334?api_key={KEY}",
        f"http://localhost:6334/#{KEY}",
    ],
)
@pytest.mark.parametrize("by", ["flag", "environment"])
def test_a_key_in_the_url_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, place: str, by: str
) -> None:
    if by == "environment":
        monkeypatch.setenv("ROUTER_SERVICE_BACKEND", place)
    refused = serve_and_fail(*(["--backend", place] if by == "flag" else []))
    assert refused.returncode == 2
    assert ("ROUTER_SERVICE_BACKEND" if by == "environment" else "--backend") in refused.stderr
    assert KEY not in refused.stderr + refused.stdout
    if place.startswith("http"):
        assert "ROUTER_SERVICE_QDRANT_API_KEY" in refused.stderr

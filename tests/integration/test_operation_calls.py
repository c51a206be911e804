"""Long calls as operations: watched, refused beside each other, cancelled by anyone, ended when nobody listens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from knnmoe import channels
from knnmoe.client import service_error
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import operations_pb2 as pb
from knnmoe.v1 import operations_pb2_grpc, retention_pb2, retention_pb2_grpc

from tests.integration.refusals import Case, assert_refused
from tests.sidecar import (
    CALL_TIMEOUT_S,
    EXIT_TIMEOUT_S,
    LOGIT_DELTA,
    Sidecar,
    random_entries,
    refusal,
)

# In RAM every distance is computed: finding 6,000 entries' neighbours takes seconds.
SLOW = retention_pb2.PrunePlan(agreement_below=1.0)
ROWS = 6000


@pytest.fixture
def slow(ram_sidecar: Sidecar, name: str) -> str:
    """A memory whose pruning takes a while."""
    ram_sidecar.create(name, kind=LOGIT_DELTA, gamma=[0.05])
    ram_sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, ROWS))
    return name


def _prune(sidecar: Sidecar, name: str, *, dry_run: bool = False) -> Any:
    stub = retention_pb2_grpc.RetentionServiceStub(sidecar.channel)
    request = retention_pb2.PruneRequest(memory=name, plan=SLOW, dry_run=dry_run)
    return stub.Prune(request, timeout=CALL_TIMEOUT_S)


def _operations(sidecar: Sidecar) -> operations_pb2_grpc.OperationServiceStub:
    return operations_pb2_grpc.OperationServiceStub(sidecar.channel)


def _get(sidecar: Sidecar, operation_id: str) -> pb.Operation:
    request = pb.GetOperationRequest(id=operation_id)
    return _operations(sidecar).GetOperation(request, timeout=CALL_TIMEOUT_S).operation


def _ended(sidecar: Sidecar, operation_id: str) -> pb.Operation:
    deadline = time.monotonic() + CALL_TIMEOUT_S
    while (found := _get(sidecar, operation_id)).state == pb.OPERATION_STATE_RUNNING:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


@pytest.fixture
def running(ram_sidecar: Sidecar, slow: str) -> Iterator[tuple[Any, pb.Operation]]:
    """A prune under way: its stream, and the operation that its first message named."""
    call = _prune(ram_sidecar, slow)
    operation = next(call).operation
    assert operation.state == pb.OPERATION_STATE_RUNNING
    yield call, operation
    call.cancel()
    _ended(ram_sidecar, operation.id)


def test_progress_is_told(ram_sidecar: Sidecar, running: tuple[Any, pb.Operation]) -> None:
    call, operation = running
    seen = next(reply.operation for reply in call if "agreement" in reply.operation.stage)
    assert seen.id == operation.id
    assert 0 <= seen.done <= seen.total == ROWS
    request = pb.ListOperationsRequest(memory=operation.memory)
    [listed] = _operations(ram_sidecar).ListOperations(request, timeout=CALL_TIMEOUT_S).operations
    assert (listed.id, listed.kind, listed.state) == (
        operation.id,
        "prune",
        pb.OPERATION_STATE_RUNNING,
    )
    assert listed.started_unix_ms > 0
    assert listed.ended_unix_ms == 0


def test_another_client_cancels(
    ram_sidecar: Sidecar, slow: str, running: tuple[Any, pb.Operation]
) -> None:
    call, operation = running
    with channels.open_channel(ram_sidecar.target) as channel:
        stub = operations_pb2_grpc.OperationServiceStub(channel)
        stub.CancelOperation(pb.CancelOperationRequest(id=operation.id), timeout=CALL_TIMEOUT_S)
    with pytest.raises(grpc.RpcError) as failed:
        list(call)
    error = service_error(failed.value)
    words = ("prune was cancelled: a client asked for it",)
    assert_refused(error, Case(print, StatusCode.CANCELLED, "CANCELLED", words))
    ended = _get(ram_sidecar, operation.id)
    assert ended.state == pb.OPERATION_STATE_CANCELLED
    assert "a client asked for it" in ended.error
    assert ended.ended_unix_ms >= ended.started_unix_ms
    assert ram_sidecar.describe(slow).layers[0].entries == ROWS


def test_a_client_that_goes_away_ends_it(
    ram_sidecar: Sidecar, slow: str, running: tuple[Any, pb.Operation]
) -> None:
    call, operation = running
    call.cancel()
    ended = _ended(ram_sidecar, operation.id)
    assert ended.state == pb.OPERATION_STATE_CANCELLED
    assert "its client went away" in ended.error
    assert ram_sidecar.describe(slow).layers[0].entries == ROWS
    assert "Traceback" not in ram_sidecar.stderr


def test_one_at_a_time(ram_sidecar: Sidecar, slow: str, running: tuple[Any, pb.Operation]) -> None:
    _, operation = running
    words = (f"operation {operation.id} (prune,", f"router-admin operations cancel {operation.id}")
    busy = Case(print, StatusCode.UNAVAILABLE, "BUSY", words)
    optimize = admin_pb.OptimizeRequest(memory=slow)
    assert_refused(refusal(ram_sidecar.admin.Optimize, optimize), busy)
    dry = _prune(ram_sidecar, slow, dry_run=True)
    assert next(dry).operation.kind == "prune-dry-run"
    dry.cancel()


@pytest.mark.parametrize("call", ["GetOperation", "CancelOperation"])
@pytest.mark.parametrize("unknown", ["", "nope", "x" * 5000])
def test_unknown_operations(ram_sidecar: Sidecar, call: str, unknown: str) -> None:
    make: Callable[..., Any] = getattr(pb, f"{call}Request")
    error = refusal(getattr(_operations(ram_sidecar), call), make(id=unknown))
    words = ("not found", "router-admin operations list")
    assert_refused(error, Case(print, StatusCode.NOT_FOUND, "OPERATION_NOT_FOUND", words))


def test_optimize_is_an_operation(sidecar: Sidecar, name: str) -> None:
    sidecar.create(name, kind=LOGIT_DELTA, model={"num_layers": 2})
    sidecar.upsert(name, 1, random_entries(LOGIT_DELTA, 30))
    request = admin_pb.OptimizeRequest(memory=name, quantization="int8")
    replies = list(sidecar.admin.Optimize(request, timeout=CALL_TIMEOUT_S))
    finished = [reply for reply in replies if reply.HasField("layer")]
    layers = [(one.layer.layer, one.layer.entries, one.layer.quantization) for one in finished]
    assert sorted(layers) == [(0, 0, "int8"), (1, 30, "int8")]  # they are indexed side by side
    assert {reply.operation.id for reply in replies} == {replies[0].operation.id}
    assert replies[-1].operation.state == pb.OPERATION_STATE_DONE
    assert _get(sidecar, replies[0].operation.id).kind == "optimize"


def test_the_stop_of_the_service_ends_it(data: Path) -> None:
    """Within moments, not after --drain-s."""
    with Sidecar(data, backend="exact", flags=("--drain-s", "300")) as sidecar:
        sidecar.create("m", kind=LOGIT_DELTA, gamma=[0.05])
        sidecar.upsert("m", 0, random_entries(LOGIT_DELTA, ROWS))
        call = _prune(sidecar, "m")
        next(call)
        sidecar.process.terminate()
        with pytest.raises(grpc.RpcError) as failed:
            list(call)
        words = ("prune was cancelled: the service stops",)
        case = Case(print, StatusCode.CANCELLED, "CANCELLED", words)
        assert_refused(service_error(failed.value), case)
        sidecar.close_channel()
        assert sidecar.process.wait(EXIT_TIMEOUT_S) == 0
        assert "Traceback" not in sidecar.stderr


def test_calibration_is_watched_and_says_what_the_call_says(sidecar: Sidecar, name: str) -> None:
    sidecar.create(name, kind=LOGIT_DELTA, gamma=[0.05])
    for layer, rows in ((0, 60), (2, 40)):
        sidecar.upsert(name, layer, random_entries(LOGIT_DELTA, rows, seed=layer))
    unary = admin_pb.CalibrateRequest(memory=name, lambda0=0.5, dry_run=True)
    expected = sidecar.admin.Calibrate(unary, timeout=CALL_TIMEOUT_S)
    request = admin_pb.CalibrateWatchedRequest(memory=name, lambda0=0.5, dry_run=True)
    replies = list(sidecar.admin.CalibrateWatched(request, timeout=CALL_TIMEOUT_S))
    [found] = [each.calibration for each in replies if each.HasField("calibration")]
    assert found == expected
    last = replies[-1].operation
    assert (last.kind, last.stage) == ("calibrate", "layer 2: compare")
    assert (last.done, last.total) == (40, 40)
    assert list(sidecar.describe(name).settings.gamma) == [pytest.approx(0.05)]
    request.dry_run = False
    list(sidecar.admin.CalibrateWatched(request, timeout=CALL_TIMEOUT_S))
    gamma = sidecar.describe(name).settings.gamma
    assert [gamma[layer.layer] for layer in expected.layers] == [
        pytest.approx(layer.gamma) for layer in expected.layers
    ]

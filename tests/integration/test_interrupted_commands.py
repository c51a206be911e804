"""Ctrl-C at `router-admin`: the operation ends, the memory is sound, and the exit code says so."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from knnmoe.v1 import operations_pb2 as pb
from knnmoe.v1 import operations_pb2_grpc

from tests.sidecar import CALL_TIMEOUT_S, LOGIT_DELTA, Sidecar, exported, random_entries

SCRIPT = Path(sys.executable).with_name("router-admin")


def _begin(sidecar: Sidecar, *arguments: str) -> subprocess.Popen[str]:
    command = [SCRIPT, "--target", sidecar.target, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait_until(sidecar: Sidecar, name: str, state: int) -> pb.Operation:
    """The only operation on a memory, when it is in that state."""
    stub = operations_pb2_grpc.OperationServiceStub(sidecar.channel)
    request = pb.ListOperationsRequest(memory=name)
    deadline = time.monotonic() + CALL_TIMEOUT_S
    while True:
        found = stub.ListOperations(request, timeout=CALL_TIMEOUT_S).operations
        if found and found[0].state == state:
            return found[0]
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def _interrupted(sidecar: Sidecar, name: str, *arguments: str) -> tuple[int, str, pb.Operation]:
    """Exit code and stderr of a command that gets SIGINT while its operation runs, and how that ended."""
    with _begin(sidecar, *arguments) as process:
        _wait_until(sidecar, name, pb.OPERATION_STATE_RUNNING)
        with sidecar.paused():  # the operation does not end before the signal is there
            process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=CALL_TIMEOUT_S)
    assert stdout == ""
    assert "Traceback" not in stderr
    return process.returncode, stderr, _wait_until(sidecar, name, pb.OPERATION_STATE_CANCELLED)


def test_prune(ram_sidecar: Sidecar, name: str) -> None:
    ram_sidecar.create(name, kind=LOGIT_DELTA, gamma=[0.05])
    ram_sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, 5000))
    arguments = ("prune", name, "--disagreeing-below", "1", "--yes")
    code, stderr, operation = _interrupted(ram_sidecar, name, *arguments)
    assert code == 130
    assert f"cancelling operation {operation.id}" in stderr
    assert "router-admin: interrupted: prune was cancelled" in stderr
    assert ram_sidecar.describe(name).layers[0].entries == 5000


def test_optimize(edge_sidecar: Sidecar, name: str) -> None:
    edge_sidecar.create(name, kind=LOGIT_DELTA, gamma=[0.05])
    for layer in range(3):
        edge_sidecar.upsert(name, layer, random_entries(LOGIT_DELTA, 200))
    before = [entries.ids for layer in range(3) for entries in exported(edge_sidecar, name, layer)]
    arguments = ("optimize", name, "--quantization", "int8")
    code, stderr, _ = _interrupted(edge_sidecar, name, *arguments)
    assert code == 130
    assert "optimize was cancelled" in stderr
    after = [entries.ids for layer in range(3) for entries in exported(edge_sidecar, name, layer)]
    assert after == before
    with _begin(edge_sidecar, *arguments) as process:
        assert process.wait(CALL_TIMEOUT_S) == 0
    assert [layer.indexed_entries for layer in edge_sidecar.describe(name).layers] == [200] * 3


def test_a_command_that_dies_takes_its_operation_along(ram_sidecar: Sidecar, name: str) -> None:
    ram_sidecar.create(name, kind=LOGIT_DELTA, gamma=[0.05])
    ram_sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, 5000))
    with _begin(ram_sidecar, "prune", name, "--disagreeing-below", "1", "--yes") as process:
        _wait_until(ram_sidecar, name, pb.OPERATION_STATE_RUNNING)
        process.kill()
        process.communicate(timeout=CALL_TIMEOUT_S)
    ended = _wait_until(ram_sidecar, name, pb.OPERATION_STATE_CANCELLED)
    assert "its client went away" in ended.error
    assert ram_sidecar.describe(name).layers[0].entries == 5000

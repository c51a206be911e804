"""What was acknowledged is there after SIGKILL and SIGTERM; what was deleted is not; damage is set aside."""

from __future__ import annotations

import os
import queue
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import routing_pb2 as routing_pb

from tests.sidecar import (
    ASSIGNMENT,
    CALL_TIMEOUT_S,
    EXPERTS,
    LOGIT_DELTA,
    Sidecar,
    exported,
    random_entries,
    random_keys,
    refusal,
    route_request,
    running_sidecar,
    serve_and_fail,
)

ONE_LAYER = {"num_layers": 1}


def _look_up(sidecar: Sidecar, name: str = "m") -> bytes:
    """The answer to a fixed request, without what may differ between runs."""
    rng = np.random.default_rng(1)
    digest = sidecar.describe(name).model_digest
    inputs, own = random_keys(rng, 5), random_keys(rng, 5, EXPERTS)
    reply = sidecar.route(
        route_request(name, digest, inputs, own, neighbours=7, with_neighbours=True)
    )
    reply.ClearField("times")
    reply.ClearField("memory_version")
    return reply.SerializeToString(deterministic=True)


def _delete(sidecar: Sidecar, name: str) -> int:
    request = admin_pb.DeleteMemoryRequest(memory=name)
    return sidecar.admin.DeleteMemory(request, timeout=CALL_TIMEOUT_S).entries


def _names(sidecar: Sidecar) -> list[str]:
    reply = sidecar.admin.ListMemories(admin_pb.ListMemoriesRequest(), timeout=CALL_TIMEOUT_S)
    return [memory.name for memory in reply.memories]


@pytest.mark.parametrize("fsync", [False, True], ids=["process", "fsync"])
def test_acknowledged_entries_survive_sigkill(data: Path, fsync: bool) -> None:
    with Sidecar(data) as sidecar:
        sidecar.create("m", model=ONE_LAYER, gamma=[0.05])
        for batch in range(3):
            entries = random_entries(LOGIT_DELTA, 40, seed=batch, first_id=1 + 40 * batch)
            assert sidecar.upsert("m", 0, entries, fsync=fsync).upserted == 40
        before, answer = exported(sidecar, "m", 0), _look_up(sidecar)
        sidecar.upsert("m", 0, random_entries(LOGIT_DELTA, 40, seed=2, first_id=81), fsync=fsync)
        sidecar.kill()
    with running_sidecar(data) as sidecar:
        assert sidecar.describe("m").layers[0].entries == 120
        assert _without_times(exported(sidecar, "m", 0)) == _without_times(before)
        assert _look_up(sidecar) == answer or _differs_only_in_times(sidecar, answer)


def _without_times(parts: list[admin_pb.Entries]) -> list[admin_pb.Entries]:
    for part in parts:
        for origin in part.provenance:
            origin.created_unix_ms = 0
    return parts


def _differs_only_in_times(sidecar: Sidecar, answer: bytes) -> bool:
    replies = [routing_pb.RouteResponse.FromString(b) for b in (answer, _look_up(sidecar))]
    for reply in replies:
        for origin in reply.neighbours.provenance.values():
            origin.created_unix_ms = 0
    return replies[0] == replies[1]


def test_a_stream_in_use_is_drained_on_sigterm(data: Path) -> None:
    with Sidecar(data, flags=["--drain-s", "60"]) as sidecar:
        digest = sidecar.create("m", model=ONE_LAYER)
        sidecar.upsert("m", 0, random_entries(LOGIT_DELTA, 10))
        rng = np.random.default_rng(2)
        request = route_request("m", digest, random_keys(rng, 3), random_keys(rng, 3, EXPERTS))
        asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stream = sidecar.routing.RouteStream(iter(asked.get, None), timeout=CALL_TIMEOUT_S)
        asked.put(request)
        assert next(stream).HasField("lambdas")
        sidecar.process.terminate()
        asked.put(request)
        assert next(stream).HasField("lambdas")
        asked.put(None)
        assert list(stream) == []
        sidecar.close_channel()
        assert sidecar.process.wait(60) == 0, sidecar.stderr
        assert "Traceback" not in sidecar.stderr
    with running_sidecar(data) as sidecar:
        assert sidecar.describe("m").layers[0].entries == 10


def test_several_memories_come_back_as_they_were(data: Path) -> None:
    with running_sidecar(data) as sidecar:
        sidecar.create("deltas", model=ONE_LAYER, neighbours=5, gamma=[0.25])
        sidecar.create("paper", model=ONE_LAYER, preset="paper")
        sidecar.upsert("deltas", 0, random_entries(LOGIT_DELTA, 30))
        sidecar.upsert("paper", 0, random_entries(ASSIGNMENT, 20))
        before = [sidecar.describe(name) for name in ("deltas", "paper")]
    with running_sidecar(data) as sidecar:
        after = [sidecar.describe(name) for name in ("deltas", "paper")]
    for memory in before + after:
        memory.ClearField("version")  # counted from the start of the service
        memory.ClearField("epoch")  # another after each start
    assert after == before


def test_a_deleted_memory_does_not_come_back(data: Path) -> None:
    with Sidecar(data) as sidecar:
        for name in ("kept", "gone"):
            sidecar.create(name, model=ONE_LAYER)
            sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, 10))
        assert _delete(sidecar, "gone") == 10
        sidecar.kill()
    assert sorted(path.name for path in (data / "memories").iterdir()) == ["LOCK", "kept"]
    with running_sidecar(data) as sidecar:
        assert _names(sidecar) == ["kept"]
        sidecar.create("gone", model=ONE_LAYER)
        assert sidecar.describe("gone").layers[0].entries == 0


def test_what_a_crash_left_behind_is_removed_and_damage_is_set_aside(data: Path) -> None:
    memories = data / "memories"
    with running_sidecar(data) as sidecar:
        for name in ("good", "cut", "lost", "torn"):
            sidecar.create(name, model=ONE_LAYER)
            sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, 10))
    shutil.copytree(memories / "good", memories / "copied")
    shutil.copytree(memories / "good", memories / "half.deleted")
    (memories / "unfinished").mkdir()
    (memories / "unfinished" / "CREATING").touch()
    (memories / "cut" / "memory.json").write_text('{"format": 1, "na')
    (memories / "lost" / "memory.json").unlink()
    shutil.rmtree(memories / "torn" / "layer-000")
    with running_sidecar(data) as sidecar:
        assert _names(sidecar) == ["good"]
        for name in ("copied", "cut", "lost", "torn"):
            error = refusal(
                sidecar.admin.DescribeMemory, admin_pb.DescribeMemoryRequest(memory=name)
            )
            assert error.reason == "ERROR_REASON_CORRUPT", error
            assert "set aside" in error.message
            assert (memories / name).is_dir()
        create = admin_pb.CreateMemoryRequest(name="lost", fingerprint=_fingerprint(sidecar))
        error = refusal(sidecar.admin.CreateMemory, create)
        assert error.reason == "ERROR_REASON_CORRUPT", error
    assert not (memories / "unfinished").exists()
    assert not (memories / "half.deleted").exists()


def _fingerprint(sidecar: Sidecar) -> Any:
    return sidecar.describe("good").fingerprint


def test_a_second_service_on_the_same_directory_is_refused(data: Path) -> None:
    with running_sidecar(data) as sidecar:
        second = serve_and_fail("--data", str(data), "--listen", "127.0.0.1:0")
        assert second.returncode == 1
        assert "in use by process" in second.stderr
        assert str(sidecar.process.pid) in second.stderr
        assert "Traceback" not in second.stderr
        assert sidecar.create("still-serving", model=ONE_LAYER)


def _bound_by_modes() -> list[str]:
    """What makes a command obey file modes: root has to give up the right to ignore them."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root ignores file modes, and setpriv (util-linux) is not here to change that")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]


def test_a_directory_that_cannot_be_written_is_a_clear_error() -> None:
    directory = Path(tempfile.mkdtemp(prefix="knnmoe-read-only-"))
    try:
        directory.chmod(0o555)
        data = str(directory / "data")
        refused = serve_and_fail(
            "--data", data, "--listen", "127.0.0.1:0", prefix=_bound_by_modes()
        )
    finally:
        directory.chmod(0o755)
        shutil.rmtree(directory)
    assert refused.returncode == 1, refused.stderr
    assert f"router-service: cannot open {directory}/data" in refused.stderr
    assert "Permission denied" in refused.stderr
    assert "Traceback" not in refused.stderr

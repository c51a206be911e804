"""What was acknowledged is there after kill -9, wherever it strikes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from router_service.backends.edge.backend import EdgeBackend
from router_service.errors import OutOfDescriptors
from tests.unit.router_service.backends.numbered_entries import SPEC, assert_holds

# Does not end by itself, however fast the machine.
SERVICE = """
import signal
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.unit.router_service.backends.numbered_entries import SPEC, numbered_entries
from router_service.backends.base import Compression, Quantization
from router_service.backends.edge.backend import EdgeBackend
from tests.unit.router_service.backends.numbered_entries import SPEC, numbered_entries

backend = EdgeBackend(Path(sys.argv[1]), min_free_bytes=0)
collection = backend.create("layer", SPEC)
for start in range(0, 100_000, 700):
    collection.upsert(numbered_entries(start, start + 700), fsync=start == 1400)
    print(start + 700, flush=True)
    if start + 700 == int(sys.argv[2]):
        print("optimizing", flush=True)
        collection.optimize(Compression(Quantization.INT8))
        print("optimized", flush=True)
signal.pause()
"""


def start_service(data_dir: Path, optimize_at: int = 0) -> subprocess.Popen[str]:
    arguments = [str(data_dir), str(optimize_at)]
    return subprocess.Popen(
        [sys.executable, "-c", SERVICE, *arguments], stdout=subprocess.PIPE, text=True
    )


def kill_after(service: subprocess.Popen[str], line: str, delay_s: float) -> list[str]:
    """The lines that the service wrote before SIGKILL reached it, `delay_s` after `line`."""
    assert service.stdout is not None
    seen = []
    for text in service.stdout:
        seen.append(text.strip())
        if seen[-1] == line:
            break
    time.sleep(delay_s)
    service.kill()
    seen += [text.strip() for text in service.stdout]
    service.stdout.close()
    assert service.wait() == -signal.SIGKILL
    return seen


def assert_acknowledged_entries_are_there(data_dir: Path, acknowledged: int) -> None:
    backend = EdgeBackend(data_dir, min_free_bytes=0)
    collection = backend.open("layer", SPEC)
    stored = collection.info().entries
    assert acknowledged <= stored <= acknowledged + 700  # an update in flight may have been written
    assert_holds(collection, stored)
    backend.close()


@pytest.mark.parametrize("delay_s", [0.0, 0.003, 0.017])
def test_kill_while_writing(data_dir: Path, delay_s: float) -> None:
    seen = kill_after(start_service(data_dir), "3500", delay_s)
    assert_acknowledged_entries_are_there(data_dir, int(seen[-1]))


@pytest.mark.parametrize("isolate_above_bytes", [0, 2**30])
def test_without_descriptors_it_is_not_opened_and_not_damaged(
    data_dir: Path, isolate_above_bytes: int
) -> None:
    """Neither here nor in a process of its own, whichever file it is that there is none for."""
    seen = kill_after(start_service(data_dir), "1400", 0.0)
    before, refused = resource.getrlimit(resource.RLIMIT_NOFILE), []
    for free in range(5):
        backend = EdgeBackend(data_dir, min_free_bytes=0, isolate_above_bytes=isolate_above_bytes)
        used = len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH208  # its own is gone
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + free, before[1]))
        try:
            assert not backend.open("layer", SPEC).info().damage
        except OutOfDescriptors as error:
            assert "ulimit -n" in str(error)  # noqa: PT017  # with some left it is opened
            refused.append(free)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            backend.close()
    assert refused
    assert_acknowledged_entries_are_there(data_dir, int(seen[-1]))


@pytest.mark.parametrize("delay_s", [0.0, 0.1, 0.4, 0.8])
def test_kill_while_optimizing(data_dir: Path, delay_s: float) -> None:
    seen = kill_after(start_service(data_dir, optimize_at=2100), "optimizing", delay_s)
    acknowledged = max(int(text) for text in seen if text.isdigit())
    assert_acknowledged_entries_are_there(data_dir, acknowledged)
    assert len(list((data_dir / "layer").glob("gen-*"))) == 1


def test_the_child_dies_with_the_service(data_dir: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("PR_SET_PDEATHSIG is Linux only")
    service = start_service(data_dir, optimize_at=7000)
    assert service.stdout is not None
    while service.stdout.readline().strip() != "optimizing":
        pass
    child = _wait_for_child_at_work(service.pid)
    os.kill(child, signal.SIGSTOP)  # so that it cannot come to its own end
    service.kill()
    service.wait()
    service.stdout.close()
    try:
        assert _is_gone_within(child, timeout_s=60)
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _wait_for_child_at_work(parent: int) -> int:
    """The process id of the child once the engine has begun threads, long after it asked to die with its parent."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for path in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            if len(list(Path(f"/proc/{path}/task").glob("*"))) > 1:
                return int(path)
        time.sleep(0.002)
    raise AssertionError("no child was seen")


def _is_gone_within(process: int, timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # killed; nobody collected it yet
            return True
        time.sleep(0.01)
    return False

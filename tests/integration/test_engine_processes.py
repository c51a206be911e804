"""Layers whose engine has a process of its own: as many as --workers allows, and none outlives the service."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.sidecar import LAYERS, LOGIT_DELTA, Sidecar, random_entries, running_sidecar

ISOLATE_ALL = ("--isolate-above-mib", "0")


def engine_processes(sidecar: Sidecar) -> list[int]:
    """Children of the service that hold a shard."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            command = status.with_name("cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == sidecar.process.pid and b"engine_host" in command:
            found.append(int(status.parent.name))
    return found


def fill(sidecar: Sidecar) -> None:
    sidecar.create("m", kind=LOGIT_DELTA)
    for layer in range(LAYERS):
        sidecar.upsert("m", layer, random_entries(LOGIT_DELTA, 300, seed=layer))


def are_gone(processes: list[int]) -> bool:
    return not any(Path(f"/proc/{process}").exists() for process in processes)


@pytest.mark.parametrize(
    ("flags", "expected"), [((), 3), (("--workers", "1"), 1), (("--workers", "0"), 0)]
)
def test_as_many_as_allowed(tmp_path: Path, flags: tuple[str, ...], expected: int) -> None:
    with running_sidecar(tmp_path / "data") as sidecar:
        fill(sidecar)
        assert not engine_processes(sidecar)  # 300 entries are few
    with running_sidecar(tmp_path / "data", flags=(*ISOLATE_ALL, *flags)) as sidecar:
        processes = engine_processes(sidecar)
        assert len(processes) == expected
        assert [layer.entries for layer in sidecar.describe("m").layers] == [300] * LAYERS
    assert are_gone(processes)


def test_a_killed_service_leaves_none_and_its_successor_has_everything(tmp_path: Path) -> None:
    with running_sidecar(tmp_path / "data") as sidecar:
        fill(sidecar)
    with Sidecar(tmp_path / "data", flags=ISOLATE_ALL) as sidecar:
        sidecar.upsert("m", 0, random_entries(LOGIT_DELTA, 100, seed=9, first_id=1000))
        processes = engine_processes(sidecar)
        sidecar.kill()
    with running_sidecar(tmp_path / "data", flags=ISOLATE_ALL) as sidecar:
        assert [layer.entries for layer in sidecar.describe("m").layers] == [400, 300, 300]
        end = time.monotonic() + 60
        while not are_gone(processes):
            assert time.monotonic() < end
            time.sleep(0.05)

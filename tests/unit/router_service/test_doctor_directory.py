"""The doctor of a data directory: each kind of damage is found, with a remedy, and nothing is changed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from router_service import __version__
from router_service.backends.base import CollectionSpec, Compression, Metric
from router_service.backends.edge.files import CollectionFiles, Pointer
from router_service.doctor import Finding, Severity, diagnose_directory
from router_service.fingerprint import ModelFingerprint
from router_service.memories.manifest import UNFINISHED, write_manifest
from router_service.memories.memory import MemoryRecord
from router_service.memories.settings import Kind, MemorySettings

RECORD = MemoryRecord(
    "bible",
    ModelFingerprint("tiny_moe", 2, 16, 8, 2, "5eed" * 16),
    MemorySettings(kind=Kind.LOGIT_DELTA, gamma=(0.25,)),
    1_700_000_000_000,
)
SPEC = CollectionSpec(16, Metric.EUCLID, 8)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory with one memory of two layers, as far as files go."""
    memory = tmp_path / "data" / "memories" / "bible"
    memory.parent.mkdir(mode=0o700, parents=True)
    memory.mkdir()
    write_manifest(memory, RECORD)
    for layer in range(2):
        files = CollectionFiles(memory.parent, f"bible/layer-{layer:03d}")
        files.shard(3).mkdir(parents=True)
        files.write(Pointer(3, SPEC, Compression()))
    return tmp_path / "data"


def problems(data: Path, *, deep: bool = False, min_free_bytes: int = 0) -> list[Finding]:
    """What is not fine; every finding has a remedy, and no file has changed."""
    before = _state(data)
    found = list(diagnose_directory(data, min_free_bytes, deep=deep))
    assert _state(data) == before
    worse = [finding for finding in found if finding.severity is not Severity.OK]
    assert all(finding.remedy and finding.what for finding in worse)
    return worse


def _state(data: Path) -> list[tuple[str, bool, bytes]]:
    paths = sorted(data.rglob("*"))
    return [(str(p), p.is_dir(), b"" if p.is_dir() else p.read_bytes()) for p in paths]


def _manifest(data: Path, **changes: Any) -> None:
    path = data / "memories" / "bible" / "memory.json"
    body = json.loads(path.read_text()) | changes
    del body["crc32"]
    path.write_text(json.dumps(body))


def _pointer(data: Path, spec: CollectionSpec) -> None:
    files = CollectionFiles(data / "memories", "bible/layer-001")
    files.write(Pointer(3, spec, Compression()))


def _later_pointer(data: Path) -> None:
    path = data / "memories" / "bible" / "layer-001" / "CURRENT"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 9}))


def test_a_memory_that_was_to_take_the_place_of_another(data: Path) -> None:
    """Its layers are no leftovers, and their memory is not damaged."""
    memories = data / "memories"
    moved = memories / "bible" / "restored-1700000000001"
    shutil.copytree(memories / "bible", memories / "bible-2" / "restored-1700000000000")
    write_manifest(memories / "bible-2", replace(RECORD, name="bible-2"))
    assert problems(data) == []
    (memories / "bible-2" / "restored-1700000000000").rename(moved)
    (moved / "CAME-FROM").write_text("bible-2/restored-1700000000000")
    [found] = problems(data)
    assert found.severity is Severity.WARNING
    assert f"{moved} came from {memories}/bible-2/restored-1700000000000" in found.what
    assert "router-service serve" in found.remedy


def test_a_sound_directory(data: Path) -> None:
    assert problems(data) == []


def test_an_empty_directory_is_fine(tmp_path: Path) -> None:
    assert problems(tmp_path) == []


ERRORS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda d: (d / "memories/bible/memory.json").unlink(), "memory.json cannot be read"),
    "cut manifest": (lambda d: (d / "memories/bible/memory.json").write_text("{"), "JSONDecodeError"),
    "no format": (lambda d: _manifest(d, format=0), "format 0, this version reads 1"),
    "bad fingerprint": (lambda d: _manifest(d, fingerprint={"top_k": 1}), "memory.json cannot be read"),
    "other name": (lambda d: _manifest(d, name="psalms"), "manifest of memory 'psalms'"),
    "no CURRENT": (lambda d: (d / "memories/bible/layer-001/CURRENT").unlink(), "layer 1: cannot read"),
    "no generation": (lambda d: (d / "memories/bible/layer-001/gen-000003/shard").rmdir(), "gen-000003/shard, missing"),
    "dimension": (lambda d: _pointer(d, replace(SPEC, dimension=17)), "dimension=17"),
    "metric": (lambda d: _pointer(d, replace(SPEC, metric=Metric.COSINE)), "layer 1: "),
    "width": (lambda d: _pointer(d, replace(SPEC, value_width=4)), "value_width=4"),
}  # fmt: skip


@pytest.mark.parametrize(("harm", "words"), ERRORS.values(), ids=list(ERRORS))
def test_damage_is_an_error(data: Path, harm: Callable[[Path], object], words: str) -> None:
    harm(data)
    [finding] = problems(data)
    assert (finding.severity, finding.check) == (Severity.ERROR, "bible")
    assert words in finding.what
    assert "mv " in finding.remedy


LATER: dict[str, Callable[[Path], object]] = {
    "memory.json": lambda d: _manifest(d, format=9),
    "CURRENT": _later_pointer,
}


@pytest.mark.parametrize("make_later", LATER.values(), ids=list(LATER))
def test_what_a_later_version_wrote_is_neither_moved_nor_replaced(
    data: Path, make_later: Callable[[Path], object]
) -> None:
    make_later(data)
    [finding] = problems(data)
    by = f"written by router-service '{__version__}'; this version, router-service {__version__}"
    assert f"is of format 9, {by}, reads up to 1" in finding.what
    assert (finding.severity, finding.remedy) == (Severity.ERROR, "pip install --upgrade knn-moe")


def _make(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "file").touch()


LEFTOVERS = [
    "bible/layer-000/gen-000002",
    "bible/layer-002",
    "bible/restored-17",
    "bible.deleted",
    "_restoring-bible.deleted",
]


@pytest.mark.parametrize("name", LEFTOVERS)
def test_leftovers_are_warned_of(data: Path, name: str) -> None:
    _make(data / "memories" / name)
    [finding] = problems(data)
    assert finding.severity is Severity.WARNING
    assert str(data / "memories" / name) in finding.what
    assert finding.remedy == f"router-service serve --data {data}"


def test_a_creation_that_never_ended(data: Path) -> None:
    _make(data / "memories" / "half")
    (data / "memories" / "half" / UNFINISHED).touch()
    [finding] = problems(data)
    assert finding.check == "half"


def test_half_written_files(data: Path) -> None:
    (data / "memories" / "bible" / "memory.json.partial").touch()
    (data / "memories" / "bible" / "layer-000" / "CURRENT.partial").touch()
    assert ["memory.json.partial" in f.what for f in problems(data)] == [True, False]


def test_a_bandwidth_that_was_never_measured(data: Path) -> None:
    write_manifest(data / "memories" / "bible", replace(RECORD, settings=MemorySettings()))
    [finding] = problems(data)
    assert finding.severity is Severity.WARNING
    assert "never calibrated" in finding.what
    assert finding.remedy == "router-admin calibrate bible"


@pytest.fixture
def held(data: Path) -> Iterator[Path]:
    """The directory while another process has it."""
    with (data / "memories" / "LOCK").open("w") as file:
        file.write("4711")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield data


def test_a_directory_in_use(held: Path) -> None:
    _make(held / "memories" / "bible" / "layer-000" / "gen-000004")  # may be work under way
    [finding] = problems(held)
    assert (finding.severity, finding.check) == (Severity.WARNING, "lock")
    assert "process 4711" in finding.what


def test_too_little_free_disk(data: Path) -> None:
    [finding] = problems(data, min_free_bytes=2**60)
    assert (finding.severity, finding.check) == (Severity.ERROR, "disk")
    assert f"{2**60} needed" in finding.what


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, words in (("nope", "not there"), ("file", "not a directory")):
        [finding] = problems(tmp_path / name)
        assert words in finding.what


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_files_of_somebody_else(data: Path) -> None:
    (data / "memories" / "bible" / "memory.json").chmod(0o444)
    [finding] = problems(data)
    assert finding.check == "access"


def test_directories_that_others_can_enter(data: Path) -> None:
    (data / "memories").chmod(0o750)
    [found] = problems(data)
    assert (found.severity, found.check) == (Severity.WARNING, "access")
    assert found.remedy == f"chmod go= {data / 'memories'}"


def test_snapshots(data: Path) -> None:
    (data / "snapshots").mkdir(mode=0o700)
    _make(data / "snapshots" / "bible" / "monday")
    _make(data / "snapshots" / "bible" / ".partial-tuesday")
    damaged, unfinished = problems(data)
    assert (damaged.severity, damaged.check) == (Severity.ERROR, "snapshot bible/monday")
    assert damaged.remedy == f"rm -r {data}/snapshots/bible/monday"
    assert unfinished.severity is Severity.WARNING
    assert unfinished.remedy == "router-admin snapshot list bible"

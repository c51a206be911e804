"""The service's own snapshots and those that were brought: found, opened, removed, swept."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
import tarfile
from pathlib import Path

import pytest

from router_service.backends.base import say_nothing
from router_service.backends.disk import copy_file, read_content
from router_service.errors import (
    Cancelled,
    InvalidField,
    SnapshotInvalid,
    SnapshotNotFound,
    StorageError,
)
from router_service.memories.memory import RoutingMemory
from router_service.memories.store import MemoryStore
from router_service.settings import ServiceSettings
from router_service.snapshots import local
from router_service.snapshots.local import LocalSnapshotStore, SnapshotInfo, SnapshotRef
from router_service.storage import make_snapshot_store, make_store
from tests.unit.router_service.numbered_memory import answers, assert_same_answers, fill


@pytest.fixture
def brought(store: MemoryStore, snapshot_store: Path) -> LocalSnapshotStore:
    return LocalSnapshotStore(store, snapshot_store, 0, snapshot_store.with_name("packs"))


def _packed(snapshot: SnapshotInfo, directory: Path) -> Path:
    archive = directory / "monday.tar"
    local.pack(snapshot.path, archive)
    return archive


def test_progress_counts_files(brought: LocalSnapshotStore, snapshot: SnapshotInfo) -> None:
    told: list[tuple[str, int, int]] = []
    [info] = brought.verify(SnapshotRef("bible", "monday"), lambda *step: told.append(step))
    assert info == snapshot
    assert [done for _, done, _ in told] == list(range(len(told)))
    assert told[0][0].startswith("layer-000/")


def test_an_archive_leaves_nothing_behind(
    brought: LocalSnapshotStore,
    snapshot: SnapshotInfo,
    snapshot_store: Path,
    memory: RoutingMemory,
    tmp_path: Path,
) -> None:
    expected = answers(memory)
    ref = SnapshotRef(path=str(_packed(snapshot, tmp_path)))
    [info] = brought.verify(ref, say_nothing)
    assert info.path == tmp_path / "monday.tar"
    [(copy, _)] = brought.restore(ref, "copy", False, say_nothing)
    assert_same_answers(answers(copy), expected)
    assert [path.name for path in snapshot_store.iterdir()] == ["bible"]


@pytest.mark.parametrize("packed", [False, True], ids=["name", "archive"])
def test_a_cancelled_restore_changes_nothing(
    brought: LocalSnapshotStore,
    store: MemoryStore,
    snapshot: SnapshotInfo,
    memory: RoutingMemory,
    snapshot_store: Path,
    tmp_path: Path,
    packed: bool,
) -> None:
    fill(memory, 300, 310)
    ref = SnapshotRef("bible", "monday", str(_packed(snapshot, tmp_path)) if packed else "")
    calls = iter(range(40))

    def report(stage: str, done: int, total: int) -> None:
        if next(calls, None) is None:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        list(brought.restore(ref, "bible", True, report))
    assert store.get("bible") is memory
    assert memory.layer(0).info().entries == 310
    assert [path.name for path in snapshot_store.iterdir()] == ["bible"]


def test_delete(brought: LocalSnapshotStore, snapshot: SnapshotInfo, snapshot_store: Path) -> None:
    assert brought.delete("bible", "monday") == snapshot
    assert brought.list("") == []
    with pytest.raises(SnapshotNotFound, match="snapshot 'monday' not found"):
        brought.delete("bible", "monday")
    assert [path.name for path in (snapshot_store / "bible").iterdir()] == ["LOCK"]


def test_a_damaged_one_can_be_deleted(brought: LocalSnapshotStore, snapshot: SnapshotInfo) -> None:
    (snapshot.path / "manifest.json").unlink()
    assert "cannot be read" in brought.delete("bible", "monday").problem
    assert brought.list("bible") == []


def test_what_a_killed_service_left_is_swept(
    brought: LocalSnapshotStore, snapshot: SnapshotInfo, snapshot_store: Path
) -> None:
    (snapshot_store / ".unpacking-x" / "bible").mkdir(parents=True)
    brought.sweep()
    assert [path.name for path in snapshot_store.iterdir()] == ["bible"]
    LocalSnapshotStore(brought._store, snapshot_store / "nowhere").sweep()


def test_services_that_share_the_directory(
    brought: LocalSnapshotStore, store: MemoryStore, snapshot: SnapshotInfo, snapshot_store: Path
) -> None:
    """What one of them is at work on is not swept by another that starts."""
    other = LocalSnapshotStore(store, snapshot_store, 0)
    with local.scratch(snapshot_store) as directory:
        (directory / "file").touch()
        other.sweep()
        assert (directory / "file").exists()
    assert [path.name for path in snapshot_store.iterdir()] == ["bible"]


@pytest.mark.parametrize("path", ["relative", "a\0b", "/x" * 2000, "/" + "x" * 300])
def test_paths_that_are_refused(
    brought: LocalSnapshotStore, snapshot: SnapshotInfo, path: str
) -> None:
    with pytest.raises(InvalidField, match="path"):
        list(brought.verify(SnapshotRef(path=path), say_nothing))


def _special(directory: Path, kind: str) -> Path:
    path = directory / kind
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    elif kind == "link":
        path.symlink_to(directory / "monday.tar")
    else:
        path = Path("/dev/zero")
    return path


@pytest.mark.parametrize("kind", ["fifo", "socket", "link", "device"])
def test_what_is_no_plain_file_is_refused_at_once(
    brought: LocalSnapshotStore, snapshot: SnapshotInfo, tmp_path: Path, kind: str
) -> None:
    _packed(snapshot, tmp_path)
    with pytest.raises(InvalidField, match="a regular file"):
        list(brought.verify(SnapshotRef(path=str(_special(tmp_path, kind))), say_nothing))


@pytest.mark.parametrize("kind", ["fifo", "link"])
@pytest.mark.parametrize("name", ["manifest.json", "layer-000/CURRENT"])
def test_a_snapshot_of_other_than_plain_files(
    brought: LocalSnapshotStore, snapshot: SnapshotInfo, tmp_path: Path, kind: str, name: str
) -> None:
    copy = tmp_path / "monday"
    shutil.copytree(snapshot.path, copy)
    (copy / name).rename(tmp_path / "monday.tar")
    _special(tmp_path, kind).rename(copy / name)
    with pytest.raises(SnapshotInvalid, match=Path(name).name):
        list(brought.verify(SnapshotRef(path=str(copy)), say_nothing))


def test_files_that_say_that_they_are_empty_are_not_read(brought: LocalSnapshotStore) -> None:
    with pytest.raises(SnapshotInvalid, match="it is empty"):
        list(brought.verify(SnapshotRef(path="/proc/self/environ"), say_nothing))


OUTSIDE = ["/etc/x.tar", "../x.tar", "a/b.tar", "", ".", "..", ".x", "a\0b", "/x" * 2000, "x" * 200]


@pytest.mark.parametrize("path", OUTSIDE)
def test_archives_go_to_one_directory(
    brought: LocalSnapshotStore, snapshot: SnapshotInfo, snapshot_store: Path, path: str
) -> None:
    with pytest.raises(InvalidField, match="path"):
        list(brought.pack("bible", "monday", path, say_nothing))
    assert not snapshot_store.with_name("packs").exists()


def test_an_archive_by_its_name_or_its_path(
    brought: LocalSnapshotStore, snapshot: SnapshotInfo, snapshot_store: Path
) -> None:
    packs = snapshot_store.with_name("packs")
    for path in ("a.tar", str(packs / "b.tar")):
        [packed] = brought.pack("bible", "monday", path, say_nothing)
        assert packed.archive == packs / Path(path).name
        assert stat.S_IMODE(packed.archive.stat().st_mode) == 0o600
        assert packed.snapshot == snapshot
        [info] = brought.verify(SnapshotRef(path=str(packed.archive)), say_nothing)
        assert info.entries == snapshot.entries
    assert stat.S_IMODE(packs.stat().st_mode) == 0o700


def test_packing_touches_no_file_that_is_there(
    store: MemoryStore, snapshot: SnapshotInfo, snapshot_store: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    packs = tmp_path / "packs"
    packs.mkdir()
    (packs / "x.partial").write_text("precious")
    (packs / "y.partial").symlink_to(victim)
    (packs / "link").symlink_to(victim)
    (packs / "dangling").symlink_to(tmp_path / "nowhere")
    (packs / "file").write_text("precious")
    brought = LocalSnapshotStore(store, snapshot_store, 0, packs)
    for name in ("link", "dangling", "file"):
        with pytest.raises(InvalidField, match="the name of a new file"):
            list(brought.pack("bible", "monday", name, say_nothing))
    for name in ("x", "y"):
        list(brought.pack("bible", "monday", name, say_nothing))
        assert archives_begin(packs / name)
    kept = (victim, packs / "x.partial", packs / "y.partial", packs / "file")
    assert [path.read_text() for path in kept] == ["precious"] * 4
    assert not (tmp_path / "nowhere").exists()
    assert not list(packs.glob(".*"))


def archives_begin(path: Path) -> bool:
    """Whether `path` is a plain file that is a tar."""
    return not path.is_symlink() and tarfile.is_tarfile(path)


def test_a_cancelled_pack_leaves_nothing(
    brought: LocalSnapshotStore, snapshot: SnapshotInfo, snapshot_store: Path
) -> None:
    seen: list[str] = []
    list(brought.pack("bible", "monday", "a.tar", lambda stage, *_: seen.append(stage)))
    left = iter(range(len(seen) - 2))

    def report(stage: str, done: int, total: int) -> None:
        if next(left, None) is None:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        list(brought.pack("bible", "monday", "b.tar", report))
    assert [path.name for path in snapshot_store.with_name("packs").iterdir()] == ["a.tar"]


def test_unfinished_archives_are_swept_but_no_others(
    store: MemoryStore, snapshot_store: Path, tmp_path: Path
) -> None:
    packs = tmp_path / "packs"
    packs.mkdir()
    for name in (".packing-left", ".packing-busy", "mine.tar"):
        (packs / name).write_text("?")
    (packs / ".packing-link").symlink_to(packs / "mine.tar")
    with (packs / ".packing-busy").open() as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        LocalSnapshotStore(store, snapshot_store, 0, packs).sweep()
    assert {path.name for path in packs.iterdir()} == {
        ".packing-busy",
        ".packing-link",
        "mine.tar",
    }


def test_work_on_a_large_file_can_be_cancelled_in_its_middle(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        for part in range(3):
            file.seek(part * (64 << 20))
            file.write(b"x" * 100)
        file.truncate(200 << 20)

    def stop() -> None:
        raise Cancelled("stop")

    with pytest.raises(Cancelled):
        read_content(large, stop)
    with pytest.raises(Cancelled):
        copy_file(large, tmp_path / "copy", stop)


def test_nothing_at_a_path(brought: LocalSnapshotStore, tmp_path: Path) -> None:
    with pytest.raises(SnapshotNotFound, match="nothing there"):
        list(brought.verify(SnapshotRef(path=str(tmp_path / "x")), say_nothing))


def test_hits_of_a_replaced_memory_go_on(
    brought: LocalSnapshotStore, snapshot: SnapshotInfo, memory: RoutingMemory
) -> None:
    answers(memory)
    before = memory.layer(0).hits.summary()
    assert before.total > 0
    [(restored, _)] = brought.restore(SnapshotRef("bible", "monday"), "bible", True, say_nothing)
    assert restored.layer(0).hits.summary() == before


def test_a_directory_that_cannot_be_used_is_named_at_the_start(tmp_path: Path) -> None:
    (taken := tmp_path / "taken").touch()
    settings = ServiceSettings(backend="edge", data=tmp_path / "data", snapshot_dir=taken)
    backend, store = make_store(settings)
    try:
        with pytest.raises(StorageError, match=f"--snapshot-dir {taken}"):
            make_snapshot_store(settings, backend, store)
    finally:
        backend.close()

"""The service's own snapshots and those that were brought: found, opened, removed, swept."""

from __future__ import annotations

from pathlib import Path

import pytest

from router_service.backends.base import say_nothing
from router_service.errors import Cancelled, InvalidField, SnapshotNotFound
from router_service.memories.memory import RoutingMemory
from router_service.memories.store import MemoryStore
from router_service.snapshots import local
from router_service.snapshots.local import LocalSnapshotStore, SnapshotInfo, SnapshotRef
from tests.unit.router_service.numbered_memory import answers, assert_same_answers, fill


@pytest.fixture
def brought(store: MemoryStore, snapshot_store: Path) -> LocalSnapshotStore:
    return LocalSnapshotStore(store, snapshot_store, min_free_bytes=0)


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
    [copy] = brought.restore(ref, "copy", False, say_nothing)
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


@pytest.mark.parametrize("path", ["relative", "a\0b", "/x" * 2000])
def test_paths_that_are_refused(
    brought: LocalSnapshotStore, snapshot: SnapshotInfo, path: str
) -> None:
    with pytest.raises(InvalidField, match="path"):
        list(brought.verify(SnapshotRef(path=path), say_nothing))
    with pytest.raises(InvalidField, match="path"):
        list(brought.pack("bible", "monday", path, say_nothing))


def test_nothing_at_a_path(brought: LocalSnapshotStore, tmp_path: Path) -> None:
    with pytest.raises(SnapshotNotFound, match="nothing there"):
        list(brought.verify(SnapshotRef(path=str(tmp_path / "x")), say_nothing))


def test_hits_of_a_replaced_memory_go_on(
    brought: LocalSnapshotStore, snapshot: SnapshotInfo, memory: RoutingMemory
) -> None:
    answers(memory)
    before = memory.layer(0).hits.summary()
    assert before.total > 0
    [restored] = brought.restore(SnapshotRef("bible", "monday"), "bible", True, say_nothing)
    assert restored.layer(0).hits.summary() == before

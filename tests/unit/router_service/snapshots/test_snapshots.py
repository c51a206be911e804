"""Snapshots: what is in them, what comes back out of them, and at what a restore stops."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from router_service.backends.base import Compression, Quantization
from router_service.backends.edge.engine import EngineShard, read_hits
from router_service.backends.exact import ExactBackend
from router_service.errors import (
    Busy,
    CorruptMemory,
    DiskFull,
    InvalidField,
    KeysNotFound,
    KindMismatch,
    MemoryExists,
    MemoryNotFound,
    ModelMismatch,
    SnapshotNotFound,
    StorageError,
)
from router_service.memories import swap
from router_service.memories.layer import RouteQuery
from router_service.memories.memory import RoutingMemory
from router_service.memories.settings import Kind, MemorySettings
from router_service.memories.store import MemoryStore
from router_service.snapshots import local
from router_service.snapshots.local import SnapshotInfo
from tests.unit.router_service.numbered_memory import (
    MODEL,
    OTHER_MODEL,
    SETTINGS,
    answers,
    assert_same_answers,
    counts,
    fill,
    numbered_entries,
    open_store,
)


def test_another_service_gives_the_same_answers(
    store: MemoryStore, memory: RoutingMemory, snapshot_store: Path, fast_dir: Path
) -> None:
    """Layers indexed in full precision and in int8, each with a tail that is not indexed."""
    memory.layers[0].optimize(Compression())
    memory.layers[1].optimize(Compression(Quantization.INT8))
    fill(memory, 290, 340)  # ten of them replace indexed ones
    made = local.create(store, "bible", snapshot_store, min_free_bytes=0)
    expected, infos = answers(memory), [layer.info() for layer in memory.layers]
    assert [i.indexed_entries for i in infos] == [290, 290]
    with open_store(fast_dir / "elsewhere") as other:
        restored = local.restore(other, made.path, "copy", min_free_bytes=0)
        assert_same_answers(answers(restored), expected)
        again = [layer.info() for layer in restored.layers]
        assert [i.indexed_entries for i in again] == [i.indexed_entries for i in infos]
        assert [i.compression for i in again] == [i.compression for i in infos]
        fill(restored, 340, 350)
    with open_store(fast_dir / "elsewhere") as other:  # and after a restart, with what was added
        assert counts(other.get("copy")) == [350] * 2
        np.testing.assert_array_equal(
            other.get("copy").layers[1].collection.scroll(None, 400).keys,
            numbered_entries(0, 350, 1).keys,
        )


def test_a_snapshot_says_what_it_holds(snapshot: SnapshotInfo, snapshot_store: Path) -> None:
    manifest = json.loads((snapshot.path / "manifest.json").read_text())
    assert manifest["memory"]["fingerprint"] == dataclasses.asdict(MODEL)
    assert manifest["memory"]["settings"]["neighbours"] == SETTINGS.neighbours
    assert manifest["layers"] == [{"layer": n, "entries": 300} for n in range(2)]
    assert manifest["total"]["entries"] == 600
    files = {
        p.relative_to(snapshot.path).as_posix() for p in snapshot.path.rglob("*") if p.is_file()
    }
    assert {file["path"] for file in manifest["files"]} == files - {"manifest.json"}
    assert local.list_snapshots(snapshot_store) == [snapshot]
    assert local.verify(snapshot.path) == snapshot
    assert local.find(snapshot_store, "bible", "monday") == snapshot.path
    assert snapshot.record is not None
    assert snapshot.record.fingerprint == MODEL


def test_what_an_index_replaced_may_vanish_meanwhile(
    store: MemoryStore,
    memory: RoutingMemory,
    snapshot_store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An index removes the generation before it after the pause that a copy and it exclude each other in."""
    assert store.directory is not None
    before = next((store.directory / "bible").glob("layer-000/gen-*"))
    replaced = before.with_name("gen-000099")
    shutil.copytree(before, replaced)
    listed = os.scandir

    def scandir(path: str) -> object:
        if Path(path) != replaced and Path(path).is_relative_to(replaced):
            shutil.rmtree(replaced, ignore_errors=True)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    made = local.create(store, "bible", snapshot_store, min_free_bytes=0)
    assert not list(made.path.rglob(replaced.name))
    assert local.verify(made.path) == made


def test_names_are_unique_and_say_when(
    store: MemoryStore, memory: RoutingMemory, snapshot_store: Path
) -> None:
    made = [local.create(store, "bible", snapshot_store, min_free_bytes=0) for _ in range(3)]
    assert len({info.name for info in made}) == 3
    for info in made:
        assert re.fullmatch(r"\d{8}T\d{6}Z-v\d+(-\d)?", info.name)
    assert [info.name for info in local.list_snapshots(snapshot_store, "bible")] == [
        i.name for i in made
    ]
    assert local.list_snapshots(snapshot_store, "other") == []
    assert local.list_snapshots(snapshot_store / "nowhere") == []


@pytest.mark.parametrize(
    "name", ["", "..", "a/b", "/etc", ".hidden", "LOCK", "x" * 129, "a\0b", "monday"]
)
def test_names_that_are_refused(
    store: MemoryStore, snapshot: SnapshotInfo, snapshot_store: Path, name: str
) -> None:
    with pytest.raises(InvalidField, match="snapshot"):
        local.create(store, "bible", snapshot_store, name, min_free_bytes=0)
    if name != "monday":
        with pytest.raises(SnapshotNotFound, match="monday"):
            local.find(snapshot_store, "bible", name)
    assert [info.name for info in local.list_snapshots(snapshot_store)] == ["monday"]


def test_what_cannot_be_snapshotted(
    store: MemoryStore, memory: RoutingMemory, snapshot_store: Path
) -> None:
    with pytest.raises(MemoryNotFound):
        local.create(store, "other", snapshot_store)
    in_ram = MemoryStore(ExactBackend(), None)
    in_ram.create("ram", MODEL, SETTINGS)
    with pytest.raises(InvalidField, match="embedded backend"):
        local.create(in_ram, "ram", snapshot_store)
    with pytest.raises(DiskFull, match="free some space"):
        local.create(store, "bible", snapshot_store, min_free_bytes=2**60)
    assert local.list_snapshots(snapshot_store) == []


def test_what_the_report_raises_ends_the_work_and_leaves_nothing(
    store: MemoryStore, memory: RoutingMemory, snapshot_store: Path, fast_dir: Path
) -> None:
    seen: list[str] = []
    made = local.create(store, "bible", snapshot_store, min_free_bytes=0, on_file=seen.append)
    for stop in (1, len(seen) // 2 + 1, len(seen)):
        left = iter(range(stop - 1))

        def stop_then(path: str, left: object = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            local.create(store, "bible", snapshot_store, min_free_bytes=0, on_file=stop_then)
        assert sorted(p.name for p in (snapshot_store / "bible").iterdir()) == sorted(
            ["LOCK", made.name]
        )
    fill(memory, 300, 301)  # no lock is left behind
    left = iter(range(10))
    with pytest.raises(KeyboardInterrupt):
        local.restore(store, made.path, "copy", min_free_bytes=0, on_file=stop_then)
    assert sorted(p.name for p in (fast_dir / "data").iterdir()) == ["LOCK", "bible"]


def test_one_snapshot_of_a_memory_at_a_time(
    store: MemoryStore, memory: RoutingMemory, snapshot_store: Path
) -> None:
    working, go = threading.Event(), threading.Event()

    def wait(path: str) -> None:
        working.set()
        go.wait(30)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(
            local.create, store, "bible", snapshot_store, on_file=wait, min_free_bytes=0
        )
        working.wait(30)
        with pytest.raises(Busy, match="being made"):
            local.create(store, "bible", snapshot_store, min_free_bytes=0)
        assert local.list_snapshots(snapshot_store) == []  # and what is being made is left alone
        answers(memory)
        go.set()
        assert first.result(30) in local.list_snapshots(snapshot_store)


def test_a_snapshot_while_a_layer_is_optimized_is_of_the_files_in_force(
    store: MemoryStore, memory: RoutingMemory, snapshot_store: Path
) -> None:
    made: list[SnapshotInfo] = []

    def while_indexing(stage: str, done: int, total: int) -> None:
        if stage == "index" and not made:
            made.append(local.create(store, "bible", snapshot_store, min_free_bytes=0))

    memory.layers[1].optimize(Compression(Quantization.INT8), while_indexing)
    assert local.verify(made[0].path) == made[0]
    restored = local.restore(store, made[0].path, "copy", min_free_bytes=0)
    assert restored.layers[1].info().compression.quantization is Quantization.NONE
    assert memory.layers[1].info().compression.quantization is Quantization.INT8
    assert_same_answers(answers(restored, 5), answers(memory, 5))


def test_all_layers_are_of_one_moment_while_others_write_and_route(
    store: MemoryStore, memory: RoutingMemory, snapshot_store: Path
) -> None:
    """Each id goes to layer 0, then to layer 1: a snapshot holds it in all layers but for one request in flight."""
    done, batch = threading.Event(), 20

    def write() -> int:
        start = 300
        while not done.is_set():
            fill(memory, start, start + batch)
            start += batch
        return start

    def read() -> int:
        rounds = 0
        while not done.is_set():
            answers(memory, 5)
            rounds += 1
        return rounds

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(write), pool.submit(read)]
        try:
            made = [
                local.create(store, "bible", snapshot_store, min_free_bytes=0) for _ in range(2)
            ]
        finally:
            done.set()
        assert jobs[0].result(30) > 300
        assert jobs[1].result(30) > 0
    for number, info in enumerate(made):
        restored = local.restore(store, info.path, f"copy-{number}", min_free_bytes=0)
        held = counts(restored)
        assert sorted(held, reverse=True) == held
        assert held[0] - held[1] <= batch
        for layer, entries in zip(restored.layers, held, strict=True):
            ids = layer.collection.scroll(None, entries + 1, with_keys=False).ids
            np.testing.assert_array_equal(ids, np.arange(entries))


def test_replacing_goes_back_to_the_snapshot_without_a_failed_look_up(
    store: MemoryStore, memory: RoutingMemory, snapshot: SnapshotInfo, fast_dir: Path
) -> None:
    expected = answers(memory)
    store.change_settings("bible", {"neighbours": 2})
    fill(memory, 300, 400)
    version, done = memory.version, threading.Event()

    def read() -> int:
        rounds = 0
        while not done.is_set():
            answers(store.get("bible"), 5)
            rounds += 1
        return rounds

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        for _ in range(2):  # the second one replaces a restored memory
            restored = local.restore(
                store, snapshot.path, "bible", replacing=True, retire_after_s=0.2, min_free_bytes=0
            )
        done.set()
        assert reader.result(30) > 0
    assert store.get("bible") is restored
    assert restored.version > version
    assert restored.record.settings == SETTINGS
    assert restored.layers[0].counters.read().requests > 0  # what was counted goes on
    assert_same_answers(answers(restored), expected)
    assert len(list((fast_dir / "data" / "bible").iterdir())) == 2  # the manifest and one directory
    fill(restored, 300, 310)
    store.change_settings("bible", {"neighbours": 3})
    store.close()
    store.open_all()
    assert counts(store.get("bible")) == [310] * 2
    assert store.get("bible").record.settings.neighbours == 3


def test_a_restored_memory_can_be_deleted_and_made_again(
    store: MemoryStore, snapshot: SnapshotInfo, fast_dir: Path
) -> None:
    local.restore(store, snapshot.path, "copy", min_free_bytes=0)
    assert store.delete("copy") == 600
    assert not (fast_dir / "data" / "copy").exists()
    made = store.create("copy", MODEL, SETTINGS)
    fill(made, 0, 5)
    assert counts(made) == [5] * 2


def test_a_memory_that_was_set_aside_comes_back(
    store: MemoryStore, memory: RoutingMemory, snapshot: SnapshotInfo, fast_dir: Path
) -> None:
    expected = answers(memory)
    store.close()
    (fast_dir / "data" / "bible" / "layer-001" / "CURRENT").write_text("?")
    store.open_all()
    with pytest.raises(CorruptMemory):
        store.get("bible")
    with pytest.raises(MemoryExists):
        local.restore(store, snapshot.path, "bible", min_free_bytes=0)
    restored = local.restore(store, snapshot.path, "bible", replacing=True, min_free_bytes=0)
    assert_same_answers(answers(restored), expected)
    assert not store.broken
    assert not list((fast_dir / "data" / "bible").glob("layer-*"))


def test_a_memory_whose_manifest_is_lost_comes_back(
    store: MemoryStore, snapshot: SnapshotInfo, fast_dir: Path
) -> None:
    store.close()
    (fast_dir / "data" / "bible" / "memory.json").unlink()
    store.open_all()
    restored = local.restore(store, snapshot.path, "bible", replacing=True, min_free_bytes=0)
    assert counts(restored) == [300] * 2


def test_at_what_a_restore_stops(
    store: MemoryStore, snapshot: SnapshotInfo, snapshot_store: Path, fast_dir: Path
) -> None:
    store.create("foreign", OTHER_MODEL, SETTINGS)
    store.create(
        "other-kind",
        MODEL,
        dataclasses.replace(MemorySettings(), preset="paper", kind=Kind.ASSIGNMENT),
    )
    before = tree(fast_dir / "data")

    def restore(name: str, **options: int) -> None:
        local.restore(store, snapshot.path, name, **{"min_free_bytes": 0} | options)

    with pytest.raises(MemoryExists):
        restore("bible")
    with pytest.raises(
        ModelMismatch, match=r"router_hash: snapshot 'hash-of-routers', memory 'hash-of-other"
    ):
        restore("foreign", replacing=True)
    with pytest.raises(KindMismatch, match="under a name other than 'other-kind'"):
        restore("other-kind", replacing=True)
    for name in ("../x", "", ".x", "x.deleted"):
        with pytest.raises(InvalidField):
            restore(name)
    with pytest.raises(DiskFull):
        restore("copy", min_free_bytes=2**60)
    with pytest.raises(StorageError, match="RAM only"):
        local.restore(MemoryStore(ExactBackend(), None), snapshot.path, "copy")
    with swap.staging(store, "copy"), pytest.raises(Busy, match="restored already"):
        restore("copy")
    assert tree(fast_dir / "data") == before
    assert store.names() == ["bible", "foreign", "other-kind"]


@pytest.mark.parametrize("name", ["bible", "copy"])
def test_a_restore_that_fails_changes_nothing(
    store: MemoryStore,
    memory: RoutingMemory,
    snapshot: SnapshotInfo,
    fast_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    store.change_settings("bible", {"neighbours": 2})
    expected, before = answers(memory), tree(fast_dir / "data")
    for step in ("_move", "_require_entries", "finish_creation"):
        with monkeypatch.context() as broken:
            broken.setattr(swap, step, failing_after(getattr(swap, step)))
            with pytest.raises(StorageError, match="made to fail"):
                restore(store, snapshot, name, replacing=name == "bible")
        assert tree(fast_dir / "data") == before
    assert_same_answers(answers(store.get("bible")), expected)
    fill(memory, 300, 310)
    store.close()
    store.open_all()
    assert store.names() == ["bible"]
    assert counts(store.get("bible")) == [310] * 2
    assert store.get("bible").record.settings.neighbours == 2


@pytest.mark.parametrize("name", ["bible", "copy"])
def test_a_restored_layer_that_finds_nothing_is_not_handed_over(
    store: MemoryStore,
    memory: RoutingMemory,
    snapshot: SnapshotInfo,
    fast_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    expected, before = answers(memory), tree(fast_dir / "data")
    with monkeypatch.context() as unsearchable:
        unsearchable.setattr(
            EngineShard, "search", lambda _, q, k, *__: read_hits([[]] * len(q), k)
        )
        with pytest.raises(KeysNotFound, match=r"does not find 32 of 32 keys .*: FUSE"):
            restore(store, snapshot, name, replacing=name == "bible")
    assert tree(fast_dir / "data") == before
    assert_same_answers(answers(store.get("bible")), expected)


def restore(store: MemoryStore, snapshot: SnapshotInfo, name: str, *, replacing: bool) -> None:
    local.restore(store, snapshot.path, name, replacing=replacing, min_free_bytes=0)


def failing_after(step: Callable[..., None]) -> Callable[..., None]:
    """At its worst: after the work, before anyone knows."""

    def fail(*arguments: object) -> None:
        step(*arguments)
        raise StorageError("made to fail")

    return fail


def test_leftovers_of_a_crash_are_removed(
    store: MemoryStore, snapshot: SnapshotInfo, snapshot_store: Path, fast_dir: Path
) -> None:
    (snapshot_store / "bible" / ".partial-x" / "layer-000").mkdir(parents=True)
    assert [info.name for info in local.list_snapshots(snapshot_store)] == ["monday"]
    assert not (snapshot_store / "bible" / ".partial-x").exists()
    data = fast_dir / "data"
    (data / "_restoring-copy.deleted" / "layer-000").mkdir(parents=True)
    shutil.copytree(data / "bible" / "layer-000", data / "bible" / "restored-1" / "layer-000")
    store.close()
    store.open_all()
    assert store.names() == ["bible"]
    assert sorted(p.name for p in data.iterdir()) == ["LOCK", "bible"]
    assert not (data / "bible" / "restored-1").exists()


def tree(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*"))


def test_a_look_up_of_an_empty_memory_comes_back_too(
    store: MemoryStore, snapshot_store: Path
) -> None:
    store.create("empty", MODEL, SETTINGS)
    made = local.create(store, "empty", snapshot_store, min_free_bytes=0)
    restored = local.restore(store, made.path, "copy", min_free_bytes=0)
    ones = np.ones((1, MODEL.hidden_size), np.float32)
    answer = restored.route(0, MODEL.digest(), RouteQuery(ones, ones[:, : MODEL.num_experts]))
    assert answer.blended is None

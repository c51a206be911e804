"""optimize(): beside searches, stopped by close(), and without a trace when it fails."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from router_service.backends.base import Compression, Pacing, Quantization, say_nothing
from router_service.backends.edge import files as edge_files
from router_service.backends.edge import optimizer
from router_service.backends.edge.backend import EdgeBackend, EdgeCollection
from router_service.backends.edge.engine import EngineShard
from router_service.backends.edge.generation import ValueTable
from router_service.backends.edge.optimizer import OptimizeJob
from router_service.errors import Busy, StorageError
from tests.unit.router_service.backends.numbered_entries import (
    OPTIONS,
    SPEC,
    assert_holds,
    numbered_entries,
)


def generations(data_dir: Path) -> list[str]:
    return sorted(p.name for p in (data_dir / "layer").glob("gen-*"))


def test_all_entries_are_indexed_and_quantized_and_back_again(
    collection: EdgeCollection, data_dir: Path
) -> None:
    for number, quantization in enumerate([Quantization.INT8, Quantization.NONE], start=1):
        collection.optimize(Compression(quantization))
        info = collection.info()
        assert (info.entries, info.indexed_entries) == (600, 600)
        assert info.compression.quantization is quantization
        assert info.disk_bytes > 0
        assert generations(data_dir) == [f"gen-{number:06d}"]
        shard = data_dir / "layer" / f"gen-{number:06d}" / "shard"
        quantized = list(shard.glob("segments/*/vector_storage*/**/quantized*"))
        assert bool(quantized) is (quantization is Quantization.INT8)
        assert_holds(collection, 600)


def test_a_small_layer_needs_no_index_until_one_is_asked_for(
    collection: EdgeCollection, data_dir: Path
) -> None:
    collection.optimize()
    assert (collection.info().indexed_entries, generations(data_dir)) == (0, ["gen-000000"])
    assert_holds(collection, 600)
    collection.optimize(Compression())
    assert collection.info().indexed_entries == 600
    collection.upsert(numbered_entries(590, 600))
    collection.optimize()  # what has an index keeps one of all
    assert collection.info().indexed_entries == 600


@pytest.mark.parametrize("taken", ["deleted", "replaced"])
def test_a_small_layer_gives_back_the_room_of_what_is_gone(
    collection: EdgeCollection, data_dir: Path, taken: str
) -> None:
    if taken == "deleted":
        collection.delete(np.arange(300, 600, dtype=np.uint64))
    else:
        collection.upsert(numbered_entries(0, 300))
    collection.optimize()
    assert generations(data_dir) == ["gen-000001"]
    assert_holds(collection, 300 if taken == "deleted" else 600)


def test_a_larger_layer_gets_an_index(edge: EdgeBackend) -> None:
    collection = edge.create("large", SPEC)
    for start in range(0, 4100, 1025):
        collection.upsert(numbered_entries(start, start + 1025))
    collection.optimize()
    assert collection.info().indexed_entries == 4100


def test_later_entries_and_overwrites_count_as_not_indexed(
    edge: EdgeBackend, collection: EdgeCollection
) -> None:
    collection.optimize(Compression(Quantization.INT8))
    collection.upsert(numbered_entries(590, 650))
    assert (collection.info().entries, collection.info().indexed_entries) == (650, 590)
    collection.close()
    again = edge.open("layer", SPEC)
    assert (again.info().entries, again.info().indexed_entries) == (650, 590)
    again.optimize(Compression(Quantization.INT8))
    assert (again.info().entries, again.info().indexed_entries) == (650, 650)


def test_the_optimized_generation_opens_without_reading_payloads(
    edge: EdgeBackend, collection: EdgeCollection, data_dir: Path
) -> None:
    collection.optimize(Compression())
    assert (data_dir / "layer" / "gen-000001" / "values.npz").exists()
    collection.upsert(numbered_entries(600, 601))
    assert not (data_dir / "layer" / "gen-000001" / "values.npz").exists()


def fail(*_: object, **__: object) -> None:
    raise StorageError("made to fail")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (optimizer, "copy_tree"),
        (OptimizeJob, "run"),
        (EngineShard, "load"),
        (EngineShard, "counts"),
        (ValueTable, "save"),
        (edge_files.CollectionFiles, "write"),
        (edge_files, "fsync_path"),
    ],
)
def test_a_failure_at_any_step_changes_nothing(
    edge: EdgeBackend,
    collection: EdgeCollection,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(owner, name, fail)
        with pytest.raises(StorageError, match="made to fail"):
            collection.optimize(Compression(Quantization.INT8))
    assert generations(data_dir) == ["gen-000000"]
    assert collection.info().compression.quantization is Quantization.NONE
    collection.upsert(numbered_entries(600, 610))
    collection.close()
    assert_holds(edge.open("layer", SPEC), 610)


def test_a_failure_right_after_the_switch_of_current_goes_back(
    edge: EdgeBackend, collection: EdgeCollection, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = edge_files.CollectionFiles.write
    calls = []

    def fail_once_after(files: edge_files.CollectionFiles, pointer: edge_files.Pointer) -> None:
        write(files, pointer)
        calls.append(pointer.generation)
        if len(calls) == 1:
            fail()

    monkeypatch.setattr(edge_files.CollectionFiles, "write", fail_once_after)
    with pytest.raises(StorageError, match="made to fail"):
        collection.optimize(Compression(Quantization.INT8))
    assert calls == [1, 0]
    collection.upsert(numbered_entries(600, 610))
    collection.close()
    assert_holds(edge.open("layer", SPEC), 610)


def test_a_child_that_fails_tells_why(
    collection: EdgeCollection, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = data_dir / "failing_child.py"
    module.write_text(
        "import sys; print('x' * 5000, 'no memory left', file=sys.stderr); sys.exit(3)"
    )
    monkeypatch.syspath_prepend(data_dir)
    monkeypatch.setattr(optimizer, "_CHILD", "failing_child")
    with pytest.raises(StorageError, match=r"status 3: x+ no memory left$") as caught:
        collection.optimize(Compression(Quantization.INT8))
    assert len(str(caught.value)) < 3000
    assert_holds(collection, 600)
    assert generations(data_dir) == ["gen-000000"]


@pytest.fixture
def slow_child(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the child wait for a file named `go` before it works; returns that file."""
    go = data_dir / "go"
    data_dir.mkdir(exist_ok=True)
    (data_dir / "slow_child.py").write_text(
        "import pathlib, sys, time\n"
        "from router_service.backends.edge.optimize_child import main\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.01)\n"
        "main(*sys.argv[1:])\n"
    )
    monkeypatch.syspath_prepend(data_dir)
    monkeypatch.setattr(optimizer, "_CHILD", "slow_child")
    return go


def wait_for(condition: Callable[[], object], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def child_runs(collection: EdgeCollection) -> bool:
    job = collection._optimizer._job
    return job is not None and job._process is not None


def test_searches_and_writes_go_on(
    slow_child: Path, edge: EdgeBackend, collection: EdgeCollection
) -> None:
    """What is written meanwhile is in both generations: replaced, added and deleted entries."""
    with ThreadPoolExecutor(1) as pool:
        optimized = pool.submit(collection.optimize, Compression(Quantization.INT8))
        wait_for(lambda: child_runs(collection))
        assert_holds(collection, 600)
        collection.upsert(numbered_entries(500, 800))
        assert collection.delete(np.arange(700, 900, dtype=np.uint64)) == 100
        collection.flush()
        assert_holds(collection, 700)
        assert not optimized.done()
        slow_child.touch()
        optimized.result(60)
    assert_holds(collection, 700)
    info = collection.info()
    assert (info.entries, info.indexed_entries, info.compression.quantization) == (
        700,
        500,
        Quantization.INT8,
    )
    assert collection.changed_entries == 200
    collection.close()
    assert_holds(edge.open("layer", SPEC), 700)


def test_a_crash_while_others_write_and_optimize_loses_nothing(
    slow_child: Path, collection: EdgeCollection, data_dir: Path, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(1) as pool:
        optimized = pool.submit(collection.optimize, Compression(Quantization.INT8))
        wait_for(lambda: child_runs(collection))
        collection.upsert(numbered_entries(600, 650))
        shutil.copytree(data_dir, tmp_path / "crashed")  # what SIGKILL leaves
        slow_child.touch()
        optimized.result(60)
    again = EdgeBackend(tmp_path / "crashed", min_free_bytes=0)
    assert_holds(again.open("layer", SPEC), 650)
    assert generations(tmp_path / "crashed") == ["gen-000000"]
    again.close()


def test_auto_optimize_indexes_what_is_new_and_leaves_the_rest(
    edge: EdgeBackend, collection: EdgeCollection
) -> None:
    collection.optimize(Compression(Quantization.INT8))
    for start in (600, 900, 1200):
        collection.upsert(numbered_entries(start, start + 300))
        assert collection.auto_optimize()
        assert (collection.info().indexed_entries, collection.changed_entries) == (start + 300, 0)
        assert collection.info().compression.quantization is Quantization.INT8
    collection.delete(np.arange(1300, 1500, dtype=np.uint64))
    assert_holds(collection, 1300)
    collection.close()
    assert_holds(edge.open("layer", SPEC), 1300)


def test_what_two_generations_share_is_never_changed(
    collection: EdgeCollection, data_dir: Path
) -> None:
    """Large files of indexed segments are linked, not copied."""
    collection.optimize(Compression(Quantization.INT8))
    shared = [p for name in optimizer._NEVER_CHANGED for p in data_dir.glob(f"**/{name}")]
    assert shared
    links = [data_dir / str(number) for number in range(len(shared))]
    for path, link in zip(shared, links, strict=True):
        shutil.copyfile(path, link.with_suffix(".before"))
        os.link(path, link)
    collection.upsert(numbered_entries(550, 900))
    collection.delete(np.arange(0, 50, dtype=np.uint64))
    collection.flush()
    collection.auto_optimize()
    collection.upsert(numbered_entries(0, 100))
    collection.optimize(Compression())
    assert_holds(collection, 900)
    for link in links:
        assert link.read_bytes() == link.with_suffix(".before").read_bytes()


def test_optimize_ends_auto_optimize(slow_child: Path, collection: EdgeCollection) -> None:
    with ThreadPoolExecutor(2) as pool:
        automatic = pool.submit(collection.auto_optimize)
        wait_for(lambda: child_runs(collection))
        assert not collection.auto_optimize()
        optimized = pool.submit(collection.optimize, Compression(Quantization.INT8))
        assert automatic.result(60) is False
        slow_child.touch()  # not before: the first child would be done in no time
        optimized.result(60)
    assert collection.info().compression.quantization is Quantization.INT8


def test_one_optimize_at_a_time(slow_child: Path, collection: EdgeCollection) -> None:
    with ThreadPoolExecutor(1) as pool:
        optimized = pool.submit(collection.optimize, Compression(Quantization.INT8))
        wait_for(lambda: child_runs(collection))
        with pytest.raises(Busy, match="try again"):
            collection.optimize(Compression())
        slow_child.touch()
        optimized.result(60)


def test_the_child_has_half_of_the_cores_while_searches_go_on(
    slow_child: Path, edge: EdgeBackend, collection: EdgeCollection
) -> None:
    """Also searches of other layers."""
    other = edge.create("other", SPEC)
    cores, seen = sorted(os.sched_getaffinity(0)), list[list[int]]()
    keys = numbered_entries(0, 1).keys

    def look(stage: str, done: int, total: int) -> None:
        job = collection._optimizer._job
        if stage != "index" or job is None or job._process is None or slow_child.exists():
            return
        seen.append(sorted(os.sched_getaffinity(job._process.pid)))
        few = cores[len(cores) // 2 :]
        if few in seen and seen[-1] == cores:
            slow_child.touch()  # lookups have ended, and it has all again
        elif few not in seen:
            other.search(keys, 1, OPTIONS)

    collection.optimize(Compression(Quantization.INT8), look)
    assert_holds(collection, 600)


def test_what_the_report_raises_ends_the_child_and_changes_nothing(
    slow_child: Path, collection: EdgeCollection, data_dir: Path
) -> None:
    def cancel(stage: str, done: int, total: int) -> None:
        if stage == "index":
            raise StorageError("no longer wanted")

    with pytest.raises(StorageError, match="no longer wanted"):
        collection.optimize(Compression(Quantization.INT8), cancel)
    assert generations(data_dir) == ["gen-000000"]
    collection.upsert(numbered_entries(600, 610))
    assert_holds(collection, 610)


def test_close_stops_a_running_optimization(
    slow_child: Path, edge: EdgeBackend, collection: EdgeCollection
) -> None:
    with ThreadPoolExecutor(1) as pool:
        optimized = pool.submit(collection.optimize, Compression(Quantization.INT8))
        wait_for(lambda: child_runs(collection))
        collection.close()
        with pytest.raises(StorageError, match="stopped"):
            optimized.result(60)
    assert_holds(edge.open("layer", SPEC), 600)


def test_a_job_that_was_stopped_does_not_start(tmp_path: Path) -> None:
    job = OptimizeJob(say_nothing, Pacing())
    job.stop()
    with pytest.raises(StorageError, match="stopped"):
        job.run(tmp_path, SPEC, Compression())


def test_readers_never_see_a_torn_entry_while_others_write_and_optimize(
    collection: EdgeCollection,
) -> None:
    done = threading.Event()
    queries = numbered_entries(0, 2000).keys

    def read() -> int:
        searches = 0
        while not done.is_set():
            found = collection.search(queries[:: 2000 // 150], 3, OPTIONS)
            np.testing.assert_array_equal(found.values[..., 0], found.ids)
            assert (found.values[..., 1] == found.ids * 2).all()
            searches += 1
        return searches

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for start in range(500, 2000, 100):
                collection.upsert(numbered_entries(start, start + 100))
                if start == 1000:
                    collection.optimize(Compression(Quantization.INT8))
        finally:
            done.set()
        assert all(reader.result(60) > 0 for reader in readers)
    assert_holds(collection, 2000)

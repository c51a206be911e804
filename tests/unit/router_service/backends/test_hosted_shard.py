"""Collections whose engine has a process of its own."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from router_service.arrays import Entries, ExampleRef
from router_service.backends.base import Compression, Quantization
from router_service.backends.edge.backend import EdgeBackend, EdgeCollection
from router_service.backends.edge.engine import EngineShard
from router_service.backends.edge.processes import HostedShard
from router_service.errors import (
    Cancelled,
    CorruptMemory,
    DeadlineTooShort,
    DirectoryInUse,
    EngineStopped,
    StorageError,
)
from tests.unit.router_service.backends.numbered_entries import (
    OPTIONS,
    SPEC,
    assert_holds,
    numbered_entries,
)


@pytest.fixture
def edge(data_dir: Path) -> Iterator[EdgeBackend]:
    backend = EdgeBackend(data_dir, min_free_bytes=0, isolate_above_bytes=-1)
    yield backend
    backend.close()


def hosted(collection: EdgeCollection) -> HostedShard:
    shard = collection._served.now.shard
    assert isinstance(shard, HostedShard)
    return shard


def host_of(collection: EdgeCollection) -> int:
    return hosted(collection)._process.pid


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def stop(process: int) -> None:
    """SIGSTOP, which works some time after it was sent."""
    os.kill(process, signal.SIGSTOP)
    os.waitid(os.P_PID, process, os.WSTOPPED | os.WNOWAIT)


def test_every_call_gives_what_the_engine_gives(
    edge: EdgeBackend, collection: EdgeCollection
) -> None:
    assert_holds(collection, 600)
    keys = numbered_entries(0, 600).keys
    found = collection.search(
        keys[:20], 1, OPTIONS, [ExampleRef("s", f"e{i % 2}") for i in range(20)]
    )
    assert (found.ids[10:20:2, 0] == np.arange(10, 20, 2)).all()  # e0 leaves the entries of e1 in
    assert (found.ids[11:20:2, 0] != np.arange(11, 20, 2)).all()
    assert collection.delete(np.arange(590, 700, dtype=np.uint64)) == 10
    assert_holds(collection, 590)
    assert collection.provenance(np.array([3, 595], np.uint64)).keys() == {3}
    assert len(collection.scroll(None, 5, with_keys=False).keys[0]) == 0
    collection.upsert(numbered_entries(590, 600), fsync=True)
    before = host_of(collection)
    collection.optimize(Compression(Quantization.INT8))
    assert host_of(collection) != before
    assert not is_running(before)
    assert_holds(collection, 600)
    collection.close()
    assert_holds(edge.open("layer", SPEC), 600)


def mapped_bytes(process: int, directory: Path) -> int:
    """Of the files under a directory, as far as they count as a process's memory."""
    found, inside = 0, False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = f"{directory}/" in line
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux only")
def test_files_are_mapped_as_they_are_used(edge: EdgeBackend, collection: EdgeCollection) -> None:
    """Not what opening has read: all keys, and the engine's log."""
    for start in range(600, 12_600, 2000):
        collection.upsert(numbered_entries(start, start + 2000))
    collection.optimize(Compression(Quantization.INT8))
    collection.close()
    again = edge.open("layer", SPEC)
    files = again._served.files
    shard = files.shard(again._served.now.pointer.generation)
    matrix = next(shard.glob("segments/*/vector_storage/matrix.dat"))
    assert mapped_bytes(host_of(again), shard) < matrix.stat().st_size / 2
    assert_holds(again, 12_600)


def test_close_ends_the_process(collection: EdgeCollection) -> None:
    process = host_of(collection)
    collection.close()
    assert not is_running(process)


def test_a_process_that_dies_is_started_again_and_has_every_acknowledged_write(
    collection: EdgeCollection,
) -> None:
    collection.delete(np.arange(595, 600, dtype=np.uint64))
    process = host_of(collection)
    os.kill(process, signal.SIGKILL)
    with suppress(StorageError):  # a call that is on its way fails
        collection.search(numbered_entries(0, 1).keys, 1, OPTIONS)
    assert_holds(collection, 595)
    assert host_of(collection) != process
    collection.upsert(numbered_entries(595, 610))
    assert_holds(collection, 610)


def test_a_call_under_way_says_how_the_process_ended(collection: EdgeCollection) -> None:
    shard = hosted(collection)
    os.kill(shard._process.pid, signal.SIGKILL)
    with pytest.raises(StorageError, match=r"ended with status -9.*started again"):
        shard.flush()


def test_an_answer_that_nobody_waits_for_is_not_anothers(collection: EdgeCollection) -> None:
    keys, left = numbered_entries(0, 600).keys, threading.Event()
    process = host_of(collection)
    stop(process)
    with ThreadPoolExecutor(2) as pool:
        leaving = replace(OPTIONS, left=left.is_set)
        # One at work, one in line for the engine.
        calls = [pool.submit(collection.search, keys[:5], 1, leaving) for _ in range(2)]
        while not collection._served._engine._waiting:
            time.sleep(0.001)
        left.set()
        for call in calls:
            with pytest.raises(Cancelled):
                call.result()
    late = replace(OPTIONS, deadline=time.monotonic() + 0.05)
    with pytest.raises(DeadlineTooShort):
        collection.search(keys[5:7], 1, late)
    os.kill(process, signal.SIGCONT)
    assert_holds(collection, 600)
    assert host_of(collection) == process


def test_a_process_that_does_not_answer_is_ended(collection: EdgeCollection) -> None:
    process = host_of(collection)
    stop(process)
    collection._served._resources.shards.hurry()
    with pytest.raises(EngineStopped, match=r"ended with status -9.*started again"):
        collection.search(numbered_entries(0, 1).keys, 1, OPTIONS)
    assert not is_running(process)
    assert_holds(collection, 600)
    collection.upsert(numbered_entries(600, 610))
    assert_holds(collection, 610)


def test_an_answer_that_nobody_takes_is_no_standstill(collection: EdgeCollection) -> None:
    shard, process = hosted(collection), host_of(collection)
    stop(process)
    late = replace(OPTIONS, deadline=time.monotonic() + 0.05)
    with pytest.raises(DeadlineTooShort):
        collection.search(numbered_entries(0, 600).keys[:5], 1, late)
    os.kill(process, signal.SIGCONT)
    assert shard._connection.poll(60)
    for _ in range(2):  # the second finds the processor time of the first
        shard._still_since = -float("inf")
        shard.end_if_stuck(stopping=True)
    assert is_running(process)
    assert_holds(collection, 600)
    assert host_of(collection) == process


@pytest.mark.parametrize("first", [600, 595])
def test_a_write_that_the_process_died_in_is_known_to_the_next(
    collection: EdgeCollection, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    real = HostedShard.upsert

    def dies(shard: HostedShard, entries: Entries, generation: int) -> None:
        real(shard, entries, generation)
        os.kill(shard._process.pid, signal.SIGKILL)
        shard._process.wait()
        raise shard._died()

    with monkeypatch.context() as patched:
        patched.setattr(HostedShard, "upsert", dies)
        with pytest.raises(EngineStopped):
            collection.upsert(numbered_entries(first, 610))
    # Tried again as a client does, with times of its own
    again = numbered_entries(600, 620)
    origins = [replace(origin, created_unix_ms=17) for origin in again.provenance]
    collection.upsert(replace(again, provenance=origins))
    assert_holds(collection, 620)
    collection.verify()


def test_what_is_known_of_a_layer_that_does_not_answer(collection: EdgeCollection) -> None:
    known = collection.info()
    process = host_of(collection)
    stop(process)
    found = collection.info()
    os.kill(process, signal.SIGCONT)
    assert replace(found, disk_bytes=0) == replace(known, disk_bytes=0)


def test_the_process_ends_with_the_service(collection: EdgeCollection) -> None:
    shard = hosted(collection)
    shard._connection.close()  # what the kernel does when the service is killed
    shard._process.wait(60)
    assert shard._process.returncode == 0


def test_errors_keep_their_kind_and_text(collection: EdgeCollection, data_dir: Path) -> None:
    with pytest.raises(CorruptMemory, match="cannot open"):
        HostedShard(data_dir / "nothing", SPEC, Compression())
    with pytest.raises(DirectoryInUse, match="another process"):
        HostedShard(data_dir / "layer/gen-000000/shard", SPEC, Compression())


def test_a_collection_moves_to_its_own_process_when_it_has_grown(data_dir: Path) -> None:
    edge = EdgeBackend(data_dir, min_free_bytes=0, isolate_above_bytes=64 << 10)
    made = edge.create("layer", SPEC)
    made.upsert(numbered_entries(0, 3000))
    assert isinstance(made._served.now.shard, EngineShard)
    made.optimize(Compression())
    assert hosted(made).alive
    assert_holds(made, 3000)
    edge.close()

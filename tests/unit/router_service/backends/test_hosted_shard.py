"""Collections whose engine has a process of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from router_service.arrays import ExampleRef
from router_service.backends.base import Compression, Quantization
from router_service.backends.edge.backend import EdgeBackend, EdgeCollection
from router_service.backends.edge.engine import EngineShard
from router_service.backends.edge.processes import HostedShard
from router_service.errors import CorruptMemory, DirectoryInUse, StorageError
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

"""Snapshots on a cluster of three, collections in three shards of two replicas: a node is down, or goes meanwhile.

On stand-ins: nodes of a real cluster cannot be killed from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from router_service.backends.qdrant_server.options import ServerOptions
from router_service.errors import BackendUnavailable
from router_service.snapshots.base import SnapshotRef
from router_service.snapshots.local import LocalSnapshotStore
from tests.congruence.fast_dir import fast_dir
from tests.qdrant_standin import QdrantCluster
from tests.unit.router_service.numbered_memory import (
    MODEL,
    SETTINGS,
    answers,
    assert_same_answers,
    counts,
    fill,
    open_store,
)
from tests.unit.router_service.snapshots.server_memories import (
    MONDAY,
    Service,
    assert_same_entries,
    at,
    opened,
    quiet,
)

__all__ = ["fast_dir"]


@pytest.fixture
def cluster(fast_dir: Path) -> Iterator[QdrantCluster]:
    with QdrantCluster(fast_dir / "qdrant") as running:
        yield running


@pytest.fixture
def service(cluster: QdrantCluster, fast_dir: Path) -> Iterator[Service]:
    """Of the first node, with a memory `bible` of 100 entries in each layer."""
    options = ServerOptions(
        cluster.peers[0].url, shard_number=3, replication_factor=2, timeout_s=30.0
    )
    with opened(options, fast_dir / "snapshots") as (store, snapshot_store):
        fill(store.create("bible", MODEL, SETTINGS), 0, 100)
        yield store, snapshot_store


def test_with_a_node_down(cluster: QdrantCluster, service: Service, fast_dir: Path) -> None:
    """Made, restored as a copy and in place, and into an embedded memory and back, bit for bit."""
    store, snapshot_store = service
    memory = store.get("bible")
    before = answers(memory)
    cluster.peers[2].kill()
    [made] = snapshot_store.create("bible", "monday", quiet)
    assert list(snapshot_store.verify(MONDAY, quiet)) == [made]
    [(copy, _)] = snapshot_store.restore(MONDAY, "copy", False, quiet)
    assert_same_entries(copy, memory)
    assert_same_answers(answers(copy), before)

    memory.delete(0, np.array([3, 4], np.uint64))
    [(restored, _)] = snapshot_store.restore(MONDAY, "bible", True, quiet)
    assert_same_answers(answers(restored), before)
    with open_store(fast_dir / "data") as embedded:
        brought = LocalSnapshotStore(embedded, fast_dir / "embedded", 0)
        [(there, _)] = brought.restore(SnapshotRef(path=str(made.path)), "there", False, quiet)
        assert_same_answers(answers(there), before)
        [back] = brought.create("there", "tuesday", quiet)
    cluster.peers[2].start()
    [(again, _)] = snapshot_store.restore(SnapshotRef(path=str(back.path)), "again", False, quiet)
    assert_same_answers(answers(again), before)
    cluster.wait_whole()
    for name in again.record.collections:
        assert not cluster.replicas_differ(name)


@pytest.mark.parametrize("lost", ["kill", "hang"])
def test_a_node_that_goes_while_entries_are_copied(
    cluster: QdrantCluster, service: Service, lost: str
) -> None:
    """Not the one that is asked: the shards' other replicas answer."""
    _, snapshot_store = service
    lose: Callable[[], None] = getattr(cluster.peers[1], lost)
    [made] = snapshot_store.create("bible", "monday", at("copy entries", lose))
    assert made.entries == 200
    assert list(snapshot_store.verify(MONDAY, quiet)) == [made]


def test_the_node_that_is_asked_goes(
    cluster: QdrantCluster, service: Service, fast_dir: Path
) -> None:
    """Nothing is left, and when it is back the snapshot can be made."""
    store, snapshot_store = service
    with pytest.raises(BackendUnavailable):
        list(snapshot_store.create("bible", "monday", at("copy entries", cluster.peers[0].kill)))
    assert [path.name for path in (fast_dir / "snapshots" / "bible").iterdir()] == ["LOCK"]
    cluster.peers[0].start()
    [made] = snapshot_store.create("bible", "monday", quiet)
    assert counts(store.get("bible")) == [100, 100]
    assert snapshot_store.list("") == [made]

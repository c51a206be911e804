"""Nodes of a Qdrant cluster are lost in turn while two services write and look up.

No acknowledged write is lost, nothing stale is found (but by another service than the one that wrote, for a moment,
while a node is cut off), nothing is INTERNAL, lookups go on, and in the end all replicas hold the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.congruence.fast_dir import fast_dir
from tests.faults.cluster_load import Load, options, wait_until_equal
from tests.qdrant_standin import Peer, QdrantCluster
from tests.sidecar import Sidecar

__all__ = ["fast_dir"]

Loss = tuple[Callable[[Peer], None], Callable[[Peer], None]]
LOSSES: list[Loss] = [
    (Peer.kill, Peer.start),
    (Peer.hang, Peer.resume),
    (Peer.stop, Peer.start),
    (Peer.cut_off, Peer.join),
]


@pytest.fixture
def cluster(fast_dir: Path) -> Iterator[QdrantCluster]:
    with QdrantCluster(fast_dir / "qdrant") as nodes:
        yield nodes


@pytest.mark.parametrize(("writes", "losses"), [(1, LOSSES), (2, LOSSES[::3])])
def test_nodes_lost_in_turn(
    cluster: QdrantCluster, fast_dir: Path, writes: int, losses: list[Loss]
) -> None:
    with ExitStack() as stack:
        services = [
            stack.enter_context(Sidecar(fast_dir / f"data-{n}", **options(cluster, n, writes)))
            for n in range(2)
        ]
        with Load(services) as load:
            load.wait_for_more(acknowledged=20, lookups=10)
            for number, (lose, bring_back) in enumerate(losses):
                peer = cluster.peers[2 - number % 3]
                load.cut_off = lose is Peer.cut_off
                load.phase = f"{lose.__name__} of node {2 - number % 3}"
                lose(peer)
                load.wait_for_more(**{"ended writes": 8 // writes}, lookups=20)
                load.phase = f"after {load.phase}"
                bring_back(peer)
                cluster.wait_whole()
                load.wait_for_more(acknowledged=10, lookups=10)
                with load.at_rest():
                    wait_until_equal(cluster)
                    load.check()
            assert not any(kind.startswith("refused lookups") for kind in load.done), load.done
        for service in services:
            service.stop_cleanly()


@pytest.mark.parametrize("loss", LOSSES[:2], ids=["killed", "hung"])
def test_a_memory_made_while_a_node_is_lost(
    cluster: QdrantCluster, fast_dir: Path, loss: Loss
) -> None:
    lose, bring_back = loss
    with ExitStack() as stack:
        services = [
            stack.enter_context(Sidecar(fast_dir / f"data-{n}", **options(cluster, n, 1)))
            for n in range(2)
        ]
        lose(cluster.peers[2])
        with Load(services) as load:
            load.wait_for_more(acknowledged=20, lookups=10)
            bring_back(cluster.peers[2])
            load.wait_for_more(acknowledged=10, lookups=10)
            with load.at_rest():
                wait_until_equal(cluster)
                load.check()
        for service in services:
            service.stop_cleanly()

"""Memories on a cluster of which nodes lag or are lost: made, written and replaced through different nodes.

Of the stand-in's cluster only: nodes of a real one are not the tests' to stop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest

from router_service.errors import RoutingServiceError
from router_service.memories.store import MemoryStore
from router_service.memories.swap import replace_memory
from router_service.operations import Operations
from router_service.settings import QdrantSettings
from router_service.storage import opened_store
from tests.qdrant_standin.cluster import QdrantCluster
from tests.unit.router_service.numbered_memory import MODEL, SETTINGS, answers, counts, fill

OLD, NEW = 60, 40
SLOW_S, PATIENCE_S = 0.15, 60.0
QDRANT = QdrantSettings(timeout_s=30.0, replication_factor=2)


@pytest.fixture
def cluster(fast_dir: Path) -> Iterator[QdrantCluster]:
    with QdrantCluster(fast_dir / "qdrant", consensus_delay_s=SLOW_S) as running:
        yield running


@pytest.fixture
def stores(cluster: QdrantCluster) -> Iterator[list[MemoryStore]]:
    """Of two services, each of which asks another node."""
    with ExitStack() as stack:
        yield [stack.enter_context(opened_store(peer.url, QDRANT)) for peer in cluster.peers[:2]]


def made(store: MemoryStore) -> None:
    """`bible`, and `rebuilt`, to take its place; they are read in different ways."""
    fill(store.create("bible", MODEL, SETTINGS), 0, OLD)
    fill(store.create("rebuilt", MODEL, replace(SETTINGS, neighbours=3)), 0, NEW)


def said(store: MemoryStore, name: str = "bible") -> bytes:
    """What all layers answer, through the name."""
    found = store.asked(name, answers)
    return b"".join(each.lambdas.tobytes() + each.blended.tobytes() for each in found)


@contextmanager
def asking(store: MemoryStore) -> Iterator[Callable[[], list[bytes]]]:
    """Lookups and looks at the records without pause; what is yielded ends them and returns the answers."""
    done, found = threading.Event(), list[bytes]()
    failures: list[RoutingServiceError] = []

    def ask() -> None:
        try:
            while not done.wait(0.002):
                found.append(said(store))
                store.refresh()
        except RoutingServiceError as error:
            failures.append(error)

    def end() -> list[bytes]:
        done.set()
        thread.join()
        assert failures == []
        return found

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield end
    finally:
        done.set()
        thread.join()


def until(happened: Callable[[], bool]) -> None:
    waited, pause = 0.0, threading.Event()
    while not happened():
        assert waited < PATIENCE_S
        pause.wait(0.02)
        waited += 0.02


@pytest.mark.parametrize("replacing", [0, 1])
def test_no_answer_is_mixed_while_nodes_agree_slowly(
    cluster: QdrantCluster, stores: list[MemoryStore], replacing: int
) -> None:
    made(stores[0])
    old, new = said(stores[0]), said(stores[0], "rebuilt")
    assert said(stores[1]) == old
    with asking(stores[0]) as end_one, asking(stores[1]) as end_other:
        replace_memory(stores[replacing], Operations(), "bible", "rebuilt")
        until(lambda: all(said(each) == new for each in stores))
        runs = [[each for each, _ in groupby(end())] for end in (end_one, end_other)]
    assert all(run in ([old, new], [old], [new]) for run in runs)


def test_a_node_that_is_away_keeps_nothing_from_being_made(
    cluster: QdrantCluster, stores: list[MemoryStore]
) -> None:
    cluster.peers[2].kill()
    made(stores[0])
    assert counts(stores[1].get("bible")) == [OLD] * 2
    new = said(stores[1], "rebuilt")
    replace_memory(stores[1], Operations(), "bible", "rebuilt")
    until(lambda: said(stores[0]) == new)
    cluster.peers[2].start()
    cluster.wait_whole()
    with opened_store(cluster.peers[2].url, QDRANT) as third:
        assert third.names() == ["bible"]
        assert said(third) == new
    stores[0].delete("bible")
    assert [each for each in cluster.collections() if "~layer-" in each] == []


@pytest.mark.parametrize("lost", [0, 2])
def test_a_node_that_is_lost_while_a_memory_is_replaced(
    cluster: QdrantCluster, stores: list[MemoryStore], lost: int
) -> None:
    """The service that replaces asks node 1. What it says is so; else it is the old one, or soon the new one."""
    made(stores[1])
    old, new = said(stores[1]), said(stores[1], "rebuilt")
    changed = cluster.peers[1].faults.calls["UpdateAliases"]
    fault = cluster.peers[1].faults.black_hole("UpdateAliases", calls=1)
    failures: list[RoutingServiceError] = []

    def work() -> None:
        try:
            replace_memory(stores[1], Operations(), "bible", "rebuilt")
        except RoutingServiceError as error:
            failures.append(error)

    with asking(stores[1]) as end:
        replacing = threading.Thread(target=work)
        replacing.start()
        until(lambda: cluster.peers[1].faults.calls["UpdateAliases"] > changed)
        cluster.peers[lost].kill()
        fault.lift()
        replacing.join()
        cluster.peers[lost].start()
        cluster.wait_whole()
        until(lambda: (said(stores[1]) == new) or (bool(failures) and said(stores[1]) == old))
        run = [each for each, _ in groupby(end())]
    assert run in ([old, new], [old], [new])
    stores[1].refresh()
    assert said(stores[1]) == new
    with opened_store(cluster.peers[0].url, QDRANT) as again:
        assert said(again) == new
        assert again.names() == ["bible"]

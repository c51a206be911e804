"""What a cluster agrees on: who must be there, who hears of it late, and how long a call waits."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import qdrant_client.grpc as pb
from qdrant_client import QdrantClient, models
from standin_uses import (
    EUCLID,
    NAME,
    connect,
    create,
    points,
    refused,
    rows,
    stubs,
    upsert,
    wait_for,
)

from tests.qdrant_standin import QdrantCluster

Clients = list[QdrantClient]
UNKNOWN = f"Not found: Collection `{NAME}` doesn't exist!"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def test_a_node_that_lags_does_not_know_yet(
    cluster: QdrantCluster, clients: Clients, pool: ThreadPoolExecutor
) -> None:
    with cluster.peers[1].lagging():
        made = pool.submit(create, clients[0])
        wait_for(lambda: clients[2].collection_exists(NAME))
        with refused(grpc.StatusCode.NOT_FOUND, UNKNOWN):
            clients[1].count(NAME)
        assert not made.done()  # it waits for all nodes
    made.result()
    assert clients[1].count(NAME).count == 0


def test_a_write_that_a_lagging_node_does_not_know_of(
    cluster: QdrantCluster, clients: Clients
) -> None:
    with cluster.peers[1].lagging():
        create(clients[0], timeout=10)
        with refused(grpc.StatusCode.NOT_FOUND, "shards failed to apply operation"):
            upsert(clients[0], points(rows(60)))


def test_making_a_collection_while_a_node_is_down_succeeds_when_its_time_is_over(
    cluster: QdrantCluster, clients: Clients
) -> None:
    cluster.peers[2].kill()
    for timeout in (None, 15):
        name = f"{NAME}-{timeout}"
        clients[0].create_collection(
            name, vectors_config=EUCLID, replication_factor=2, timeout=timeout
        )
        upsert(clients[1], points(rows(60)), name)
        assert clients[0].count(name).count == 60
    cluster.peers[2].start()
    cluster.wait_whole()
    for name in cluster.collections():
        assert cluster.replicas_differ(name) == []
        assert sum(cluster.peers[2].local_counts(name).values()) > 0


def test_without_a_majority_nothing_is_agreed_on(cluster: QdrantCluster, clients: Clients) -> None:
    create(clients[0], replication_factor=3)
    upsert(clients[0], points(rows(60)))
    for peer in cluster.peers[1:]:
        peer.kill()
    with refused(grpc.StatusCode.INTERNAL, "leader is not established within 2s"):
        create(clients[0], "another", timeout=2)
    assert clients[0].count(NAME).count == 60


def test_a_node_that_does_not_hear_the_commit(cluster: QdrantCluster, clients: Clients) -> None:
    with (
        cluster.peers[0].lagging(),
        refused(
            grpc.StatusCode.INTERNAL,
            "Waiting for consensus operation commit failed. Timeout set at: 2 seconds",
        ),
    ):
        create(clients[0], timeout=2)
    wait_for(lambda: clients[0].collection_exists(NAME))  # it was made all the same


def test_a_new_leader_is_found(
    cluster: QdrantCluster, clients: Clients, pool: ThreadPoolExecutor
) -> None:
    cluster.peers[0].kill()
    with connect(cluster.peers[1].port, timeout=100) as patient:
        made = pool.submit(create, patient, replication_factor=2, timeout=900)
        wait_for(lambda: clients[2].collection_exists(NAME))
        cluster.peers[0].start()  # what it waits for
        made.result()
    cluster.wait_whole()
    assert cluster.peers[0].states(NAME) == cluster.peers[1].states(NAME)


def test_what_was_agreed_on_reaches_a_node_that_was_away(
    cluster: QdrantCluster, clients: Clients
) -> None:
    create(clients[0], replication_factor=2)
    create(clients[0], "dropped")
    cluster.peers[2].kill()
    clients[0].delete_collection("dropped")
    clients[0].create_payload_index(NAME, "part", models.PayloadSchemaType.INTEGER, wait=False)
    cluster.peers[2].start()
    channel, collections, _, _ = stubs(cluster.peers[2].port)
    with channel:
        found = collections.List(pb.ListCollectionsRequest(), wait_for_ready=True)
        assert [each.name for each in found.collections] == [NAME]
        info = collections.Get(pb.GetCollectionInfoRequest(collection_name=NAME))
    assert "part" in info.result.payload_schema

"""A whole cluster: any node answers for all, and it is cut and copied as asked."""

from __future__ import annotations

import grpc
import httpx
import numpy as np
import pytest
import qdrant_client.grpc as pb
from qdrant_client import QdrantClient, models
from standin_uses import NAME, create, ids, points, refused, rows, stubs, upsert

from tests.qdrant_standin import QdrantCluster, QdrantStandIn

Clients = list[QdrantClient]


@pytest.fixture
def keys() -> np.ndarray:
    return rows(90)


def filled(clients: Clients, keys: np.ndarray, **settings: object) -> None:
    create(clients[0], **settings)
    upsert(clients[1], points(keys, part=lambda n: n % 3))


def test_shards_and_replicas(cluster: QdrantCluster, clients: Clients, keys: np.ndarray) -> None:
    filled(clients, keys, replication_factor=2)
    held = [peer.local_counts(NAME) for peer in cluster.peers]
    assert [len(each) for each in held] == [2, 2, 2]
    assert sum(sum(each.values()) for each in held) == 2 * len(keys)
    assert cluster.replicas_differ(NAME) == []
    assert cluster.is_whole()


def test_a_number_of_shards_is_honoured(cluster: QdrantCluster, clients: Clients) -> None:
    create(clients[0], shard_number=5, replication_factor=9)
    states = cluster.peers[0].states(NAME)
    assert len(states) == 5
    assert all(len(replicas) == 3 for replicas in states.values())  # not two on one node


def test_any_node_answers_as_one_server_does(
    clients: Clients, client: QdrantClient, keys: np.ndarray
) -> None:
    filled(clients, keys)
    filled([client, client], keys)
    even = models.Filter(must=[models.FieldCondition(key="part", match=models.MatchValue(value=0))])
    for each in clients:
        assert each.count(NAME).count == len(keys)
        assert each.count(NAME, count_filter=even).count == 30
        assert each.scroll(NAME, limit=7) == client.scroll(NAME, limit=7)
        assert each.scroll(NAME, limit=7, offset=85) == client.scroll(NAME, limit=7, offset=85)
        assert ids(each.retrieve(NAME, [80, 3, 400])) == [80, 3]
        for wanted in ({"limit": 5}, {"limit": 4, "offset": 3}, {"query_filter": even}):
            found, one = (
                c.query_points(NAME, query=keys[7].tolist(), **wanted).points
                for c in (each, client)
            )
            assert [(p.id, p.score) for p in found] == [(p.id, p.score) for p in one]


def test_deletes_reach_every_replica(
    cluster: QdrantCluster, clients: Clients, keys: np.ndarray
) -> None:
    filled(clients, keys, replication_factor=2)
    clients[2].delete(NAME, [1, 2, 3])
    part = models.FieldCondition(key="part", match=models.MatchValue(value=1))
    clients[0].delete(NAME, models.Filter(must=[part]))
    assert [each.count(NAME).count for each in clients] == [58] * 3
    assert cluster.replicas_differ(NAME) == []


def test_an_index_of_a_field_is_on_every_node(clients: Clients, keys: np.ndarray) -> None:
    filled(clients, keys)
    clients[0].create_payload_index(NAME, "part", models.PayloadSchemaType.INTEGER)
    info = clients[2].get_collection(NAME)
    assert info.payload_schema["part"].points == len(keys)
    assert info.points_count == len(keys)


def test_bad_input_blames_no_replica(cluster: QdrantCluster, clients: Clients) -> None:
    create(clients[0], replication_factor=2)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "Vector dimension error: expected dim: 8"):
        upsert(clients[0], points(rows(3, width=4)))
    assert cluster.is_whole()


def test_aliases_are_the_same_everywhere(clients: Clients, keys: np.ndarray) -> None:
    filled(clients, keys)
    alias = models.CreateAlias(collection_name=NAME, alias_name="alias")
    clients[1].update_collection_aliases([models.CreateAliasOperation(create_alias=alias)])
    assert [each.count("alias").count for each in clients] == [len(keys)] * 3
    clients[2].delete_collection(NAME)
    assert clients[2].get_aliases().aliases == []


def test_a_name_is_taken_for_all(clients: Clients) -> None:
    create(clients[0])
    with refused(grpc.StatusCode.ALREADY_EXISTS, f"Collection `{NAME}` already exists!"):
        create(clients[1])


def test_cluster_info_names_peers(cluster: QdrantCluster, clients: Clients) -> None:
    create(clients[0], replication_factor=2)
    channel, collections, _, _ = stubs(cluster.peers[1].port)
    with channel:
        request = pb.CollectionClusterInfoRequest(collection_name=NAME)
        info = collections.CollectionClusterInfo(request)
    assert (info.peer_id, info.shard_count) == (cluster.peers[1].peer_id, 3)
    assert len(info.local_shards) == 2
    assert {each.peer_id for each in info.remote_shards} == {
        cluster.peers[n].peer_id for n in (0, 2)
    }
    replicas = [*info.local_shards, *info.remote_shards]
    assert {each.state for each in replicas} == {pb.ReplicaState.Active}


def test_status_of_the_cluster(cluster: QdrantCluster, standin: QdrantStandIn) -> None:
    status = httpx.get(f"{cluster.peers[1].rest_url}/cluster").json()["result"]
    assert (status["status"], status["peer_id"]) == ("enabled", cluster.peers[1].peer_id)
    assert sorted(map(int, status["peers"])) == sorted(peer.peer_id for peer in cluster.peers)
    single = httpx.get(f"{standin.rest_url}/cluster").json()["result"]
    assert single == {"status": "disabled"}


def test_a_blind_collection_counts_and_finds_nothing(
    cluster: QdrantCluster,
    clients: Clients,
    standin: QdrantStandIn,
    client: QdrantClient,
    keys: np.ndarray,
) -> None:
    filled(clients, keys)
    filled([client, client], keys)
    for server, each in ((cluster, clients[2]), (standin, client)):
        server.blind("knnmoe~m~layer-*")
        assert each.query_points(NAME, query=keys[0].tolist()).points == []
        assert each.count(NAME).count == len(keys)
        assert len(each.retrieve(NAME, [0, 1])) == 2

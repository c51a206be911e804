"""A cluster that loses nodes: what is read and written meanwhile, and what becomes of replicas."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import qdrant_client.grpc as pb
from qdrant_client import QdrantClient, models
from standin_uses import NAME, TIMEOUT_S, create, points, refused, rows, stubs, upsert, wait_for

from tests.qdrant_standin import Peer, QdrantCluster

Clients = list[QdrantClient]
KEYS = rows(60)
EVERY = models.ReadConsistencyType.ALL


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def fill(clients: Clients, writes: int = 1, replicas: int = 2) -> None:
    create(clients[0], replication_factor=replicas, write_consistency_factor=writes)
    upsert(clients[0], points(KEYS))


def more(first: int = 1000) -> list[object]:
    return points(rows(30, seed=first), first)


def states(peer: Peer, of: Peer) -> set[str]:
    return {
        replicas[of.peer_id] for replicas in peer.states(NAME).values() if of.peer_id in replicas
    }


def test_a_killed_node_refuses_and_its_calls_break(
    cluster: QdrantCluster, clients: Clients
) -> None:
    fill(clients)
    peer = cluster.peers[2]
    channel, _, found, health = stubs(peer.port)
    with channel:
        peer.faults.black_hole("Count")
        pending = found.Count.future(pb.CountPoints(collection_name=NAME))
        wait_for(lambda: peer.faults.calls["Count"])
        peer.kill()
        assert pending.exception(TIMEOUT_S).code() == grpc.StatusCode.UNAVAILABLE
        with refused(grpc.StatusCode.UNAVAILABLE, ""):
            health(pb.HealthCheckRequest(), timeout=TIMEOUT_S)


def test_a_node_that_is_stopped_ends_what_it_is_at(
    cluster: QdrantCluster, clients: Clients, pool: ThreadPoolExecutor
) -> None:
    fill(clients)
    peer = cluster.peers[2]
    fault = peer.faults.black_hole("Count")
    counted = pool.submit(clients[2].count, NAME)
    wait_for(lambda: peer.faults.calls["Count"])
    stopped = pool.submit(peer.stop)
    wait_for(lambda: _refuses(peer.port))
    assert not counted.done()
    fault.lift()
    assert counted.result().count == len(KEYS)
    stopped.result()
    assert clients[0].count(NAME).count == len(KEYS)


def _refuses(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def test_a_hung_node_takes_connections_and_answers_nothing(cluster: QdrantCluster) -> None:
    cluster.peers[1].hang()
    channel, _, _, health = stubs(cluster.peers[1].port)
    with channel:
        pending = health.future(pb.HealthCheckRequest(), wait_for_ready=True, timeout=TIMEOUT_S)
        assert not pending.done()
        cluster.peers[1].resume()
        assert pending.result().version == "1.20.0"


@pytest.mark.parametrize("loss", ["kill", "stop", "hang"])
def test_others_answer_for_a_lost_node(cluster: QdrantCluster, clients: Clients, loss: str) -> None:
    fill(clients)
    getattr(cluster.peers[2], loss)()
    for each in clients[:2]:
        assert each.count(NAME).count == len(KEYS)
        assert len(each.query_points(NAME, query=KEYS[0].tolist(), limit=60).points) == 60


@pytest.mark.parametrize("loss", ["kill", "stop", "hang"])
def test_a_write_that_enough_replicas_took_makes_the_others_dead_until_they_are_copied(
    cluster: QdrantCluster, clients: Clients, loss: str
) -> None:
    fill(clients)
    lost = cluster.peers[2]
    getattr(lost, loss)()
    upsert(clients[0], more())
    assert states(cluster.peers[0], lost) == {"Dead"}
    assert clients[1].count(NAME).count == 90
    cluster.recovery.pause()
    lost.resume() if loss == "hang" else lost.start()
    wait_for(lambda: states(cluster.peers[0], lost) == {"Partial"})
    assert clients[2].count(NAME).count == 90  # what it holds itself is not read
    assert not cluster.is_whole()
    cluster.recovery.resume()
    cluster.wait_whole()
    assert states(cluster.peers[0], lost) == {"Active"}
    assert cluster.replicas_differ(NAME) == []


def test_writes_go_on_while_a_replica_is_copied(cluster: QdrantCluster, clients: Clients) -> None:
    fill(clients)
    cluster.peers[2].kill()
    upsert(clients[0], more())
    cluster.recovery.pause()
    cluster.peers[2].start()
    wait_for(lambda: states(cluster.peers[0], cluster.peers[2]) == {"Partial"})
    upsert(clients[1], more(2000))
    clients[0].delete(NAME, [0, 1, 1000])
    cluster.recovery.resume()
    upsert(clients[2], more(3000))
    cluster.wait_whole()
    assert cluster.replicas_differ(NAME) == []
    assert [each.count(NAME).count for each in clients] == [147] * 3


def test_a_write_that_too_few_took_stays_half_done(
    cluster: QdrantCluster, clients: Clients
) -> None:
    fill(clients, writes=2)
    lost = cluster.peers[2]
    lost.kill()
    with refused(
        grpc.StatusCode.INTERNAL,
        "Service internal error: 2 out of 3 shards failed to apply operation. First error captured: "
        "Service internal error: Tonic status error",
    ):
        upsert(clients[0], more())
    assert states(cluster.peers[0], lost) == {"Active"}
    lost.start()
    cluster.wait_whole()
    assert cluster.replicas_differ(NAME) != []
    assert len({each.count(NAME).count for each in clients}) > 1
    upsert(clients[1], more())
    assert cluster.replicas_differ(NAME) == []


def test_a_shard_without_a_replica(cluster: QdrantCluster, clients: Clients) -> None:
    fill(clients, replicas=1)
    cluster.peers[2].kill()
    with refused(grpc.StatusCode.INTERNAL, "1 of 1 read operations failed:\n  Service internal"):
        clients[0].count(NAME)
    with refused(grpc.StatusCode.INTERNAL, "1 out of 3 shards failed to apply operation"):
        upsert(clients[0], more())


def test_consistency_of_reads(cluster: QdrantCluster, clients: Clients) -> None:
    fill(clients, writes=2)
    cluster.peers[2].kill()
    with refused(grpc.StatusCode.INTERNAL, "shards failed"):
        upsert(clients[0], more())
    with refused(grpc.StatusCode.INTERNAL, "1 of 2 read operations failed"):
        clients[0].query_points(NAME, query=KEYS[0].tolist(), consistency=EVERY)
    cluster.peers[2].start()
    cluster.wait_whole()
    channel, _, found, _ = stubs(cluster.peers[0].port)
    every = pb.ReadConsistency(type=pb.ReadConsistencyType.All)
    with channel:
        ids = [pb.PointId(num=n) for n in range(1000, 1030)]
        asked = pb.GetPoints(collection_name=NAME, ids=ids, read_consistency=every)
        agreed = {each.id.num for each in found.Get(asked).result}
    differing = {int(line.split()[3]) for line in cluster.replicas_differ(NAME)}
    assert agreed == set(range(1000, 1030)) - differing


def test_not_enough_active_replicas(cluster: QdrantCluster, clients: Clients) -> None:
    fill(clients)
    cluster.peers[2].kill()
    upsert(clients[0], more())
    with refused(grpc.StatusCode.INTERNAL, "does not have enough active replicas"):
        clients[0].query_points(NAME, query=KEYS[0].tolist(), consistency=EVERY)


def test_a_strong_write_goes_through_its_leader(cluster: QdrantCluster, clients: Clients) -> None:
    fill(clients)
    leader = cluster.peers[2]  # of two of three shards: the highest peer id
    upsert_strongly = {"wait": True, "ordering": models.WriteOrdering.STRONG}
    clients[0].upsert(NAME, more(), **upsert_strongly)
    leader.kill()
    with refused(
        grpc.StatusCode.INTERNAL,
        f"Failed to apply update with Strong ordering via leader peer {leader.peer_id}: ",
    ):
        clients[0].upsert(NAME, more(), **upsert_strongly)
    upsert(clients[0], more())
    leader.start()
    cluster.wait_whole()
    assert cluster.replicas_differ(NAME) == []


def test_a_node_that_is_cut_off_answers_clients_with_what_it_holds(
    cluster: QdrantCluster, clients: Clients
) -> None:
    fill(clients, replicas=3)
    alone = cluster.peers[2]
    alone.cut_off()
    upsert(clients[0], more())
    assert clients[1].count(NAME).count == 90
    assert clients[2].count(NAME).count == 60  # stale, as on a real cluster
    with refused(grpc.StatusCode.INTERNAL, "deactivation timed out after 30s"):
        upsert(clients[2], points(rows(1), 5000))
    assert cluster.peers[0].states(NAME) != alone.states(NAME)
    alone.join()
    cluster.wait_whole()
    assert cluster.replicas_differ(NAME) == []


def test_a_node_that_is_behind_reads_what_it_holds(
    cluster: QdrantCluster, clients: Clients
) -> None:
    fill(clients, replicas=3)
    with cluster.peers[2].lagging():
        cluster.peers[2].kill()
        upsert(clients[0], more())
        cluster.peers[2].start(behind=True)
        wait_for(lambda: _count(cluster.peers[2]) is not None)
        assert _count(cluster.peers[2]) == 60
    cluster.wait_whole()
    assert _count(cluster.peers[2]) == 90


def _count(peer: Peer) -> int | None:
    channel, _, found, _ = stubs(peer.port)
    with channel:
        try:
            return int(found.Count(pb.CountPoints(collection_name=NAME)).result.count)
        except grpc.RpcError:
            return None


def test_all_nodes_lost_and_back(cluster: QdrantCluster, clients: Clients) -> None:
    fill(clients)
    for peer in cluster.peers:
        peer.kill()
    for peer in cluster.peers:
        peer.start()
    cluster.wait_whole()
    assert _count(cluster.peers[0]) == len(KEYS)
    assert not cluster.replicas_differ(NAME)

"""The stand-in in a process of its own."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from standin_uses import NAME, connect, create, ids, points, refused, rows, upsert

from tests.qdrant_standin import ClusterProcess, StandInProcess


def test_what_was_acknowledged_survives_a_kill(directory: Path) -> None:
    with StandInProcess(directory / "kill", version="1.19.3") as server:
        with connect(server.port) as client:
            create(client)
            client.upsert(NAME, points(rows(50)), wait=False)
            client.delete(NAME, list(range(40)))
            assert client.info().version == "1.19.3"
        server.kill()
        server.restart()
        with connect(server.port) as client:
            assert ids(client.scroll(NAME, limit=99)[0]) == list(range(40, 50))
        assert server.stop() == 0
        assert "Traceback" not in server.stderr


def test_faults_of_a_process(directory: Path) -> None:
    with StandInProcess(directory / "faults") as server, connect(server.port) as client:
        create(client)
        server.faults.fail(grpc.StatusCode.UNAVAILABLE, "injected", "Count", calls=1)
        with refused(grpc.StatusCode.UNAVAILABLE, "injected"):
            client.count(NAME)
        server.faults.delay(0.01, "Count")
        server.faults.version("1.0.0")
        server.faults.black_hole("Upsert")
        server.faults.lift()
        upsert(client, points(rows(1)))
        assert client.count(NAME).count == 1
        assert client.info().version == "1.0.0"
        with pytest.raises(AssertionError, match="KeyError"):
            server.faults.send("fail", code="NOPE")


def test_a_cluster_in_a_process(directory: Path) -> None:
    with ClusterProcess(directory / "cluster") as cluster:
        with connect(cluster.peers[0].port) as client:
            create(client, replication_factor=2)
            cluster.peers[2].kill()
            upsert(client, points(rows(60)))
            assert client.count(NAME).count == 60
            cluster.peers[0].faults.fail(grpc.StatusCode.UNAVAILABLE, "injected", "Count")
            with refused(grpc.StatusCode.UNAVAILABLE, "injected"):
                client.count(NAME)
        cluster.peers[2].start()
        cluster.wait_whole()
        assert cluster.collections() == [NAME]
        assert cluster.replicas_differ(NAME) == []
        with connect(cluster.peers[1].port) as client:
            assert client.count(NAME).count == 60
        assert cluster.stop() == 0
        assert "Traceback" not in cluster.stderr

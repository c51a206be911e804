"""A node is lost while services write: then all replicas are equal, though nobody writes again. On stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from grpc import StatusCode
from knnmoe.client import AdminClient, ServiceUnavailable
from knnmoe.v1 import memory_admin_pb2 as admin_pb

from router_service.backends.qdrant_server import failures
from router_service.backends.qdrant_server.backend import ServerBackend
from router_service.backends.qdrant_server.collection import ServerCollection
from router_service.backends.qdrant_server.connection import Connection
from router_service.backends.qdrant_server.failures import Meaning
from router_service.backends.qdrant_server.options import ServerOptions
from router_service.backends.qdrant_server.records import Records
from router_service.errors import BackendUnavailable
from tests.congruence.fast_dir import fast_dir
from tests.integration.admin_runs import admin_of
from tests.integration.server_snapshots import until
from tests.qdrant_standin import QdrantCluster
from tests.sidecar import LOGIT_DELTA, Sidecar, random_entries, refusal
from tests.unit.router_service.backends.numbered_entries import SPEC, numbered_entries

__all__ = ["fast_dir"]
SHARDED = {"shard_number": 3, "replication_factor": 3, "write_consistency_factor": 3}
FLAGS = [
    *("--qdrant-shard-number", "3", "--qdrant-replication-factor", "3"),
    *("--qdrant-write-consistency-factor", "3"),
]


@pytest.fixture
def cluster(fast_dir: Path) -> Iterator[QdrantCluster]:
    with QdrantCluster(fast_dir / "qdrant") as running:
        yield running


class TestBackend:
    @pytest.fixture
    def collection(
        self, cluster: QdrantCluster, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[ServerCollection]:
        """Of 100 entries, through a backend that tries nothing twice."""
        monkeypatch.setitem(failures._PAUSES_S, Meaning.PASSING, ())
        backend = ServerBackend(Connection(ServerOptions(cluster.peers[0].url, **SHARDED)))
        made = backend.create("law/layer-000", SPEC)
        made.upsert(numbered_entries(0, 100))
        yield made
        backend.close()

    def test_an_upsert(self, cluster: QdrantCluster, collection: ServerCollection) -> None:
        cluster.peers[2].kill()
        with pytest.raises(BackendUnavailable):
            collection.upsert(numbered_entries(80, 140))
        assert collection.info().unfinished is not None
        cluster.peers[2].start()
        assert_equal(cluster, collection)
        assert collection.info().entries == 140

    def test_a_deletion(self, cluster: QdrantCluster, collection: ServerCollection) -> None:
        cluster.peers[2].kill()
        with pytest.raises(BackendUnavailable):
            collection.delete(np.arange(20, dtype=np.uint64))
        cluster.peers[2].start()
        assert_equal(cluster, collection)
        assert collection.info().entries == 80

    def test_a_node_that_hangs(
        self,
        cluster: QdrantCluster,
        collection: ServerCollection,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """What it was sent before may arrive after what came later."""
        monkeypatch.setattr("router_service.backends.qdrant_server.collection.WRITE_TIMEOUT_S", 1.0)
        monkeypatch.setattr("router_service.backends.qdrant_server.unfinished_writes._SEND_S", 1.0)
        entries = numbered_entries(80, 140)
        cluster.peers[1].hang()
        for factor in (2.0, 3.0):
            with pytest.raises(BackendUnavailable):
                collection.upsert(replace(entries, values=entries.values * np.float32(factor)))
        cluster.peers[1].resume()
        assert_equal(cluster, collection)
        stored = collection.scroll(79, 100)
        np.testing.assert_array_equal(stored.values, entries.values * np.float32(3.0))

    def test_a_deletion_of_what_is_half_there(
        self, cluster: QdrantCluster, collection: ServerCollection
    ) -> None:
        cluster.peers[2].kill()
        with pytest.raises(BackendUnavailable):
            collection.upsert(numbered_entries(100, 140))
        with pytest.raises(BackendUnavailable):
            collection.delete(np.arange(110, 150, dtype=np.uint64))
        cluster.peers[2].start()
        assert_equal(cluster, collection)
        assert collection.info().entries == 110


@pytest.mark.parametrize("asked", [0, 1])
def test_a_record(cluster: QdrantCluster, monkeypatch: pytest.MonkeyPatch, asked: int) -> None:
    """Mended by a node that took the change, or by one that did not: as that one has it, on all nodes."""
    monkeypatch.setitem(failures._PAUSES_S, Meaning.PASSING, ())
    writer, other = (Connection(ServerOptions(cluster.peers[n].url, **SHARDED)) for n in (0, asked))
    own = Records(writer, "knnmoe~memories")
    own.ensure()
    own.write("law", {"text": "old"})
    cluster.peers[1].kill()  # the last one orders writes
    with pytest.raises(BackendUnavailable):
        own.write("law", {"text": "new"})
    cluster.peers[1].start()
    cluster.wait_whole()
    assert cluster.replicas_differ(own.name)
    own.connection = other
    there = own.read("law")
    own.mend()
    assert cluster.replicas_differ(own.name) == []
    assert there is not None
    assert there["text"] == ("old" if asked else "new")
    assert own.read("law") == there
    for each in (writer, other):
        each.close()


def assert_equal(cluster: QdrantCluster, collection: ServerCollection) -> None:
    """After recovery, and what the service does by itself."""
    cluster.wait_whole()
    until(lambda: collection.info().unfinished is None)
    assert cluster.replicas_differ(collection.name) == []


class TestService:
    def test_a_kill_of_the_service_in_between(self, cluster: QdrantCluster, fast_dir: Path) -> None:
        url, data = cluster.peers[0].url, fast_dir / "data"
        with Sidecar(data, backend=url, flags=FLAGS) as service:
            service.create("law", kind=LOGIT_DELTA)
            service.upsert("law", 0, random_entries(LOGIT_DELTA, 50))
            digest = service.describe("law").model_digest
            cluster.peers[2].kill()
            entries = random_entries(LOGIT_DELTA, 80, seed=1)
            request = admin_pb.UpsertRequest(memory="law", entries=entries, model_digest=digest)
            error = refusal(service.admin.Upsert, iter([request]))
            assert error.code is StatusCode.UNAVAILABLE
            assert error.reason == "ERROR_REASON_BACKEND_UNAVAILABLE"
            assert error.retry_after_s
            assert "which passes when its nodes are whole" in error.message
            found = [each["what"] for each in admin_of(service.target)("doctor")["findings"]]
            assert any("80 entries (ids " in what and "not acknowledged" in what for what in found)
            service.kill()
        cluster.peers[2].start()
        cluster.wait_whole()
        [layer] = [name for name in cluster.collections() if "~layer-000~" in name]
        assert cluster.replicas_differ(layer)
        with Sidecar(data, backend=url, flags=FLAGS) as service:
            until(lambda: not cluster.replicas_differ(layer))
            assert service.admin.Count(admin_pb.CountRequest(memory="law", layer=0)).total == 80
            service.stop_cleanly()

    def test_a_client_waits_until_the_node_is_back(
        self, cluster: QdrantCluster, fast_dir: Path
    ) -> None:
        with (
            Sidecar(fast_dir / "data", backend=cluster.peers[0].url, flags=FLAGS) as service,
            AdminClient(service.target, timeout_s=60.0) as client,
        ):
            digest = service.create("law", kind=LOGIT_DELTA)
            service.upsert("law", 0, random_entries(LOGIT_DELTA, 10))
            cluster.peers[2].kill()
            request = admin_pb.UpsertRequest(
                memory="law", entries=random_entries(LOGIT_DELTA, 80), model_digest=digest
            )
            with AdminClient(service.target, timeout_s=6.0) as hasty:
                hasty.describe("law")
                with pytest.raises(ServiceUnavailable):
                    list(hasty.upsert([request]))
            client.describe("law")
            acknowledged = client.upsert([request])
            cluster.peers[2].start()
            assert [each.upserted for each in acknowledged] == [80]
            service.stop_cleanly()

    def test_settings(self, cluster: QdrantCluster, fast_dir: Path) -> None:
        """Whether they are the old or the new ones: every node says the same."""
        flags = [*FLAGS, "--flush-interval-s", "0.1"]
        with Sidecar(fast_dir / "data", backend=cluster.peers[0].url, flags=flags) as service:
            service.create("law", kind=LOGIT_DELTA, gamma=[0.5])
            cluster.peers[1].kill()  # the last one orders strong writes
            request = admin_pb.UpdateSettingsRequest(memory="law")
            request.settings.gamma.append(0.25)
            error = refusal(service.admin.UpdateSettings, request)
            assert error.code is StatusCode.UNAVAILABLE
            assert cluster.replicas_differ("knnmoe~memories")
            cluster.peers[1].start()
            cluster.wait_whole()
            until(lambda: not cluster.replicas_differ("knnmoe~memories"))
            service.stop_cleanly()

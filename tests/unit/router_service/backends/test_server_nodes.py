"""Several nodes: who is asked, who is set aside, and that nobody waits for a lost one. On the stand-in only."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from router_service.arrays import Neighbours
from router_service.backends.qdrant_server import calls, nodes
from router_service.backends.qdrant_server.backend import ServerBackend
from router_service.backends.qdrant_server.collection import ServerCollection
from router_service.backends.qdrant_server.connection import Connection
from router_service.backends.qdrant_server.node import Node
from router_service.backends.qdrant_server.options import ServerOptions, urls_of
from router_service.backends.qdrant_server.versions import SUPPORTED
from router_service.backends.qdrant_server.wire import q
from router_service.errors import BackendMisconfigured, BackendUnavailable, InvalidField
from tests.integration.server_snapshots import until
from tests.qdrant_standin import QdrantCluster, QdrantStandIn
from tests.qdrant_standin.tcp_faults import TcpFaults
from tests.unit.router_service.backends.numbered_entries import (
    OPTIONS,
    SPEC,
    assert_holds,
    numbered_entries,
)

ENTRIES = 300
# What is waited for without end fails by this.
PATIENCE_S = 60.0


@pytest.fixture
def cluster(fast_dir: Path) -> Iterator[QdrantCluster]:
    with QdrantCluster(fast_dir / "cluster") as running:
        yield running


def options_of(*urls: str, **others: Any) -> ServerOptions:
    return ServerOptions(url=",".join(urls), replication_factor=2, timeout_s=PATIENCE_S, **others)


@contextmanager
def connected(options: ServerOptions) -> Iterator[Connection]:
    connection = Connection(options)
    try:
        yield connection
    finally:
        connection.close()


@pytest.fixture
def backend(cluster: QdrantCluster) -> Iterator[ServerBackend]:
    with connected(options_of(*cluster.urls)) as connection:
        yield ServerBackend(connection)


@pytest.fixture
def collection(backend: ServerBackend) -> ServerCollection:
    made = backend.create("layer", SPEC)
    made.upsert(numbered_entries(0, ENTRIES))
    return made


def look_up(collection: ServerCollection, first: int = 0, count: int = 1) -> Neighbours:
    """Each key finds itself."""
    found = collection.search(numbered_entries(0, ENTRIES).keys[first : first + count], 1, OPTIONS)
    assert found.ids[:, 0].tolist() == list(range(first, first + count))
    return found


def used(backend: ServerBackend) -> list[str]:
    return [f"http://{node.target}" for node in backend.connection.nodes.in_use]


def lookups_of(cluster: QdrantCluster) -> list[int]:
    return [peer.faults.calls["QueryBatch"] for peer in cluster.peers]


def more_than(before: list[int], cluster: QdrantCluster) -> bool:
    """Whether every node has been asked since."""
    return all(now > then for now, then in zip(lookups_of(cluster), before, strict=True))


class TestUrls:
    @pytest.mark.parametrize(
        ("place", "urls"),
        [
            ("http://a", ["http://a"]),
            ("http://a:6334, http://b:6334", ["http://a:6334", "http://b:6334"]),
            ("http://a:6333,http://A/,http://a:6334,http://b", ["http://a:6333", "http://b"]),
        ],
    )
    def test_each_node_counts_once(self, place: str, urls: list[str]) -> None:
        assert urls_of(place) == urls

    @pytest.mark.parametrize(
        ("place", "said"),
        [
            ("http://a,https://b", "http:// or https:// for all nodes"),
            ("http://a,b:6334", "'b:6334'"),
            ("http://a,", "got ''"),
            ("http://a,http://b/path", "http://b/path"),
        ],
    )
    def test_what_is_refused(self, place: str, said: str) -> None:
        with pytest.raises(InvalidField, match=re.escape(said)):
            urls_of(place)

    def test_a_key_is_never_shown(self) -> None:
        with pytest.raises(InvalidField, match="never in the URL") as refused:
            urls_of("http://a,http://user:secret@b")
        assert "secret" not in str(refused.value)


class TestWork:
    def test_all_nodes_get_some(self, cluster: QdrantCluster, collection: ServerCollection) -> None:
        before = lookups_of(cluster)
        until(lambda: look_up(collection) and more_than(before, cluster))

    def test_parts_of_one_lookup_are_spread(
        self, cluster: QdrantCluster, collection: ServerCollection
    ) -> None:
        before = lookups_of(cluster)
        look_up(collection, count=200)  # in four parts
        asked = sum(now > then for now, then in zip(lookups_of(cluster), before, strict=True))
        assert asked > 1  # one may be late just then, and set aside

    @pytest.mark.parametrize("lost", [0, 1, 2])
    @pytest.mark.parametrize(("loss", "end"), [("kill", "start"), ("hang", "resume")])
    def test_lookups_and_writes_go_on_without_a_node_and_it_works_again_when_it_is_back(
        self,
        cluster: QdrantCluster,
        backend: ServerBackend,
        collection: ServerCollection,
        lost: int,
        loss: str,
        end: str,
    ) -> None:
        peer = cluster.peers[lost]
        getattr(peer, loss)()
        for first in range(0, 250, 50):
            look_up(collection, first)
            look_up(collection, count=150)
        until(lambda: peer.url not in used(backend))
        collection.upsert(numbered_entries(0, ENTRIES + 20))
        look_up(collection)
        assert any(f"{peer.port}: it" in each for each in backend.connection.nodes.away())
        getattr(peer, end)()
        until(lambda: peer.url in used(backend))
        cluster.wait_whole()
        assert_holds(collection, ENTRIES + 20)
        before = peer.faults.calls["QueryBatch"]
        for _ in range(3):
            look_up(collection)
        assert peer.faults.calls["QueryBatch"] > before

    def test_a_write_on_its_way_to_a_node_that_falls_silent_is_made_elsewhere(
        self, cluster: QdrantCluster, collection: ServerCollection
    ) -> None:
        peer = cluster.peers[0]
        fault, before = peer.faults.black_hole("Upsert"), peer.faults.calls["Upsert"]
        with ThreadPoolExecutor(9) as threads:
            writes = [
                threads.submit(collection.upsert, numbered_entries(0, ENTRIES + 10))
                for _ in range(9)
            ]
            until(lambda: peer.faults.calls["Upsert"] > before)
            peer.hang()
            for write in writes:
                write.result(PATIENCE_S)
        look_up(collection)
        fault.lift()
        peer.resume()

    def test_a_node_that_the_others_do_not_reach_is_not_read_from(
        self, cluster: QdrantCluster, backend: ServerBackend, collection: ServerCollection
    ) -> None:
        """Clients reach it, and it would answer from replicas that missed the write."""
        peer = cluster.peers[1]
        peer.cut_off()
        collection.upsert(numbered_entries(0, ENTRIES + 20))
        assert peer.url not in used(backend)
        assert_holds(collection, ENTRIES + 20)
        peer.join()
        until(lambda: peer.url in used(backend))

    def test_nodes_are_compared_side_by_side(
        self,
        backend: ServerBackend,
        collection: ServerCollection,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A write that met trouble is acknowledged after that: a node that is late does not add to another."""
        events, here = list[str](), threading.get_ident()
        begin, end = Node.begin_replicas, Node.replicas_from

        def begun(node: Node, name: str) -> Any:
            if threading.get_ident() == here:
                events.append("asked")
            return begin(node, name)

        def ended(node: Node, call: Any) -> Any:
            if threading.get_ident() == here:
                events.append("waited for")
            return end(node, call)

        monkeypatch.setattr(Node, "begin_replicas", begun)
        monkeypatch.setattr(Node, "replicas_from", ended)
        several = len(backend.connection.nodes.in_use)
        backend.connection.nodes.compare(collection.name)
        assert events == ["asked"] * several + ["waited for"] * several

    def test_a_name_is_not_followed_after_the_end(
        self, cluster: QdrantCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with connected(options_of(*cluster.urls)) as connection:
            known = connection.nodes
        node = known.all[0]
        node.named, pool = "qdrant.example", node.pool
        monkeypatch.setattr(nodes, "addresses_of", lambda _: ["192.0.2.1"])
        known._follow_name(node)
        assert node.pool is pool

    def test_a_failure_of_one_node_is_not_noticed(
        self, cluster: QdrantCluster, backend: ServerBackend, collection: ServerCollection
    ) -> None:
        peer = cluster.peers[1]
        text = "Service internal error: Tonic status error: status: Unavailable"
        peer.faults.fail(grpc.StatusCode.INTERNAL, text, "QueryBatch")
        for first in range(30):
            look_up(collection, first)
        peer.faults.fail(grpc.StatusCode.INTERNAL, text, "Upsert")
        collection.upsert(numbered_entries(0, ENTRIES))

    def test_what_must_not_be_done_twice_is_asked_once(
        self, cluster: QdrantCluster, backend: ServerBackend
    ) -> None:
        for peer in cluster.peers:
            peer.faults.black_hole("Create")
        params = q.VectorsConfig(params=q.VectorParams(size=4, distance=q.Distance.Euclid))
        request = q.CreateCollection(collection_name="other", vectors_config=params)
        with pytest.raises(BackendUnavailable, match=r"did not answer within 0\.3 s"):
            backend.connection.call("collections", "Create", request, 0.3, repeat=False)
        assert sum(peer.faults.calls["Create"] for peer in cluster.peers) == 1

    def test_nobody_is_there(
        self, cluster: QdrantCluster, backend: ServerBackend, collection: ServerCollection
    ) -> None:
        for peer in cluster.peers:
            peer.kill()
        with pytest.raises(BackendUnavailable) as refused:
            look_up(collection)
        assert all(url in str(refused.value) for url in cluster.urls)
        for peer in cluster.peers:
            peer.start()
        until(lambda: len(used(backend)) == 3)
        look_up(collection)


class TestSecondCalls:
    def test_a_late_lookup_is_made_a_second_time_elsewhere(
        self, cluster: QdrantCluster, backend: ServerBackend, collection: ServerCollection
    ) -> None:
        fault = cluster.peers[2].faults.black_hole("QueryBatch")
        for first in range(12):
            look_up(collection, first)
        assert backend.connection.lateness.second_calls >= 1
        # Other calls to it are answered, so it is used again; and late again.
        until(lambda: len(used(backend)) == 3)
        fault.lift()

    def test_they_are_few(self) -> None:
        lateness = calls.Lateness()
        made = 0
        for _ in range(1000):
            lateness.late_s(("QueryBatch", 8))
            made += lateness.allows_second()
        assert made <= 0.1 * 1000 + 16

    def test_a_kind_is_late_after_what_most_of_it_took(self) -> None:
        lateness = calls.Lateness()
        quick, slow = ("QueryBatch", 8), ("QueryBatch", 16)
        for n in range(128):
            lateness.took(quick, 0.002 if n % 10 else 0.2)
            lateness.took(slow, 0.5)
        assert lateness.late_s(quick) == 0.2
        for _ in range(128):
            lateness.took(quick, 0.002)
        assert lateness.late_s(quick) == 0.002
        assert lateness.late_s(slow) == 0.5
        assert lateness.late_s(("Get", 8)) == 0.1


class TestStarting:
    @pytest.mark.parametrize("loss", ["kill", "hang"])
    def test_one_node_suffices(
        self, cluster: QdrantCluster, collection: ServerCollection, loss: str
    ) -> None:
        for peer in cluster.peers[:1]:
            getattr(peer, loss)()
        with connected(options_of(*cluster.urls)) as connection:
            backend = ServerBackend(connection)
            assert used(backend) == cluster.urls[1:]
            look_up(backend.open("layer", SPEC))
            (cluster.peers[0].start if loss == "kill" else cluster.peers[0].resume)()
            until(lambda: len(used(backend)) == 3)

    def test_no_node(self) -> None:
        with pytest.raises(BackendUnavailable) as refused:
            Connection(options_of("http://127.0.0.1:9", "http://127.0.0.1:11"))
        assert "http://127.0.0.1:9,http://127.0.0.1:11" in str(refused.value)
        assert "127.0.0.1:9: Connection refused" in str(refused.value)

    def test_a_wrong_key(self, fast_dir: Path) -> None:
        with QdrantCluster(fast_dir / "c", api_key="right") as cluster:
            for key in (None, "wrong"):
                with pytest.raises(BackendMisconfigured, match="ROUTER_SERVICE_QDRANT_API_KEY"):
                    Connection(options_of(*cluster.urls, api_key=key))
            with connected(options_of(*cluster.urls, api_key="right")) as connection:
                assert len(connection.nodes.in_use) == 3

    def test_addresses_of_one_name(
        self, cluster: QdrantCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a resolver says is made up: no name of this machine has two addresses for sure."""
        port, own = cluster.peers[0].port, socket.getaddrinfo
        with TcpFaults(port, host="127.0.0.2", port=port):
            found = [own(each, None, type=socket.SOCK_STREAM)[0] for each in ADDRESSES]
            monkeypatch.setattr(
                socket,
                "getaddrinfo",
                lambda host, *rest, **more: found if host == "qdrant" else own(host, *rest, **more),
            )
            with connected(options_of(f"http://qdrant:{port}")) as connection:
                assert [node.target for node in connection.nodes.in_use] == [
                    f"{each}:{port}" for each in ADDRESSES
                ]


ADDRESSES = ["127.0.0.1", "127.0.0.2"]


class TestClusters:
    @pytest.mark.parametrize("made", [(0, 1), (0,), ()])
    def test_nodes_of_two_are_refused(
        self, fast_dir: Path, monkeypatch: pytest.MonkeyPatch, made: tuple[int, ...]
    ) -> None:
        """Whether both have been used, or one of them, or none."""
        monkeypatch.setattr(nodes, "_CONSENSUS_S", 0.2)
        with ExitStack() as stack:
            servers = [
                stack.enter_context(QdrantStandIn(fast_dir / str(number))) for number in (0, 1)
            ]
            for number in made:
                with connected(options_of(servers[number].url)) as connection:
                    make_records(connection)
            with (
                pytest.raises(BackendMisconfigured) as refused,
                connected(options_of(*(server.url for server in servers))) as connection,
            ):
                make_records(connection)
            for server in servers:
                assert f"127.0.0.1:{server.port}" in str(refused.value)
            assert "--remove-orphans" in str(refused.value)
            assert "--backend" in str(refused.value)

    def test_two_names_of_one_node_are_not(self, cluster: QdrantCluster) -> None:
        port = cluster.peers[0].port
        with connected(
            options_of(f"http://127.0.0.1:{port}", f"http://localhost:{port}")
        ) as connection:
            make_records(connection)
            assert len(connection.nodes.in_use) == 2

    def test_a_node_that_has_not_heard_of_it_yet_is_waited_for(
        self, cluster: QdrantCluster
    ) -> None:
        peer = cluster.peers[2]
        with ThreadPoolExecutor(1) as threads:
            with peer.lagging(), connected(options_of(cluster.urls[0])) as connection:
                request = q.CreateCollection(collection_name="knnmoe~memories", timeout=1)
                request.vectors_config.params.CopyFrom(
                    q.VectorParams(size=1, distance=q.Distance.Euclid)
                )
                connection.call("collections", "Create", request, PATIENCE_S)
                asked = peer.faults.calls["CollectionClusterInfo"]
                starting = threads.submit(Connection, options_of(*cluster.urls))
                until(lambda: peer.faults.calls["CollectionClusterInfo"] > asked + 1)
                assert not starting.done()
            made = starting.result(PATIENCE_S)
        assert len(made.nodes.in_use) == 3
        made.close()

    def test_a_node_that_does_not_hear_of_a_collection_any_more_is_set_aside(
        self,
        cluster: QdrantCluster,
        backend: ServerBackend,
        collection: ServerCollection,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """It is no node of another cluster: they have a collection in common."""
        monkeypatch.setattr(nodes, "_CONSENSUS_S", 0.2)
        peer = cluster.peers[2]
        with peer.lagging():
            backend.create("another", SPEC)
            assert peer.url not in used(backend)
        until(lambda: peer.url in used(backend))
        look_up(collection)

    def test_a_node_that_is_back_is_not_used_before_it_knows_what_the_others_know(
        self, cluster: QdrantCluster, backend: ServerBackend, collection: ServerCollection
    ) -> None:
        """It would answer from replicas that missed writes."""
        peer = cluster.peers[1]
        peer.hang()
        until(lambda: peer.url not in used(backend))
        collection.upsert(numbered_entries(0, ENTRIES + 20))
        with peer.lagging():
            peer.resume(behind=True)
            asked = peer.faults.calls["CollectionClusterInfo"]
            until(lambda: peer.faults.calls["CollectionClusterInfo"] > asked + 3)
            assert peer.url not in used(backend)
            assert any("takes its replica" in each for each in backend.connection.nodes.away())
        until(lambda: peer.url in used(backend))


def make_records(connection: Connection) -> None:
    if connection.exists("knnmoe~memories"):
        return
    params = q.VectorsConfig(params=q.VectorParams(size=1, distance=q.Distance.Euclid))
    request = q.CreateCollection(collection_name="knnmoe~memories", vectors_config=params)
    connection.call("collections", "Create", request, PATIENCE_S)
    connection.wait_for("knnmoe~memories")


class TestVersions:
    def test_mixed_ones_are_those_of_an_upgrade(
        self, cluster: QdrantCluster, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        cluster.peers[1].faults.version = "1.9.5"
        with pytest.raises(BackendMisconfigured, match=r"1\.9\.5") as refused:
            Connection(options_of(*cluster.urls))
        assert f"127.0.0.1:{cluster.peers[1].port}" in str(refused.value)
        cluster.peers[1].faults.version = "1.18.3"
        with connected(options_of(*cluster.urls)) as connection:
            assert connection.version == "1.18.3"
        assert [each for each in caplog.messages if "1.18.3, 1.20.0" in each]

    def test_a_newer_one_is_used_with_a_word(
        self, cluster: QdrantCluster, caplog: pytest.LogCaptureFixture
    ) -> None:
        cluster.peers[0].faults.version = "1.31.0"
        with connected(options_of(cluster.urls[0])):
            pass
        assert "newer than 1.20" in caplog.text

    def test_the_table_is_in_the_docs(self) -> None:
        page = Path(__file__).parents[4].joinpath("docs/qdrant-server.md").read_text()
        for version, change in SUPPORTED.items():
            assert f"| {version} | {change} |" in page


def test_what_has_one_copy_is_named(cluster: QdrantCluster) -> None:
    with connected(replace(options_of(*cluster.urls), replication_factor=None)) as connection:
        alone = ServerBackend(connection)
        alone.create("layer", SPEC)
        assert [name.split("~~")[0] for name in alone.uncopied()] == ["knnmoe~layer"]
    with connected(options_of(*cluster.urls, prefix="copied")) as connection:
        backend = ServerBackend(connection)
        backend.create("layer", SPEC)
        assert backend.uncopied() == []
    with connected(replace(options_of(cluster.urls[0]), replication_factor=None)) as connection:
        assert ServerBackend(connection).uncopied() == []  # nobody asked for several nodes

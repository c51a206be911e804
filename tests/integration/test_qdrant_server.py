"""A service in front of a Qdrant server: what a start tells, what several services share, what faults mean."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from knnmoe.client import AdminClient
from knnmoe.v1 import doctor_pb2 as doctor_pb
from knnmoe.v1 import doctor_pb2_grpc
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import retention_pb2 as retention_pb
from knnmoe.v1 import routing_pb2 as pb
from qdrant_client import grpc as q
from typer.testing import CliRunner

from router_service.cli.admin import app as admin
from router_service.cli.serve import app
from tests import qdrant_standin
from tests.integration.server_snapshots import answer_of, until
from tests.qdrant_standin import QdrantCluster, QdrantStandIn
from tests.qdrant_standin.process import StandInProcess
from tests.qdrant_standin.tcp_faults import TcpFaults
from tests.sidecar import (
    CALL_TIMEOUT_S,
    EXPERTS,
    LAYERS,
    LOGIT_DELTA,
    Sidecar,
    exported,
    probe,
    random_entries,
    random_keys,
    refusal,
    route_request,
    running_sidecar,
    serve_and_fail,
)

# Of localhost, signed by itself.
CERTIFICATE = Path(qdrant_standin.__file__).with_name("localhost.pem")
KEY = CERTIFICATE.with_suffix(".key")
ENTRIES = 64
OFTEN = ["--flush-interval-s", "0.1"]


@pytest.fixture
def server(data: Path) -> Iterator[QdrantStandIn]:
    with QdrantStandIn(data.parent / "qdrant") as running:
        yield running


@pytest.fixture
def service(server: QdrantStandIn, data: Path) -> Iterator[Sidecar]:
    """With a memory `law` of 64 entries per layer."""
    with running_sidecar(data, backend=server.url, flags=OFTEN) as running:
        fill(running)
        yield running


def fill(service: Sidecar, name: str = "law") -> None:
    service.create(name, kind=LOGIT_DELTA, gamma=[0.05])
    for layer in range(LAYERS):
        service.upsert(name, layer, random_entries(LOGIT_DELTA, ENTRIES, seed=layer))


def request_of(service: Sidecar, name: str = "law", tokens: int = 3) -> pb.RouteRequest:
    rng = np.random.default_rng(5)
    digest = service.describe(name).model_digest
    logits = random_keys(rng, tokens, EXPERTS)
    return route_request(name, digest, random_keys(rng, tokens), logits)


def names(service: Sidecar) -> list[str]:
    reply = service.admin.ListMemories(admin_pb.ListMemoriesRequest(), timeout=CALL_TIMEOUT_S)
    return [memory.name for memory in reply.memories]


def refused(*arguments: str, in_process: bool = True) -> str:
    """What a start with these flags says, in one line; in this process where it ends before anything serves."""
    flags = ("--listen", "127.0.0.1:0", *arguments)
    if in_process:
        result = CliRunner().invoke(app, ["serve", *flags])
        code, stderr = result.exit_code, result.stderr
    else:
        ended = serve_and_fail(*flags)
        code, stderr = ended.returncode, ended.stderr
    assert code in (1, 2), stderr
    lines = [line for line in stderr.splitlines() if line.startswith("router-service: ")]
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    return lines[0]


class TestStarting:
    def test_nobody_listens(self) -> None:
        message = refused("--backend", "http://127.0.0.1:9")
        assert "http://127.0.0.1:9 cannot be reached" in message
        assert "--backend" in message

    def test_another_kind_of_server(self, ram_sidecar: Sidecar) -> None:
        message = refused("--backend", f"http://{ram_sidecar.target}")
        assert "cannot be reached" in message
        assert "--backend" in message

    @pytest.mark.parametrize("key", [None, "wrong"])
    def test_a_wrong_key(
        self, data: Path, monkeypatch: pytest.MonkeyPatch, key: str | None
    ) -> None:
        with QdrantStandIn(data, api_key="right") as server:
            if key:
                monkeypatch.setenv("ROUTER_SERVICE_QDRANT_API_KEY", key)
            message = refused("--backend", server.url)
        assert "ROUTER_SERVICE_QDRANT_API_KEY" in message
        assert "right" not in message
        assert "wrong" not in message

    def test_nodes_of_several_kinds(self) -> None:
        message = refused("--backend", "http://a:6334,https://b:6334")
        assert "--backend" in message
        assert "http:// or https:// for all nodes" in message

    def test_a_node_of_another_cluster(self, data: Path) -> None:
        """Such as the container of an earlier set-up that still has the name."""
        servers = [QdrantStandIn(data.parent / name) for name in ("a", "b")]
        with servers[0], servers[1]:
            for server in servers:
                with running_sidecar(data, backend=server.url) as service:
                    fill(service)
            message = refused("--backend", ",".join(server.url for server in servers))
        assert all(f"127.0.0.1:{server.port}" in message for server in servers)
        assert "not of one Qdrant cluster" in message
        assert "--remove-orphans" in message

    @pytest.mark.parametrize("version", ["0.11.5", "1.7.4", "2.0.0", "nonsense"])
    def test_a_wrong_version(self, data: Path, version: str) -> None:
        with QdrantStandIn(data, version=version) as server:
            message = refused("--backend", server.url)
        assert version in message
        assert "1.13" in message
        assert "--backend" in message

    @pytest.mark.parametrize(
        ("changed", "place"),
        [
            ({"size": 8}, "collection"),
            ({"distance": q.Distance.Cosine}, "collection"),
            ({"size": 8}, "alias"),
        ],
    )
    def test_a_collection_of_another_program(
        self, server: QdrantStandIn, service: Sidecar, changed: dict[str, int], place: str
    ) -> None:
        service.stop_cleanly()
        vectors = {"size": 16, "distance": q.Distance.Euclid} | changed
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            collections = q.CollectionsStub(channel)
            [(made, alias)] = [
                (each.collection_name, each.alias_name)
                for each in collections.ListAliases(q.ListAliasesRequest()).aliases
                if each.alias_name.endswith("~law~layer-001")
            ]
            collections.Delete(q.DeleteCollection(collection_name=made))
            params = q.VectorsConfig(params=q.VectorParams(**vectors))
            name = made if place == "collection" else alias
            collections.Create(q.CreateCollection(collection_name=name, vectors_config=params))
        message = refused("--backend", server.url, in_process=False)
        assert repr(name) in message
        assert "--qdrant-prefix" in message
        assert "expected 16" in message

    def test_over_tls(self, data: Path) -> None:
        pair = (KEY.read_bytes(), CERTIFICATE.read_bytes())
        with QdrantStandIn(data.parent / "qdrant", certificate=pair) as server:
            flags = ["--qdrant-ca-file", str(CERTIFICATE)]
            with running_sidecar(data, backend=server.url, flags=flags) as service:
                fill(service)
                assert len(exported(service, "law", 0)[0].provenance) == ENTRIES
            assert "cannot be reached" in refused("--backend", server.url)  # nobody trusts it
            plain = server.url.replace("https", "http")
            assert "cannot be reached" in refused("--backend", plain)

    def test_the_key_from_a_file_and_the_rest_port(self, data: Path, tmp_path: Path) -> None:
        (tmp_path / "key").write_text("right\n")
        with QdrantStandIn(data.parent / "qdrant", api_key="right") as server:
            url = f"http://localhost:{server.port - 1}"
            flags = ["--qdrant-api-key-file", str(tmp_path / "key")]
            with running_sidecar(data, backend=url, flags=flags) as service:
                fill(service)
                assert len(exported(service, "law", 0)[0].provenance) == ENTRIES


class TestSharing:
    def test_a_restart_finds_everything(
        self, server: QdrantStandIn, service: Sidecar, data: Path
    ) -> None:
        request = request_of(service)
        before = answer_of(service, request)
        service.stop_cleanly()
        with running_sidecar(data, backend=server.url) as again:
            assert answer_of(again, request) == before

    def test_a_memory_made_elsewhere_is_there_at_once_and_goes_soon(
        self, server: QdrantStandIn, service: Sidecar, data: Path
    ) -> None:
        with running_sidecar(data.parent / "b", backend=server.url, flags=OFTEN) as other:
            request = request_of(service)
            assert answer_of(other, request) == answer_of(service, request)
            fill(service, "tax")
            assert answer_of(other, request_of(service, "tax")) == answer_of(
                service, request_of(service, "tax")
            )
            service.admin.DeleteMemory(admin_pb.DeleteMemoryRequest(memory="law"))
            until(lambda: names(other) == ["tax"])

    def test_writes_are_seen_at_once_and_settings_soon(
        self, server: QdrantStandIn, service: Sidecar, data: Path
    ) -> None:
        request = request_of(service)
        with running_sidecar(data.parent / "b", backend=server.url, flags=OFTEN) as other:
            before = answer_of(other, request)
            service.upsert("law", 0, random_entries(LOGIT_DELTA, ENTRIES, seed=9))
            assert answer_of(other, request) == answer_of(service, request) != before
            settings = admin_pb.UpdateSettingsRequest(memory="law")
            settings.settings.gamma.append(0.5)
            service.admin.UpdateSettings(settings, timeout=CALL_TIMEOUT_S)
            until(lambda: answer_of(other, request) == answer_of(service, request))

    def test_prefixes_keep_services_apart(
        self, server: QdrantStandIn, service: Sidecar, data: Path
    ) -> None:
        flags = ["--qdrant-prefix", "knnmoe-2"]
        with running_sidecar(data.parent / "b", backend=server.url, flags=flags) as other:
            assert names(other) == []
            fill(other)
            other.admin.DeleteMemory(admin_pb.DeleteMemoryRequest(memory="law"))
        assert names(service) == ["law"]
        assert len(exported(service, "law", 2)[0].provenance) == ENTRIES

    def test_what_a_killed_first_write_left_is_gone_on_with(
        self, server: QdrantStandIn, data: Path
    ) -> None:
        with Sidecar(data, backend=server.url) as service:
            fill(service)
            service.create("tax")
            indexes = server.faults.calls["CreateFieldIndex"]
            fault = server.faults.black_hole("CreateFieldIndex")
            with ThreadPoolExecutor(1) as pool:
                entries = random_entries(LOGIT_DELTA, 5)
                call = pool.submit(service.upsert, "tax", 1, entries)
                until(lambda: server.faults.calls["CreateFieldIndex"] > indexes)
                service.kill()
                assert call.exception() is not None
        fault.lift()
        assert any("~tax~" in name for name in collections_of(server))
        with running_sidecar(data, backend=server.url) as again:
            assert [layer.entries for layer in again.describe("tax").layers] == [0, 0, 0]
            again.upsert("tax", 1, entries)
            assert [layer.entries for layer in again.describe("tax").layers] == [0, 5, 0]
            again.admin.DeleteMemory(admin_pb.DeleteMemoryRequest(memory="tax"))
        assert not any("~tax~" in name for name in collections_of(server))


def collections_of(server: QdrantStandIn) -> list[str]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        reply = q.CollectionsStub(channel).List(q.ListCollectionsRequest())
    return [each.name for each in reply.collections]


class TestFaults:
    def test_one_failure_is_not_noticed(self, server: QdrantStandIn, service: Sidecar) -> None:
        request = request_of(service)
        before = answer_of(service, request)
        for method in ("QueryBatch", "Upsert", "Scroll"):
            server.faults.fail(grpc.StatusCode.UNAVAILABLE, method=method, calls=2)
        assert answer_of(service, request) == before
        service.upsert("law", 0, random_entries(LOGIT_DELTA, 3, first_id=1000))
        assert len(exported(service, "law", 0)[0].provenance) == ENTRIES + 3

    def test_a_server_that_asks_to_wait_is_waited_for_while_there_is_time(
        self, server: QdrantStandIn, service: Sidecar
    ) -> None:
        request = request_of(service)
        server.faults.rate_limit(1, "Upsert", calls=1)
        service.upsert("law", 0, random_entries(LOGIT_DELTA, 3, first_id=1000))
        server.faults.rate_limit(30, "QueryBatch")
        error = refusal(service.routing.Route, request)
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.reason == "ERROR_REASON_OVERLOADED"
        assert server.url in error.message

    def test_what_passes_on_a_cluster_is_repeated_by_service_and_client(
        self, server: QdrantStandIn, service: Sidecar
    ) -> None:
        """The service's tries end before the failure does."""
        words = (
            "Service internal error: Failed to apply operation to at least one `Active` replica. "
            "Consistency of this update is not guaranteed. Please retry."
        )
        server.faults.fail(grpc.StatusCode.INTERNAL, words, "Delete", calls=6)
        with AdminClient(service.target, timeout_s=CALL_TIMEOUT_S) as client:
            filter_ = retention_pb.EntryFilter(source="text-0")
            request = retention_pb.DeleteRequest(memory="law", layer=0, filter=filter_)
            error = refusal(client.retention.Delete, request)
            assert error.code is grpc.StatusCode.UNAVAILABLE
            assert error.reason == "ERROR_REASON_BACKEND_UNAVAILABLE"
            assert error.retry_after_s
            server.faults.fail(grpc.StatusCode.INTERNAL, words, "Delete", calls=6)
            client.unary(client.retention.Delete, request, repeat=True)
        assert len(exported(service, "law", 0)[0].provenance) == ENTRIES // 2

    def test_a_server_that_does_not_answer_is_not_waited_for(
        self, server: QdrantStandIn, service: Sidecar
    ) -> None:
        request = request_of(service)
        before = answer_of(service, request)
        fault = server.faults.black_hole("QueryBatch")
        with pytest.raises(grpc.RpcError) as late:
            service.routing.Route(request, timeout=0.1)
        assert late.value.code() in (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED,
        )
        error = refusal(service.routing.Route, request)
        assert error.reason == "ERROR_REASON_BACKEND_UNAVAILABLE"
        assert "--qdrant-timeout-s" in error.message
        fault.lift()
        assert answer_of(service, request) == before

    def test_a_key_that_is_changed_meanwhile(self, data: Path) -> None:
        with (
            QdrantStandIn(data.parent / "q") as server,
            running_sidecar(data, backend=server.url) as service,
        ):
            fill(service)
            request = request_of(service)
            server.faults.fail(grpc.StatusCode.UNAUTHENTICATED, "Invalid API key or JWT")
            error = refusal(service.routing.Route, request)
            server.faults.lift()
        assert error.reason == "ERROR_REASON_BACKEND_MISCONFIGURED"
        assert "ROUTER_SERVICE_QDRANT_API_KEY" in error.message

    def test_a_connection_that_is_reset_is_made_again(self, data: Path) -> None:
        with (
            QdrantStandIn(data.parent / "q") as server,
            TcpFaults(server.port) as proxy,
            running_sidecar(data, backend=proxy.url) as service,
        ):
            fill(service)
            request = request_of(service)
            before = answer_of(service, request)
            proxy.reset()
            assert answer_of(service, request) == before

    def test_a_server_that_is_killed_and_comes_back(self, data: Path) -> None:
        """What was acknowledged is there; the service says that it is not ready, and then that it is."""
        with (
            StandInProcess(data.parent / "q") as server,
            running_sidecar(data, backend=server.url, flags=OFTEN) as service,
        ):
            fill(service)
            request = request_of(service)
            before = answer_of(service, request)
            server.kill()
            error = refusal(service.routing.Route, request)
            assert error.code is grpc.StatusCode.UNAVAILABLE
            assert error.reason == "ERROR_REASON_BACKEND_UNAVAILABLE"
            until(lambda: not ready(service))
            found = probe(service.target)
            assert (found.returncode, found.stdout) == (1, f"{service.target}: NOT_SERVING\n")
            server.restart()
            until(lambda: ready(service))
            assert probe(service.target).returncode == 0
            assert answer_of(service, request) == before


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_service_does_not_notice_that_a_node_is_lost(data: Path, lost: int) -> None:
    flags = [*OFTEN, "--qdrant-replication-factor", "2"]
    with (
        QdrantCluster(data.parent / "cluster") as cluster,
        running_sidecar(data, backend=",".join(cluster.urls), flags=flags) as service,
    ):
        fill(service)
        request = request_of(service)
        before, peer = answer_of(service, request), cluster.peers[lost]
        for lose, find in ((peer.kill, peer.start), (peer.hang, peer.resume)):
            lose()
            for _ in range(9):
                assert answer_of(service, request) == before
            until(lambda: any(f"127.0.0.1:{peer.port}" in each for each in nodes_away(service)))
            assert ready(service)
            service.upsert("law", 0, random_entries(LOGIT_DELTA, 3, first_id=1000))
            assert len(exported(service, "law", 0)[0].provenance) == ENTRIES + 3
            find()
            until(lambda: not nodes_away(service))
            cluster.wait_whole()
            before = answer_of(service, request)
        for each in cluster.peers:
            each.kill()
        until(lambda: not ready(service))


def nodes_away(service: Sidecar) -> list[str]:
    doctor = doctor_pb2_grpc.DoctorServiceStub(service.channel)
    reply = doctor.Diagnose(doctor_pb.DiagnoseRequest(), timeout=CALL_TIMEOUT_S)
    return [finding.what for finding in reply.findings if finding.check == "nodes"]


def ready(service: Sidecar) -> bool:
    stub = health_pb2_grpc.HealthStub(service.channel)
    request = health_pb2.HealthCheckRequest(service="knnmoe.v1.RoutingService")
    reply = stub.Check(request, timeout=CALL_TIMEOUT_S)
    assert stub.Check(health_pb2.HealthCheckRequest()).status == reply.SERVING
    return bool(reply.status == reply.SERVING)


def test_how_much_disk_a_server_uses_is_not_known(service: Sidecar) -> None:
    """And so it is not 0."""
    shown = CliRunner().invoke(admin, ["--target", service.target, "stats", "law"])
    assert shown.exit_code == 0, shown.output
    assert "disk" in shown.output.split()
    assert shown.output.split().count("unknown") == LAYERS
    found = CliRunner().invoke(admin, ["--target", service.target, "--json", "stats", "law"])
    layers = json.loads(found.stdout)["memories"][0]["layers"]
    assert [layer["disk_bytes"] for layer in layers] == [None] * LAYERS
    assert {"disk_bytes_unknown"} & set(layers[0]) == set()

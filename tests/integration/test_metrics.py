"""`serve --metrics`: what Prometheus reads, what probes are answered, and lines of the log that say whose they are."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
from knnmoe import tensors
from knnmoe.client import AdminClient, ReplicationClient
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import routing_pb2 as routing_pb

from router_service import __version__
from router_service.rpc.server import RoutingServer
from router_service.settings import ServiceSettings
from tests.scraping import FLAGS, Scraped, get, url_of
from tests.sidecar import (
    CALL_TIMEOUT_S,
    EXPERTS,
    LAYERS,
    LOGIT_DELTA,
    Sidecar,
    exported,
    make_fingerprint,
    random_entries,
    random_keys,
    refusal,
    route_request,
    serve_and_fail,
)

FAR = 100.0
OFF = 2  # the layer that the settings leave out


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sidecar, str]]:
    data = tmp_path_factory.mktemp("metrics") / "data"
    with Sidecar(data, flags=FLAGS) as sidecar:
        yield sidecar, url_of(sidecar)
        sidecar.stop_cleanly()


def look_up(sidecar: Sidecar, name: str) -> list[routing_pb.RouteResponse]:
    """A token on a stored key, one near it and one far from all, in each layer: one of them empty, one off."""
    key = tensors.to_array(exported(sidecar, name, 0)[0].keys)[:1]
    inputs, digest = (
        np.concatenate([key, key + 0.1, key + FAR]),
        sidecar.describe(name).model_digest,
    )
    own = random_keys(np.random.default_rng(0), 3, EXPERTS)
    return [
        sidecar.route(route_request(name, digest, inputs, own, layer=layer))
        for layer in range(LAYERS)
    ]


def fill(sidecar: Sidecar, name: str) -> str:
    digest = sidecar.create(name, kind=LOGIT_DELTA, gamma=[1.0], layers=[0, 1])
    sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, 60))
    return digest


def test_metrics_are_what_the_lookups_did(service: tuple[Sidecar, str]) -> None:
    sidecar, url = service
    fill(sidecar, "bible")
    [near, *_] = look_up(sidecar, "bible")
    found = Scraped(url)
    for layer in range(LAYERS):
        of = {"memory": "bible", "layer": layer}
        assert found("lookups_total", **of, where="service") == 1
        assert found("lookup_tokens_total", **of, where="service") == 3
        assert found("entries", **of) == (60 if layer == 0 else 0)
    assert found("disk_bytes", memory="bible", layer=0) > 0
    reasons = {"too_far": 0, "empty": 1, "layer_off": OFF}
    abstained = {
        r: found("abstained_total", memory="bible", layer=n, reason=r) for r, n in reasons.items()
    }
    assert abstained == {"too_far": 1, "empty": 3, "layer_off": 3}
    lambdas = tensors.to_array(near.lambdas)
    for bound in (0.1, 0.5, 1.0):
        below = found("lambda_bucket", memory="bible", layer=0, le=f"{bound:g}")
        assert below == np.count_nonzero((lambdas > 0) & (lambdas <= bound))
    assert found("lambda_sum", memory="bible", layer=0) == pytest.approx(lambdas.sum())
    stages = ("decode", "search", "blend", "encode", "total")
    counts = {found("lookup_seconds_count", memory="bible", stage=stage) for stage in stages}
    assert counts == {LAYERS}
    parts = [found("lookup_seconds_sum", memory="bible", stage=stage) for stage in stages]
    assert parts[-1] == pytest.approx(sum(parts[:-1]))
    assert found("build_info", version=__version__) == found("ready") == 1
    assert found("disk_free_bytes") > found("disk_min_free_bytes") > 0


def test_refused_calls_are_counted_by_method_and_reason(service: tuple[Sidecar, str]) -> None:
    sidecar, url = service
    rng = np.random.default_rng(0)
    request = route_request("nobody", b"", random_keys(rng, 1), random_keys(rng, 1, EXPERTS))
    refusal(sidecar.routing.Route, request)
    refusal(sidecar.admin.DescribeMemory, admin_pb.DescribeMemoryRequest(memory="nobody"))
    found = Scraped(url)
    for method in ("Route", "DescribeMemory"):
        assert found("refused_total", method=method, reason="memory_not_found") == 1
    stats = sidecar.admin.Stats(admin_pb.StatsRequest(), timeout=CALL_TIMEOUT_S)
    assert dict(stats.refused_lookups) == {"memory_not_found": 1}


def test_operations_are_counted_by_how_they_ended(service: tuple[Sidecar, str]) -> None:
    sidecar, url = service
    fill(sidecar, "operated")
    with AdminClient(sidecar.target) as client:
        client.optimize("operated")
    found = Scraped(url)
    assert found("operations_total", kind="optimize", state="done") == 1
    assert found("operations_running", kind="optimize") == 0


def test_replicas_are_counted_with_how_far_the_last_is_behind(service: tuple[Sidecar, str]) -> None:
    sidecar, url = service
    fill(sidecar, "copied")
    assert Scraped(url)("replicas", memory="copied") == 0
    with ReplicationClient(sidecar.target, "copied", make_fingerprint()) as client:
        for message in client.replicate(heartbeat_ms=20):
            if message.HasField("synced"):
                found = Scraped(url)
                break
    assert found("replicas", memory="copied") == 1
    assert 0 <= found("replica_staleness_seconds", memory="copied") < CALL_TIMEOUT_S


def test_probes_say_whether_lookups_are_answered(tmp_path: Path) -> None:
    flags = (*FLAGS, "--drain-s", "60")
    with Sidecar(tmp_path / "data", flags=flags) as sidecar:
        url = url_of(sidecar)
        assert get(f"{url}/livez") == (200, "alive\n")
        assert get(f"{url}/readyz") == (200, "ready\n")
        status, said = get(f"{url}/else")
        assert (status, said) == (404, "expected /metrics, /livez, /readyz\n")
        sidecar.create("busy", kind=LOGIT_DELTA, gamma=[1.0])
        held = sidecar.admin.Upsert(_endless(sidecar, "busy"), timeout=CALL_TIMEOUT_S)
        next(held)
        sidecar.process.send_signal(signal.SIGTERM)
        while (found := get(f"{url}/readyz")) == (200, "ready\n"):
            pass
        assert found == (503, "the service is shutting down\n")
        assert get(f"{url}/livez")[0] == 200
        assert Scraped(url)("ready") == 0
        held.cancel()
        assert sidecar.process.wait(CALL_TIMEOUT_S) == 0


def test_a_service_is_not_ready_before_its_memories_are_open() -> None:
    server = RoutingServer(ServiceSettings(data=Path("none"), backend="exact"))
    page = server.pages()["/readyz"]()
    server.stop()
    assert (page.status, page.body) == (503, b"the memories are being opened\n")


def _endless(sidecar: Sidecar, name: str) -> Iterator[admin_pb.UpsertRequest]:
    request = admin_pb.UpsertRequest(
        memory=name,
        entries=random_entries(LOGIT_DELTA, 1),
        model_digest=sidecar.describe(name).model_digest,
    )
    while True:
        yield request


def test_an_engine_process_that_died_is_a_restart(tmp_path: Path) -> None:
    with Sidecar(tmp_path / "data", flags=(*FLAGS, "--isolate-above-mib", "0")) as sidecar:
        url = url_of(sidecar)
        digest = fill(sidecar, "bible")
        found = Scraped(url)
        assert (found("engine_processes"), found("engine_restarts_total")) == (1, 0)
        [engine] = children(sidecar.process.pid)
        os.kill(engine, signal.SIGKILL)
        rng = np.random.default_rng(0)
        request = route_request("bible", digest, random_keys(rng, 1), random_keys(rng, 1, EXPERTS))
        while Scraped(url)("engine_restarts_total") == 0:
            with suppress(grpc.RpcError):  # the engine process ended, and is started again
                sidecar.route(request)
        found = Scraped(url)
        assert (found("engine_processes"), found("engine_restarts_total")) == (1, 1)


def children(process: int) -> list[int]:
    """Of all its threads."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def test_an_address_that_others_reach_needs_insecure(tmp_path: Path) -> None:
    arguments = ("--data", str(tmp_path / "data"), "--metrics", "0.0.0.0:0")
    refused = serve_and_fail(*arguments)
    assert refused.returncode == 2
    assert "--metrics: got '0.0.0.0:0', expected a loopback address" in refused.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused = serve_and_fail(*arguments[:-1], address)
    assert refused.returncode == 1
    assert (
        f"cannot listen on {address} (Address already in use); choose another --metrics"
        in refused.stderr
    )


def test_lines_of_the_log_are_objects_that_name_their_request(tmp_path: Path) -> None:
    flags = ("--log-format", "json", "--log-level", "DEBUG")
    with Sidecar(tmp_path / "data", backend="exact", flags=flags) as sidecar:
        digest = fill(sidecar, "bible")
        rng = np.random.default_rng(0)
        request = route_request(
            "bible", digest, random_keys(rng, 2), random_keys(rng, 2, EXPERTS), layer=1
        )
        request.request_id = 41
        sidecar.route(request)
        request.request_id, request.layer = 42, 9
        refusal(sidecar.routing.Route, request)
        sidecar.stop_cleanly()
        lines = [json.loads(line) for line in sidecar.stderr.splitlines()]
    by_request = {line["request_id"]: line for line in lines if "request_id" in line}
    answered, refused = by_request[41], by_request[42]
    assert answered["message"].startswith("looked up 2 tokens in ")
    assert (answered["memory"], answered["layer"], answered["level"]) == ("bible", 1, "DEBUG")
    assert answered["method"] == "/knnmoe.v1.RoutingService/Route"
    assert "was refused: layer: got 9, expected" in refused["message"]
    [serving] = [line for line in lines if line["message"].startswith("serving on ")]
    assert serving["level"] == "INFO"
    assert "method" not in serving


def test_a_format_of_log_lines_that_is_none_is_refused(tmp_path: Path) -> None:
    refused = serve_and_fail("--data", str(tmp_path / "data"), "--log-format", "xml")
    assert refused.returncode == 2
    assert "--log-format: got 'xml', expected text or json" in refused.stderr

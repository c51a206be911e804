"""The process itself: addresses, flags, signals, health, overload."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from knnmoe.client import service_error
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from typer.testing import CliRunner

from router_service.cli.serve import app
from tests.sidecar import (
    CALL_TIMEOUT_S,
    EXIT_TIMEOUT_S,
    EXPERTS,
    LOGIT_DELTA,
    Sidecar,
    probe,
    random_entries,
    random_keys,
    route_request,
    running_sidecar,
    serve_and_fail,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
# Tries of something that another thread of the service does soon.
TRIES = 1200


def _health(sidecar: Sidecar, service: str = "") -> int:
    stub: Any = health_pb2_grpc.HealthStub(sidecar.channel)
    request = health_pb2.HealthCheckRequest(service=service)
    return stub.Check(request, timeout=CALL_TIMEOUT_S).status


def _serve(*arguments: str) -> Any:
    """`router-service serve` in this process: what is refused here is refused before anything starts."""
    return CliRunner().invoke(app, ["serve", *arguments])


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("", "HOST:PORT or unix:PATH"),
        ("50051", "HOST:PORT or unix:PATH"),
        (":50051", "HOST:PORT or unix:PATH"),
        ("127.0.0.1:", "HOST:PORT or unix:PATH"),
        ("127.0.0.1:port", "HOST:PORT or unix:PATH"),
        ("127.0.0.1:70000", "HOST:PORT or unix:PATH"),
        ("127.0.0.1:²", "HOST:PORT or unix:PATH"),
        ("unix:", "a path of 1 to 100 bytes"),
        ("unix:/" + "x" * 200, "a path of 1 to 100 bytes"),
        ("unix:/" + "é" * 60, "a path of 1 to 100 bytes"),
        ("unix:/no/such/directory/s", "a directory that exists"),
        ("0.0.0.0:0", "--insecure"),
        ("[::]:0", "--insecure"),
        ("192.0.2.1:50051", "--insecure"),
        ("example.org:50051", "--insecure"),
    ],
)
def test_an_address_that_cannot_be_used(data: Path, listen: str, expected: str) -> None:
    refused = _serve("--data", str(data), "--backend", "exact", "--listen", listen)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("router-service: --listen: got ")
    assert expected in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not data.exists()


def test_insecure_allows_every_interface(data: Path) -> None:
    with running_sidecar(
        data, backend="exact", listen="0.0.0.0:0", flags=["--insecure"]
    ) as sidecar:
        port = sidecar.target.rpartition(":")[2]
        sidecar.target = f"127.0.0.1:{port}"
        assert _health(sidecar) == SERVING


def test_the_probe_of_containers(ram_sidecar: Sidecar, edge_sidecar: Sidecar) -> None:
    for target in (ram_sidecar.target, edge_sidecar.target):
        found = probe(target, http_proxy="http://127.0.0.1:1")
        assert (found.returncode, found.stdout, found.stderr) == (0, f"{target}: SERVING\n", "")


def test_the_probe_where_nobody_answers(tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/s"
    found = probe(target)
    assert found.returncode == 1
    assert found.stdout.startswith(f"{target}: UNAVAILABLE: ")
    assert found.stdout.count("\n") == 1
    assert found.stderr == ""


def test_a_port_in_use(data: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused = serve_and_fail("--data", str(data), "--backend", "exact", "--listen", address)
    assert refused.returncode == 1
    assert f"router-service: cannot listen on {address} (in use" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_socket_is_not_taken_from_a_live_service_but_from_a_dead_one(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"
    with Sidecar(tmp_path / "a", backend="exact", listen=address) as first:
        refused = serve_and_fail(
            "--data", str(tmp_path / "b"), "--backend", "exact", "--listen", address
        )
        assert refused.returncode == 1
        assert f"cannot listen on {address}: another process does" in refused.stderr
        assert _health(first) == SERVING
        first.kill()
    assert (tmp_path / "s").exists()
    with running_sidecar(tmp_path / "b", backend="exact", listen=address) as second:
        assert _health(second) == SERVING


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ("--data", "required")),
        (["--max-in-flight", "0"], ("--max-in-flight", "greater than or equal to 1")),
        (["--drain-s", "-1"], ("--drain-s", "greater than or equal to 0")),
        (["--flush-interval-s", "0"], ("--flush-interval-s", "greater than 0")),
        (["--log-level", "LOUD"], ("--log-level", "'LOUD'", "DEBUG, INFO")),
        (["--backend", "faiss"], ("--backend", "faiss", "exact")),
    ],
)
def test_bad_flags(data: Path, flags: list[str], words: tuple[str, ...]) -> None:
    refused = _serve(*(["--data", str(data)] if flags else []), *flags)
    assert refused.exit_code == 2
    text = " ".join(refused.stderr.split())
    assert all(word in text for word in words), text
    assert "Traceback" not in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_service_cleanly(data: Path, number: signal.Signals) -> None:
    with Sidecar(data, backend="exact") as sidecar:
        assert sidecar.stop(number) == 0
        assert "Traceback" not in sidecar.stderr
        assert "stopped" in sidecar.stderr


def test_a_signal_ends_a_stream_that_idles(data: Path) -> None:
    with Sidecar(data, backend="exact", flags=["--drain-s", "0.1"]) as sidecar:
        asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # A deadline beyond the one for the exit: it must not be what ends the call.
        stream = sidecar.routing.RouteStream(iter(asked.get, None), timeout=2 * EXIT_TIMEOUT_S)
        assert sidecar.stop() == 0
        with pytest.raises(grpc.RpcError):
            next(stream)
        asked.put(None)
        assert "Traceback" not in sidecar.stderr, sidecar.stderr


def test_stdout_holds_nothing_but_the_address(data: Path) -> None:
    with Sidecar(data, backend="exact") as sidecar:
        assert sidecar.target.startswith("127.0.0.1:")
        assert sidecar.stop() == 0
        assert sidecar.process.stdout is not None
        assert sidecar.process.stdout.read() == b""


def test_settings_come_from_the_environment(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTER_SERVICE_LOG_LEVEL", "ERROR")
    with Sidecar(data, backend="exact") as sidecar:
        sidecar.stop()
        assert sidecar.stderr == ""


def test_version() -> None:
    command = [sys.executable, "-m", "router_service", "version"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "0.1.0"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A service that admits one call at a time, with one small memory."""
    data = tmp_path_factory.mktemp("narrow") / "data"
    with running_sidecar(data, backend="exact", flags=["--max-in-flight", "1"]) as sidecar:
        sidecar.create("m", model={"num_layers": 1})
        sidecar.upsert("m", 0, random_entries(LOGIT_DELTA, 10))
        yield sidecar


def _request(sidecar: Sidecar) -> Any:
    rng = np.random.default_rng(3)
    digest = sidecar.describe("m").model_digest
    return route_request("m", digest, random_keys(rng, 2), random_keys(rng, 2, EXPERTS))


def test_a_client_that_leaves_gives_its_place_back(narrow: Sidecar) -> None:
    request = _request(narrow)
    asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stream = narrow.routing.RouteStream(iter(asked.get, None), timeout=CALL_TIMEOUT_S)
    asked.put(request)
    next(stream)
    stream.cancel()
    asked.put(None)
    assert any(_is_answered(narrow, request) for _ in range(TRIES))


def _is_answered(sidecar: Sidecar, request: Any) -> bool:
    """Whether there was a place for the request; otherwise waits a little."""
    try:
        return sidecar.route(request).HasField("lambdas")
    except grpc.RpcError as error:
        if service_error(error).reason != "ERROR_REASON_OVERLOADED":
            raise
        time.sleep(0.05)
        return False


@pytest.mark.parametrize(
    "service", ["", "knnmoe.v1.RoutingService", "knnmoe.v1.MemoryAdminService"]
)
def test_health(narrow: Sidecar, service: str) -> None:
    assert _health(narrow, service) == SERVING


def test_stats_count_what_was_asked(narrow: Sidecar) -> None:
    def tokens() -> int:
        request = admin_pb.StatsRequest(memory="m")
        reply = narrow.admin.Stats(request, timeout=CALL_TIMEOUT_S)
        assert reply.resident_bytes > 10 * 2**20
        assert reply.service_version == "0.1.0"
        return reply.memories[0].layers[0].tokens

    before = tokens()
    narrow.route(_request(narrow))
    assert tokens() == before + 2


def test_health_of_every_service(ram_sidecar: Sidecar) -> None:
    listed = ram_sidecar.channel.unary_unary("/grpc.health.v1.Health/List")(b"", timeout=60)
    statuses = health_pb2.HealthListResponse.FromString(listed).statuses
    assert statuses["knnmoe.v1.RoutingService"].status == SERVING
    assert {_health(ram_sidecar, name) for name in statuses} == {SERVING}


ARENAS = """
import ctypes, sys, threading
from router_service.cli.serve_command import limit_arenas
if sys.argv[1] == "limited":
    limit_arenas()
all_there, kept = threading.Barrier(12), []
def work():
    all_there.wait()
    kept.append([bytes(50_000) for _ in range(20)])
    all_there.wait()
threads = [threading.Thread(target=work) for _ in range(12)]
for each in threads: each.start()
for each in threads: each.join()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="not glibc's malloc")
def test_memory_is_not_spread_over_arenas_of_all_threads(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "MALLOC_ARENA_MAX"}
    found = {}
    for how in ("limited", "as it is"):
        command = [sys.executable, "-c", ARENAS, how, str(tmp_path / how)]
        subprocess.run(command, check=True, env=environment)
        found[how] = (tmp_path / how).read_text().count("<heap nr=")
    assert found["limited"] <= 2 < found["as it is"]

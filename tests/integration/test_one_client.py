"""One client, or one engine process that does not answer, takes nothing from the others, the health included."""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from knnmoe import channels
from knnmoe.client import service_error
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import routing_pb2 as pb

from tests.integration.test_engine_processes import ISOLATE_ALL, are_gone, engine_processes
from tests.sidecar import (
    CALL_TIMEOUT_S,
    EXPERTS,
    LOGIT_DELTA,
    Sidecar,
    random_entries,
    random_keys,
    route_request,
    running_sidecar,
)

ONE_LAYER = {"num_layers": 1}
# With 4 permits there are 44 threads for lookups: 4 that work, 16 in line, 16 that wait for their clients, 8 to spare.
FEW, MANY_CALLS = ("--max-in-flight", "4"), 100
METHODS = (
    "/knnmoe.v1.RoutingService/Route",
    "/knnmoe.v1.RoutingService/RouteStream",
    "/knnmoe.v1.MemoryAdminService/ListMemories",
    "/knnmoe.v1.MemoryAdminService/Upsert",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
)


def make(sidecar: Sidecar, name: str, entries: int = 300) -> pb.RouteRequest:
    """A memory of one layer; returns a lookup in it."""
    digest = sidecar.create(name, kind=LOGIT_DELTA, model=ONE_LAYER)
    sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, entries))
    rng = np.random.default_rng(3)
    return route_request(name, digest, random_keys(rng, 2), random_keys(rng, 2, EXPERTS))


def health(sidecar: Sidecar) -> Any:
    return health_pb2_grpc.HealthStub(sidecar.channel)


def require_answers(sidecar: Sidecar, lookup: pb.RouteRequest) -> None:
    """The health, the data plane by both ways, and the admin plane."""
    found = health(sidecar).Check(health_pb2.HealthCheckRequest(), timeout=CALL_TIMEOUT_S)
    assert found.status == health_pb2.HealthCheckResponse.SERVING
    assert sidecar.route(lookup).HasField("lambdas")
    [streamed] = sidecar.routing.RouteStream(iter([lookup]), timeout=CALL_TIMEOUT_S)
    assert streamed.HasField("lambdas")
    request = admin_pb.ListMemoriesRequest()
    assert sidecar.admin.ListMemories(request, timeout=CALL_TIMEOUT_S).memories


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + CALL_TIMEOUT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sidecar, pb.RouteRequest]]:
    """A service with few threads, and a lookup."""
    data = tmp_path_factory.mktemp("narrow") / "data"
    with running_sidecar(data, backend="exact", flags=FEW) as sidecar:
        yield sidecar, make(sidecar, "m")


@contextmanager
def half_sent(target: str, method: str, calls: int) -> Iterator[list[Any]]:
    """Calls over one connection whose headers are sent, and nothing else."""
    never: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with channels.open_channel(target) as channel:
        begin = channel.stream_stream(method)
        begun = [begin(iter(never.get, None)) for _ in range(calls)]
        yield begun
        for call in begun:
            call.cancel()
            never.put(None)


@pytest.mark.parametrize("method", METHODS)
def test_calls_without_a_message(narrow: tuple[Sidecar, pb.RouteRequest], method: str) -> None:
    sidecar, lookup = narrow
    with half_sent(sidecar.target, method, MANY_CALLS) as calls:
        # Those that wait have made room for others: as many are there as will be.
        wait_for(lambda: calls[0].done() or "Health" in method)
        for _ in range(5):
            require_answers(sidecar, lookup)


def test_a_message_has_to_come_in_time(tmp_path: Path) -> None:
    flags = ("--message-timeout-s", "0.5")
    with running_sidecar(tmp_path / "data", backend="exact", flags=flags) as sidecar:
        lookup = make(sidecar, "m")
        asked: queue.SimpleQueue[pb.RouteRequest | None] = queue.SimpleQueue()
        stream = sidecar.routing.RouteStream(iter(asked.get, None))
        asked.put(lookup)
        next(stream)
        with half_sent(sidecar.target, METHODS[0], 1) as [call]:
            assert call.code() is grpc.StatusCode.CANCELLED  # waits for the end
        asked.put(lookup)
        assert next(stream).HasField("lambdas")  # only the first is waited for with a limit
        asked.put(None)
        assert list(stream) == []
    assert "message does not come" in sidecar.stderr


def test_open_streams_hold_no_permit(narrow: tuple[Sidecar, pb.RouteRequest]) -> None:
    sidecar, lookup = narrow
    asked: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(12)]
    streams = [sidecar.routing.RouteStream(iter(each.get, None)) for each in asked]
    for _ in range(2):
        for questions, stream in zip(asked, streams, strict=True):
            questions.put(lookup)
            assert next(stream).HasField("lambdas")
    require_answers(sidecar, lookup)
    for questions, stream in zip(asked, streams, strict=True):
        questions.put(None)
        assert list(stream) == []


def test_those_who_watch_the_health(narrow: tuple[Sidecar, pb.RouteRequest]) -> None:
    sidecar, lookup = narrow
    watch, request = health(sidecar).Watch, health_pb2.HealthCheckRequest()

    def sees_it() -> bool:
        try:
            seen = next(watch(request)).status
        except grpc.RpcError:
            return False
        return bool(seen == health_pb2.HealthCheckResponse.SERVING)

    for _ in range(3):  # 128 at a time; those who have left make room
        watchers = [watch(request) for _ in range(100)]
        wait_for(sees_it)
        require_answers(sidecar, lookup)
        for watcher in watchers:
            watcher.cancel()


def engine_of(sidecar: Sidecar, memory: str) -> int:
    """The engine process of a memory's only layer."""
    [found] = [
        process
        for process in engine_processes(sidecar)
        if f"/{memory}/" in Path(f"/proc/{process}/cmdline").read_text()
    ]
    return found


@contextmanager
def stopped(process: int) -> Iterator[None]:
    """Inside, an engine process does nothing; it is another one's child, so its state is read."""
    os.kill(process, signal.SIGSTOP)
    wait_for(lambda: Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    try:
        yield
    finally:
        if Path(f"/proc/{process}").exists():
            os.kill(process, signal.SIGCONT)


@pytest.fixture
def two(data: Path) -> Iterator[tuple[Sidecar, pb.RouteRequest, pb.RouteRequest]]:
    """Two memories with an engine process each."""
    with running_sidecar(data) as sidecar:
        stuck, fine = make(sidecar, "stuck"), make(sidecar, "fine")
    with running_sidecar(data, flags=(*ISOLATE_ALL, *FEW)) as sidecar:
        yield sidecar, stuck, fine


def failures(calls: list[Any]) -> set[tuple[grpc.StatusCode, str]]:
    """The statuses and reasons of those that fail, when all have ended."""
    errors = [call.exception() for call in calls]
    return {(error.code(), service_error(error).reason) for error in errors if error is not None}


def test_an_engine_process_that_does_not_answer(
    two: tuple[Sidecar, pb.RouteRequest, pb.RouteRequest],
) -> None:
    sidecar, stuck, fine = two
    process = engine_of(sidecar, "stuck")
    with stopped(process):
        calls = [sidecar.routing.Route.future(stuck, timeout=CALL_TIMEOUT_S) for _ in range(40)]
        wait_for(lambda: any(call.done() for call in calls))  # more than the memory may have
        require_answers(sidecar, fine)
        assert [layer.entries for layer in sidecar.describe("stuck").layers] == [300]
        found = failures(calls)  # whoever waits longest may be answered by the next process
    overloaded = (grpc.StatusCode.RESOURCE_EXHAUSTED, "ERROR_REASON_OVERLOADED")
    ended = (grpc.StatusCode.UNAVAILABLE, "ERROR_REASON_BACKEND_UNAVAILABLE")
    assert found == {overloaded, ended}
    wait_for(lambda: are_gone([process]))

    def answered() -> bool:
        call = sidecar.routing.Route.future(stuck, timeout=CALL_TIMEOUT_S)
        return call.exception() is None

    wait_for(answered)  # another process serves what was acknowledged
    assert [layer.entries for layer in sidecar.describe("stuck").layers] == [300]


def test_sigterm_with_an_engine_process_that_does_not_answer(data: Path) -> None:
    with running_sidecar(data) as sidecar:
        lookup = make(sidecar, "m")
    with Sidecar(data, flags=ISOLATE_ALL) as sidecar, stopped(engine_of(sidecar, "m")):
        call = sidecar.routing.Route.future(lookup)
        request = admin_pb.StatsRequest(memory="m")
        wait_for(lambda: sidecar.admin.Stats(request, timeout=CALL_TIMEOUT_S).in_flight > 1)
        assert sidecar.stop() == 0
        assert call.exception() is not None
        assert "Traceback" not in sidecar.stderr
    with running_sidecar(data) as sidecar:
        assert [layer.entries for layer in sidecar.describe("m").layers] == [300]


@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
def test_who_leaves_is_not_looked_up_for(
    two: tuple[Sidecar, pb.RouteRequest, pb.RouteRequest], streamed: bool
) -> None:
    sidecar, stuck, _ = two

    def in_flight() -> int:
        request = admin_pb.StatsRequest(memory="fine")
        return int(sidecar.admin.Stats(request, timeout=CALL_TIMEOUT_S).in_flight)

    def lookups() -> int:
        request = admin_pb.StatsRequest(memory="stuck")
        reply = sidecar.admin.Stats(request, timeout=CALL_TIMEOUT_S)
        return int(reply.memories[0].layers[0].route_requests)

    with stopped(engine_of(sidecar, "stuck")):
        if streamed:
            calls: list[Any] = [sidecar.routing.RouteStream(iter([stuck])) for _ in range(3)]
        else:
            calls = [sidecar.routing.Route.future(stuck) for _ in range(3)]
        wait_for(lambda: in_flight() == 4)  # with the one that asks
        for call in calls:
            call.cancel()
        wait_for(lambda: in_flight() == 1)
    assert lookups() == 0
    assert sidecar.route(stuck).HasField("lambdas")
    assert lookups() == 1


def test_an_engine_process_that_lost_its_service_says_nothing(data: Path) -> None:
    with running_sidecar(data) as sidecar:
        lookup = make(sidecar, "m")
    with Sidecar(data, flags=ISOLATE_ALL) as sidecar:
        process = engine_of(sidecar, "m")
        with stopped(process):
            call = sidecar.routing.Route.future(lookup)
            request = admin_pb.StatsRequest(memory="m")
            wait_for(lambda: sidecar.admin.Stats(request, timeout=CALL_TIMEOUT_S).in_flight > 1)
            sidecar.kill()
            assert call.exception() is not None
        wait_for(lambda: are_gone([process]))
        assert "Traceback" not in sidecar.stderr

"""What a client that routes without pause notices of maintenance: `python -m benchmarks.stall --json FILE`.

A memory of two layers with as many keys each. Layer 0 is indexed and int8, and one client sends it one token after the
other over a stream that stays open. Meanwhile nothing happens (idle), layer 1, which was filled just before, is indexed
for the first time (optimizing), layer 0 itself gets other search keys and its new files take over (quantizing), another
process copies both layers as a replica does (copying), and another one upserts as many new entries into layer 0 as it
has, which the service indexes by itself (inserting). A third client asks for the service's health all the time.

With --replica the client looks up in a replica that follows the sidecar, which is killed in the end.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from knnmoe.channels import open_channel
from knnmoe.client import ReplicationClient
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1.memory_admin_pb2_grpc import MemoryAdminServiceStub
from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.clustered import Workload, make_workload
from benchmarks.load import follow, runners
from benchmarks.sidecars import MEMORY, TIMEOUT_S, SidecarClient, build_layers, upsert_all
from model_runner.progress import Progress
from model_runner.sidecar import running_sidecar

NUM_EXPERTS, QUERIES = 64, 2048
ROUTED, OTHER = 0, 1
# A model's client gives up on a Route after this long and goes on with its own router.
CLIENT_DEADLINE_MS = 50.0
HEALTH_EVERY_S = 0.01
ORDER_S = 0.25
_INSERT_SEED_STEP = 1000
# What a client that learns example by example sends at a time.
ENTRIES_PER_INSERT = 64

Look = Callable[[], AbstractContextManager[dict[str, Any]]]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Router(threading.Thread):
    """Routes one token after the other until it is told to stop; times are kept per phase."""

    def __init__(self, client: SidecarClient, workload: Workload) -> None:
        super().__init__(daemon=True)
        self._requests = [
            client.request(workload.queries[i : i + 1], workload.logits[i : i + 1], 0)
            for i in range(len(workload.queries))
        ]
        self._client = client
        self._done = threading.Event()
        self.elapsed_ms: list[float] = []
        self.errors = 0

    def run(self) -> None:
        """Until stop()."""
        number = 0
        while not self._done.is_set():
            request = self._requests[number % len(self._requests)]
            number += 1
            started = time.perf_counter()
            try:
                self._client.streamed(request)
            except grpc.RpcError:
                self.errors += 1
            self.elapsed_ms.append(1000 * (time.perf_counter() - started))

    def stop(self) -> dict[str, Any]:
        """Ends the thread; what it saw."""
        self._done.set()
        self.join()
        return _summary(self.elapsed_ms, self.errors)


class FollowingRouter(threading.Thread):
    """The same, of a replica in a process of its own (see benchmarks.load)."""

    def __init__(self, orders: Connection) -> None:
        super().__init__(daemon=True)
        self._orders, self._done = orders, threading.Event()
        self.elapsed_ms: list[float] = []

    def run(self) -> None:
        """Until stop()."""
        while not self._done.is_set():
            self._orders.send((ORDER_S, 1))
            self.elapsed_ms += self._orders.recv()

    def stop(self) -> dict[str, Any]:
        """Ends the thread; what the replica saw. A lookup that fails ends its process, and this."""
        self._done.set()
        self.join()
        return _summary(self.elapsed_ms, 0)


def _summary(elapsed_ms: list[float], errors: int) -> dict[str, Any]:
    elapsed = np.array(elapsed_ms)
    return {
        "p50_ms": round(float(np.median(elapsed)), 3),
        "p99_ms": round(float(np.quantile(elapsed, 0.99)), 3),
        "max_ms": round(float(elapsed.max()), 3),
        "requests": len(elapsed),
        "errors": errors,
        "over_client_deadline": int((elapsed > CLIENT_DEADLINE_MS).sum()),
    }


class HealthProbe(threading.Thread):
    """Asks for the service's health until it is told to stop, and keeps the longest wait."""

    def __init__(self, target: str) -> None:
        super().__init__(daemon=True)
        self._channel = open_channel(target)
        self._done = threading.Event()
        self.max_ms = 0.0

    def run(self) -> None:
        """Until stop(). An error ends it and shows as an infinite wait."""
        stub: Any = health_pb2_grpc.HealthStub(self._channel)
        while not self._done.wait(HEALTH_EVERY_S):
            started = time.perf_counter()
            try:
                stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
            except grpc.RpcError:
                self.max_ms = float("inf")
                return
            self.max_ms = max(self.max_ms, 1000 * (time.perf_counter() - started))

    def stop(self) -> float:
        """Ends the thread; the longest wait in ms."""
        self._done.set()
        self.join()
        self._channel.close()
        return round(self.max_ms, 2)


def run(
    keys: int,
    dimension: int,
    idle_s: float,
    seed: int,
    progress: Progress,
    *,
    replica: bool = False,
) -> dict[str, Any]:
    """All phases, one after the other, against a real service."""
    progress.say(f"two layers of {keys} x {dimension} keys ...")
    workload = make_workload(keys, dimension, QUERIES, QUERIES, NUM_EXPERTS, seed)
    load = report.load_average()
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        target = f"unix:{directory}/route.sock"
        with running_sidecar(directory / "data", directory / "service.log", target) as address:
            build_layers(address, workload, 2, [ROUTED], progress)  # layer 1 stays empty
            shape = keys, dimension, idle_s, seed
            with _looking(address, workload, replica=replica) as look:
                result = _phases(address, workload, shape, look, progress, killed=replica)
    machine = report.machine() | {"load_average": [load, report.load_average()]}
    settings = {"keys": keys, "dimension": dimension, "idle_s": idle_s, "seed": seed}
    settings |= {"replica": replica}
    return {"machine": machine, "settings": settings, **result}


def _phases(
    target: str,
    workload: Workload,
    shape: tuple[int, int, float, int],
    look: Look,
    progress: Progress,
    *,
    killed: bool,
) -> dict[str, Any]:
    keys, dimension, idle_s, seed = shape
    work: dict[str, Callable[[], object]] = {
        "idle": lambda: time.sleep(idle_s),
        "optimizing": lambda: _optimize(target, OTHER, "int8"),
        "quantizing": lambda: _optimize(target, ROUTED, "turbo4"),
        "copying": lambda: _elsewhere(copy, target),
        "inserting": lambda: _elsewhere(insert, target, keys, dimension, seed),
    }
    probe = HealthProbe(target)
    if killed:
        work["killed"] = lambda: _kill(target, probe, idle_s)
    probe.start()
    results: dict[str, Any] = {}
    try:
        with look():  # warm
            time.sleep(min(2.0, idle_s))
        for name, job in work.items():
            if name == "optimizing":
                upsert_all(target, workload, OTHER, progress)
            progress.say(f"{name} ...")
            started = time.monotonic()
            with look() as seen:
                job()
            results[name] = seen | {"elapsed_s": round(time.monotonic() - started, 2)}
    finally:
        health_max_ms = probe.stop()
    idle = results["idle"]["p99_ms"]
    ratios = {name: round(r["p99_ms"] / idle, 3) for name, r in results.items()}
    return {**results, "health_max_ms": health_max_ms, "p99_over_idle": ratios}


@contextmanager
def _looking(target: str, workload: Workload, *, replica: bool) -> Iterator[Look]:
    """How the client looks up: in the sidecar, or in a replica in a process of its own."""
    if replica:
        with runners(1, follow, target, workload) as [end]:
            yield lambda: _seen_by(FollowingRouter(end))
    else:
        client = SidecarClient(target)
        try:
            yield lambda: _seen_by(Router(client, workload))
        finally:
            client.close()


@contextmanager
def _seen_by(router: Router | FollowingRouter) -> Iterator[dict[str, Any]]:
    seen: dict[str, Any] = {}
    router.start()
    try:
        yield seen
    finally:
        seen.update(router.stop())


def _kill(target: str, probe: HealthProbe, idle_s: float) -> None:
    """The sidecar is the process at the other end of its socket."""
    probe.stop()
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(target.removeprefix("unix:"))
        credentials = other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    os.kill(struct.unpack("3i", credentials)[0], signal.SIGKILL)
    time.sleep(idle_s)


def _optimize(target: str, layer: int, quantization: str) -> None:
    with open_channel(target) as channel:
        request = admin_pb.OptimizeRequest(memory=MEMORY, layers=[layer], quantization=quantization)
        for _ in MemoryAdminServiceStub(channel).Optimize(request, timeout=TIMEOUT_S):
            pass


def _elsewhere(work: Callable[..., None], *arguments: object) -> None:
    """In a process of its own, so that only the service is shared with the client that routes."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the process of {work.__name__}() ended with status {process.exitcode}")


def copy(target: str) -> None:
    """Both layers, as a replica gets them."""
    asking = SidecarClient(target)
    fingerprint = asking.memory.fingerprint
    asking.close()
    with ReplicationClient(target, MEMORY, fingerprint) as client:
        for message in client.replicate():
            if message.HasField("synced"):
                return


def insert(target: str, keys: int, dimension: int, seed: int) -> None:
    """Upserts as many entries again into the routed layer, with other ids and keys of the same kind."""
    workload = make_workload(keys, dimension, 1, 1, NUM_EXPERTS, seed + _INSERT_SEED_STEP)
    upsert_all(target, workload, ROUTED, Progress(quiet=True), ENTRIES_PER_INSERT)


def table(result: dict[str, Any]) -> Table:
    """A row per phase."""
    made = Table(title="Route of one token while ... (ms)")
    columns = ("p50_ms", "p99_ms", "max_ms", "requests", "errors", "over_client_deadline")
    for column in ("phase", *columns, "p99 / idle"):
        made.add_column(column, justify="left" if column == "phase" else "right")
    for name, ratio in result["p99_over_idle"].items():
        made.add_row(name, *(str(result[name][column]) for column in columns), str(ratio))
    return made


@app.command()
def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    keys: Annotated[int, typer.Option(min=1000, help="Keys per layer.")] = 20_000,
    dimension: Annotated[int, typer.Option(min=8, help="Of the keys.")] = 2048,
    idle_s: Annotated[float, typer.Option(min=0.1, help="Seconds of the idle phase.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the data.")] = 0,
    replica: Annotated[
        bool, typer.Option("--replica", help="Look up in a replica that follows the sidecar.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no table.")] = False,
) -> None:
    """Measure what a client that routes without pause notices of maintenance."""
    result = run(keys, dimension, idle_s, seed, Progress(quiet=quiet), replica=replica)
    if not quiet:
        console = Console()
        console.print(table(result))
        console.print(f"longest wait for health: {result['health_max_ms']} ms")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    app()

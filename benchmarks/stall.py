"""What a client that routes without pause notices of maintenance: `python -m benchmarks.stall --json FILE`.

A memory of two layers with as many keys each. Layer 0 is indexed and int8, and one client sends it one token after the
other over a stream that stays open. Meanwhile nothing happens (idle), layer 1, which was filled just before, is indexed
for the first time (optimizing), layer 0 itself gets other search keys and its new files take over (quantizing), another
process copies both layers as a replica does (copying), and another one upserts new entries into layer 0, which the
service indexes by itself (inserting). A third client asks for the service's health all the time.

With --replica the client looks up in a replica that follows the sidecar, which is killed in the end (killed) and
started again (restarted).
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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from knnmoe.channels import open_channel
from knnmoe.client import AdminClient, ReplicationClient, ServiceError
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1.memory_admin_pb2_grpc import MemoryAdminServiceStub
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.clustered import Workload, make_workload
from benchmarks.load import RunnerFailed, follow, ordered, received, runners
from benchmarks.sidecars import (
    MEMORY,
    TIMEOUT_S,
    SidecarClient,
    build_layers,
    upsert_all,
    upsert_request,
)
from model_runner.progress import Progress
from model_runner.sidecar import running_sidecar

NUM_EXPERTS, QUERIES = 64, 2048
ROUTED, OTHER = 0, 1
# A model's client gives up on a Route after this long and goes on with its own router.
CLIENT_DEADLINE_MS = 50.0
# Beyond the p99 of idle lookups.
HICCUP_MS = 1.0
HEALTH_EVERY_S = 0.01
ORDER_S = 0.25
_INSERT_SEED_STEP = 1000
# What a client that learns example by example sends at a time.
ENTRIES_PER_INSERT = 64

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(slots=True)
class Seen:
    """Lookups of a phase: their times, and how many failed."""

    elapsed_ms: list[float] = field(default_factory=list)
    errors: int = 0

    def row(self, idle: Seen) -> dict[str, Any]:
        """What is shown of it."""
        elapsed, usual = np.array(self.elapsed_ms), np.quantile(idle.elapsed_ms, 0.99)
        return {
            "p50_ms": round(float(np.median(elapsed)), 3),
            "p99_ms": round(float(np.quantile(elapsed, 0.99)), 3),
            "max_ms": round(float(elapsed.max()), 3),
            "lookups": len(elapsed),
            "errors": self.errors,
            "hiccups": int((elapsed > usual + HICCUP_MS).sum()),
            "over_client_deadline": int((elapsed > CLIENT_DEADLINE_MS).sum()),
        }


Look = Callable[[], AbstractContextManager[Seen]]


class Router(threading.Thread):
    """Routes one token after the other until it is told to stop."""

    def __init__(self, client: SidecarClient, workload: Workload) -> None:
        super().__init__(daemon=True)
        self._requests = [
            client.request(workload.queries[i : i + 1], workload.logits[i : i + 1], 0)
            for i in range(len(workload.queries))
        ]
        self._client = client
        self._done = threading.Event()
        self.seen = Seen()

    def run(self) -> None:
        """Until stop()."""
        number = 0
        while not self._done.is_set():
            request = self._requests[number % len(self._requests)]
            number += 1
            started = time.perf_counter()
            try:
                self._client.streamed(request)
            except (ServiceError, grpc.RpcError):
                self.seen.errors += 1
                self._client.reconnect()
            self.seen.elapsed_ms.append(1000 * (time.perf_counter() - started))

    def stop(self) -> None:
        """Ends the thread."""
        self._done.set()
        self.join()


class FollowingRouter(threading.Thread):
    """The same, of a replica in a process of its own (see benchmarks.load)."""

    def __init__(self, orders: Connection) -> None:
        super().__init__(daemon=True)
        self._orders, self._done = orders, threading.Event()
        self.seen = Seen()
        self._failure: RunnerFailed | None = None

    def run(self) -> None:
        """Until stop(), or until the replica fails."""
        try:
            while not self._done.is_set():
                ordered(self._orders, (ORDER_S, 1))
                self.seen.elapsed_ms += received(self._orders)
        except RunnerFailed as failure:
            self._failure = failure

    def stop(self) -> None:
        """Ends the thread. Raises RunnerFailed when a lookup failed."""
        self._done.set()
        self.join()
        if self._failure is not None:
            raise self._failure


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


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a run; the seconds are those of the idle phase, and of the inserting one at most."""

    keys: int
    dimension: int
    idle_s: float
    insert_s: float
    seed: int
    replica: bool


@dataclass(frozen=True, slots=True)
class Service:
    """A running sidecar, and how to start it again when it was killed."""

    target: str
    again: Callable[[], AbstractContextManager[str]]


def run(shape: Shape, progress: Progress) -> dict[str, Any]:
    """All phases, one after the other, against a real service."""
    progress.say(f"two layers of {shape.keys} x {shape.dimension} keys ...")
    workload = make_workload(shape.keys, shape.dimension, QUERIES, QUERIES, NUM_EXPERTS, shape.seed)
    load = report.load_average()
    with tempfile.TemporaryDirectory(prefix="stall-") as made:
        directory = Path(made)
        target = f"unix:{directory}/route.sock"
        data, log = directory / "data", directory / "service.log"
        service = Service(target, lambda: running_sidecar(data, log, target))
        with service.again():
            build_layers(target, workload, 2, [ROUTED], progress)  # layer 1 stays empty
            with _looking(target, workload, replica=shape.replica) as look:
                result = _phases(service, workload, shape, look, progress)
    machine = report.machine() | {"load_average": [load, report.load_average()]}
    return {"machine": machine, "settings": asdict(shape), **result}


def _phases(
    service: Service, workload: Workload, shape: Shape, look: Look, progress: Progress
) -> dict[str, Any]:
    target, idle_s, probe = service.target, shape.idle_s, HealthProbe(service.target)
    work: dict[str, Callable[[], object]] = {
        "idle": lambda: time.sleep(idle_s),
        "optimizing": lambda: _optimize(target, OTHER, "int8"),
        "quantizing": lambda: _optimize(target, ROUTED, "turbo4"),
        "copying": lambda: _elsewhere(copy, target),
        "inserting": lambda: _elsewhere(insert, target, shape),
    }
    if shape.replica:
        work["killed"] = lambda: _kill(target, probe, idle_s)
        work["restarted"] = lambda: _restart(service, idle_s)
    probe.start()
    seen: dict[str, Seen] = {}
    lasted_s: dict[str, float] = {}
    try:
        with look():  # warm
            time.sleep(min(2.0, idle_s))
        for name, job in work.items():
            if name == "optimizing":
                upsert_all(target, workload, OTHER, progress)
            progress.say(f"{name} ...")
            started = time.monotonic()
            with look() as seen[name]:
                job()
            lasted_s[name] = round(time.monotonic() - started, 2)
    finally:
        health_max_ms = probe.stop()
    rows = {
        name: each.row(seen["idle"]) | {"elapsed_s": lasted_s[name]} for name, each in seen.items()
    }
    idle = rows["idle"]["p99_ms"]
    ratios = {name: round(row["p99_ms"] / idle, 3) for name, row in rows.items()}
    return {**rows, "health_max_ms": health_max_ms, "p99_over_idle": ratios}


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
def _seen_by(router: Router | FollowingRouter) -> Iterator[Seen]:
    """Complete when the block is left."""
    router.start()
    try:
        yield router.seen
    finally:
        router.stop()


def _kill(target: str, probe: HealthProbe, idle_s: float) -> None:
    """The sidecar is the process at the other end of its socket."""
    probe.stop()
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(target.removeprefix("unix:"))
        credentials = other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    os.kill(struct.unpack("3i", credentials)[0], signal.SIGKILL)
    time.sleep(idle_s)


def _restart(service: Service, idle_s: float) -> None:
    """What was killed is back for so long."""
    with service.again():
        time.sleep(idle_s)


def _optimize(target: str, layer: int, quantization: str) -> None:
    with open_channel(target) as channel:
        request = admin_pb.OptimizeRequest(memory=MEMORY, layers=[layer], quantization=quantization)
        for _ in MemoryAdminServiceStub(channel).Optimize(request, timeout=TIMEOUT_S):
            pass


def _elsewhere(work: Callable[..., None], *arguments: object) -> None:
    """In a process of its own, so that only the service is shared with the client that routes. Raises as `work`."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        pool.submit(work, *arguments).result()


def copy(target: str) -> None:
    """Both layers, as a replica gets them."""
    asking = SidecarClient(target)
    fingerprint = asking.memory.fingerprint
    asking.close()
    with ReplicationClient(target, MEMORY, fingerprint) as client:
        for message in client.replicate():
            if message.HasField("synced"):
                return


def insert(target: str, shape: Shape) -> None:
    """Upserts new entries into the routed layer for a while, with other ids and keys of the same kind."""
    workload = make_workload(
        shape.keys, shape.dimension, 1, 1, NUM_EXPERTS, shape.seed + _INSERT_SEED_STEP
    )
    give_up = time.monotonic() + shape.insert_s
    with AdminClient(target, TIMEOUT_S) as client, client.upserter() as upserter:
        digest = client.describe(MEMORY).model_digest
        for start in range(0, shape.keys, ENTRIES_PER_INSERT):
            if time.monotonic() > give_up:
                break
            rows = slice(start, start + ENTRIES_PER_INSERT)
            upserter.send(upsert_request(digest, workload, ROUTED, rows))
        upserter.finish()


def table(result: dict[str, Any]) -> Table:
    """A row per phase."""
    made = Table(title="Route of one token while ... (ms)", box=box.SIMPLE)
    columns = (
        *("p50_ms", "p99_ms", "max_ms", "lookups", "errors", "hiccups"),
        *("over_client_deadline", "elapsed_s"),
    )
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
    idle_s: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds in which nothing happens, and of a dead sidecar."),
    ] = 6.0,
    insert_s: Annotated[
        float, typer.Option(min=0.1, help="Seconds of inserting: longer than 1,000 entries take.")
    ] = 20.0,
    seed: Annotated[int, typer.Option(help="Of the data.")] = 0,
    replica: Annotated[
        bool, typer.Option("--replica", help="Look up in a replica that follows the sidecar.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no table.")] = False,
) -> None:
    """Measure what a client that routes without pause notices of maintenance."""
    shape = Shape(keys, dimension, idle_s, insert_s, seed, replica)
    try:
        result = run(shape, Progress(quiet=quiet))
    except (RunnerFailed, ServiceError, grpc.RpcError, OSError, BrokenProcessPool) as error:
        typer.echo(f"benchmarks.stall: {type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from None
    if not quiet:
        console = Console()
        console.width = max(console.width, report.TABLE_WIDTH)  # a file has no width
        console.print(table(result))
        console.print(f"longest wait for health: {result['health_max_ms']} ms")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    app()

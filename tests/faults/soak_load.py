"""All that a sidecar does at once: lookups on every way in, learning, a monitor's questions, jobs, replicas.

load = Load(sidecar, metrics, FULL, seed=0, job_every_s=10.0); load.fill(); load.start(); ...; load.stop(); load.work
"""

from __future__ import annotations

import multiprocessing
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from knnmoe import tensors
from knnmoe.channels import open_channel
from knnmoe.client import AdminClient, ServiceError, service_error
from knnmoe.client.calls import DuplexStream, Stream
from knnmoe.client.direct import DirectStream
from knnmoe.v1 import doctor_pb2 as doctor_pb
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import replication_pb2 as replication_pb
from knnmoe.v1 import retention_pb2 as retention_pb
from knnmoe.v1 import routing_pb2 as routing_pb
from knnmoe.v1 import snapshots_pb2 as snapshots_pb
from knnmoe.v1 import types_pb2 as types_pb
from knnmoe.v1.replication_pb2_grpc import ReplicationServiceStub
from knnmoe.v1.routing_pb2_grpc import RoutingServiceStub

from tests.sidecar import LOGIT_DELTA, Sidecar

LARGE, SMALL, SCRATCH = "large", "small", "scratch"
LAYERS, HIDDEN, EXPERTS = 2, 128, 16
MODEL = {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_experts": EXPERTS}
TOKENS = 8
# Lookups of one stream before the next one is opened.
LOOKUPS_PER_STREAM = 2000
# Of each way in.
STREAMS = 2
BATCH, BATCHES_PER_S, FSYNC_EVERY = 256, 5.0, 20
EXAMPLE_ENTRIES, SOURCES = 64, 8
ASK_EVERY_S, VISIT_EVERY_S = 0.5, 10.0
TIMEOUT_S = 120.0


class Size(NamedTuple):
    """Entries of a layer: of the memory that has engines of its own, and of the one inside the service."""

    large: int = 20_000
    small: int = 1_000


FULL, TINY = Size(), Size(600, 200)


@dataclass
class Work:
    """What was done, and what failed."""

    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, name: str, call: Callable[[], object]) -> None:
        """Once; a call that is refused is a failure of the run, which goes on."""
        try:
            call()
        except (grpc.RpcError, ServiceError) as error:
            known = error if isinstance(error, ServiceError) else service_error(error)
            with self._lock:
                self.failed[f"{name}: {known.code.name}: {known.message:.200}"] += 1
            return
        self.count(name)

    def count(self, name: str) -> None:
        """One more was done."""
        with self._lock:
            self.done[name] += 1


class Rows:
    """Entries of one layer: a window over ever growing ids, each batch an example of its own."""

    def __init__(self, memory: str, layer: int, digest: str, seed: int) -> None:
        self.memory, self.layer, self.digest = memory, layer, digest
        self.first, self.end = 0, 0
        self._rng = np.random.default_rng([seed, layer])

    def add(self, count: int, *, fsync: bool = False) -> admin_pb.UpsertRequest:
        """The next ones."""
        ids = np.arange(self.end, self.end + count, dtype=np.uint64)
        keys, deltas = (
            self._rng.standard_normal((count, width)).astype(np.float32)
            for width in (HIDDEN, EXPERTS)
        )
        origins = [
            types_pb.Provenance(
                source=f"source-{n // EXAMPLE_ENTRIES % SOURCES}",
                example=f"example-{n // EXAMPLE_ENTRIES}",
                position=n % EXAMPLE_ENTRIES,
                created_unix_ms=int(time.time() * 1000),
            )
            for n in range(self.end, self.end + count)
        ]
        self.end += count
        entries = admin_pb.Entries(
            ids=tensors.to_tensor(ids),
            keys=tensors.to_tensor(keys),
            logit_deltas=tensors.to_tensor(deltas),
            provenance=origins,
        )
        durability = admin_pb.DURABILITY_FSYNC if fsync else admin_pb.DURABILITY_PROCESS
        return admin_pb.UpsertRequest(
            memory=self.memory,
            layer=self.layer,
            entries=entries,
            durability=durability,
            model_digest=self.digest,
        )

    def drop(self, count: int) -> retention_pb.DeleteRequest:
        """The oldest."""
        ids = np.arange(self.first, self.first + count, dtype=np.uint64)
        self.first += count
        return retention_pb.DeleteRequest(
            memory=self.memory, layer=self.layer, ids=tensors.to_tensor(ids)
        )


Lookup = Stream[routing_pb.RouteRequest, routing_pb.RouteResponse]


class Lookups:
    """Those of one way in, without pause."""

    def __init__(self, target: str, digest: str, seed: int) -> None:
        self.target, self.digest, self.seed = target, digest, seed
        self.work, self.ended = Work(), threading.Event()

    def look_up(self, way: str, number: int) -> None:
        """One after the other, on one stream after the other."""
        requests = self.requests(number)
        open_stream = {"over gRPC": self._over_grpc, "directly": self._directly}[way]
        while not self.ended.is_set():
            with open_stream() as stream:
                self.work.run(f"streams {way}", lambda s=stream: self._ask(s, requests, way))  # type: ignore[misc]

    @contextmanager
    def _over_grpc(self) -> Iterator[Lookup]:
        with open_channel(self.target) as channel:
            yield DuplexStream(RoutingServiceStub(channel).RouteStream, self.target)

    @contextmanager
    def _directly(self) -> Iterator[Lookup]:
        stream = DirectStream.connected(self.target)
        assert stream is not None, f"nobody listens beside {self.target}"
        with closing(stream):
            yield stream

    def requests(self, number: int, memory: str = "") -> Iterator[routing_pb.RouteRequest]:
        """Without end, over memories and layers; every fourth asks for neighbours."""
        rng = np.random.default_rng([self.seed, number])
        names = [memory] if memory else [LARGE, LARGE, SMALL]
        while True:
            for count in range(64):
                inputs, logits = (
                    rng.standard_normal((TOKENS, width)).astype(np.float32)
                    for width in (HIDDEN, EXPERTS)
                )
                yield routing_pb.RouteRequest(
                    memory=names[count % len(names)],
                    layer=0 if memory else count % LAYERS,
                    model_digest=self.digest,
                    router_inputs=tensors.to_tensor(inputs),
                    router_logits=tensors.to_tensor(logits),
                    with_neighbours=count % 4 == 0,
                )

    def _ask(self, stream: Lookup, requests: Iterator[routing_pb.RouteRequest], way: str) -> None:
        for request in islice(requests, LOOKUPS_PER_STREAM):
            if self.ended.is_set():
                return
            stream.send(request)
            stream.receive(TIMEOUT_S)
            self.work.count(f"lookups {way}")


def look_up(target: str, digest: str, way: str, seed: int, out: Connection) -> None:
    """In a process of its own, as a model's: until a message ends it; then it says what it did."""
    lookups = Lookups(target, digest, seed)
    threads = [
        threading.Thread(target=lookups.look_up, args=(way, n), daemon=True) for n in range(STREAMS)
    ]
    for thread in threads:
        thread.start()
    out.recv()
    lookups.ended.set()
    for thread in threads:
        thread.join(TIMEOUT_S)
    out.send((lookups.work.done, lookups.work.failed))


class Beside:
    """A function in a process of its own, whose last argument is a pipe: what it hears there first ends it."""

    def __init__(self, function: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process: Any = context.Process(target=function, args=(*arguments, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def heard(self) -> Any:
        """What it says next. Raises AssertionError when it has died, or is silent."""
        try:
            assert self._pipe.poll(TIMEOUT_S), f"{self.process} says nothing"
            return self._pipe.recv()
        except EOFError:
            raise AssertionError(f"{self.process} has died, see its traceback") from None

    def end(self) -> Any:
        """What it says in the end."""
        self._pipe.send("end")
        said = self.heard()
        self.process.join(TIMEOUT_S)
        return said

    def kill(self) -> None:
        """Whatever it does."""
        self.process.kill()
        self.process.join()


class Load:
    """All that is asked of one sidecar, in threads, from start() to stop()."""

    def __init__(
        self, sidecar: Sidecar, metrics: str, size: Size, seed: int, job_every_s: float
    ) -> None:
        """`metrics`: URL of the page."""
        self.sidecar, self.metrics, self.size, self.seed = sidecar, metrics, size, seed
        self.job_every_s = job_every_s
        self.work, self.ended = Work(), threading.Event()
        self.admin = AdminClient(sidecar.target, TIMEOUT_S)
        self.digest = ""
        self.rows = [
            Rows(name, layer, "", seed) for name in (LARGE, SMALL) for layer in range(LAYERS)
        ]
        loops = [self.learn, self.learn, self.ask, self.maintain, self.visit]
        self._lookups: list[Beside] = []
        self._threads = [
            threading.Thread(target=loop, args=(number,), daemon=True)
            for number, loop in enumerate(loops)
        ]

    def fill(self) -> None:
        """The first entries of both memories."""
        for name in (LARGE, SMALL):
            self.digest = self.sidecar.create(name, model=MODEL, kind=LOGIT_DELTA, gamma=[0.01])
        for rows in self.rows:
            rows.digest, wanted = self.digest, getattr(self.size, rows.memory)
            while rows.end < wanted:
                self._upsert(rows.add(min(BATCH, wanted - rows.end)))

    def start(self) -> None:
        for number, way in enumerate(("over gRPC", "directly")):
            about = self.sidecar.target, self.digest, way, self.seed + number
            self._lookups.append(Beside(look_up, *about))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Returns when all calls have ended."""
        self.ended.set()
        for lookups in self._lookups:
            done, failed = lookups.end()
            self.work.done += done
            self.work.failed += failed
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            if thread.is_alive():
                self.work.failed[f"{thread.name} hangs"] += 1
        self.admin.close()

    def kill(self) -> None:
        """What is left, when the run has failed."""
        self.ended.set()
        for lookups in self._lookups:
            lookups.kill()

    def wait(self, seconds: float) -> bool:
        """Whether to go on."""
        return not self.ended.wait(seconds)

    # Loops, each of a thread.

    def learn(self, number: int) -> None:
        """New entries in, as many old ones out, in one of both memories."""
        mine = [rows for rows in self.rows if rows.memory == (LARGE, SMALL)[number % 2]]
        count = 0
        while self.wait(1 / BATCHES_PER_S):
            rows = mine[count % LAYERS]
            count += 1
            fsync = count % FSYNC_EVERY == 0
            self.work.run("upserts", lambda r=rows, f=fsync: self._upsert(r.add(BATCH, fsync=f)))  # type: ignore[misc]
            self.work.run("deletes", lambda r=rows: self._delete(r.drop(BATCH)))  # type: ignore[misc]

    def ask(self, number: int) -> None:
        """What a dashboard and a monitor ask."""
        health = health_pb2_grpc.HealthStub(self.sidecar.channel)
        stub, layer = self.admin.admin, 0
        while self.wait(ASK_EVERY_S):
            layer = (layer + 1) % LAYERS
            recent = admin_pb.RecentLookupsRequest(memory=LARGE, layer=layer)
            calls: dict[str, Callable[[], object]] = {
                "stats": lambda: self.admin.unary(stub.Stats, admin_pb.StatsRequest()),
                "recent lookups": lambda r=recent: self.admin.unary(stub.RecentLookups, r),  # type: ignore[misc]
                "health checks": lambda: health.Check(
                    health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S
                ),
                "metrics": self._scrape,
            }
            for name, call in calls.items():
                self.work.run(name, call)

    def maintain(self, number: int) -> None:
        """One job after the other, and from the start again."""
        jobs = (self.optimize, self.snapshot, self.scratch, self.compress, self.look_around)
        count = 0
        while self.wait(self.job_every_s):
            job = jobs[count % len(jobs)]
            count += 1
            self.work.run(f"jobs: {job.__name__}", job)

    def visit(self, number: int) -> None:
        """Replicas that copy all and leave."""
        while self.wait(VISIT_EVERY_S):
            self.work.run("replicas that came and went", self._copy_all)

    # Jobs.

    def optimize(self, quantization: str = "none") -> None:
        request = admin_pb.OptimizeRequest(memory=LARGE, quantization=quantization)
        _drain(self.admin.admin.Optimize(request, timeout=TIMEOUT_S))

    def compress(self) -> None:
        self.optimize("int8")

    def snapshot(self) -> None:
        """Made, verified, restored under another name, and all of it deleted."""
        stub, name = self.admin.snapshots, "soak"
        reference = snapshots_pb.SnapshotRef(memory=LARGE, name=name)
        create = snapshots_pb.CreateSnapshotRequest(memory=LARGE, name=name)
        _drain(stub.CreateSnapshot(create, timeout=TIMEOUT_S))
        verify = snapshots_pb.VerifySnapshotRequest(snapshot=reference)
        _drain(stub.VerifySnapshot(verify, timeout=TIMEOUT_S))
        restore = snapshots_pb.RestoreSnapshotRequest(snapshot=reference, as_memory=SCRATCH)
        _drain(stub.RestoreSnapshot(restore, timeout=TIMEOUT_S))
        self.admin.delete(SCRATCH)
        delete = snapshots_pb.DeleteSnapshotRequest(memory=LARGE, name=name)
        stub.DeleteSnapshot(delete, timeout=TIMEOUT_S)

    def scratch(self) -> None:
        """A memory that is made, filled, read and deleted."""
        digest = self.sidecar.create(SCRATCH, model=MODEL, kind=LOGIT_DELTA, gamma=[0.01])
        rows = Rows(SCRATCH, 0, digest, self.seed)
        for _ in range(4):
            self._upsert(rows.add(BATCH))
        request = next(Lookups(self.sidecar.target, digest, self.seed).requests(0, SCRATCH))
        self.sidecar.routing.Route(request, timeout=TIMEOUT_S)
        self.admin.delete(SCRATCH)

    def look_around(self) -> None:
        """What reads all entries."""
        export = admin_pb.ExportRequest(memory=LARGE, layer=0, batch_size=2048)
        _drain(self.admin.admin.Export(export, timeout=TIMEOUT_S))
        sources = admin_pb.ListSourcesRequest(memory=LARGE)
        _drain(self.admin.admin.ListSources(sources, timeout=TIMEOUT_S))
        calibrate = admin_pb.CalibrateRequest(memory=LARGE, lambda0=0.5, sample=64, dry_run=True)
        self.admin.admin.Calibrate(calibrate, timeout=TIMEOUT_S)
        self.admin.doctor.Diagnose(doctor_pb.DiagnoseRequest(), timeout=TIMEOUT_S)

    # Calls.

    def _upsert(self, request: admin_pb.UpsertRequest) -> None:
        _drain(self.admin.admin.Upsert(iter([request]), timeout=TIMEOUT_S))

    def _delete(self, request: retention_pb.DeleteRequest) -> None:
        self.admin.retention.Delete(request, timeout=TIMEOUT_S)

    def _scrape(self) -> None:
        with urllib.request.urlopen(self.metrics, timeout=TIMEOUT_S) as page:  # noqa: S310
            page.read()

    def _copy_all(self) -> None:
        with open_channel(self.sidecar.target) as channel:
            request = replication_pb.ReplicateRequest(memory=SMALL)
            stream = ReplicationServiceStub(channel).Replicate(request, timeout=TIMEOUT_S)
            for message in stream:
                if message.HasField("synced"):
                    return


def _drain(stream: Iterable[object]) -> None:
    for _ in stream:
        pass

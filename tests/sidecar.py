"""A real routing service in a process of its own, and the messages that tests send it.

from tests.sidecar import Sidecar, make_fingerprint, random_entries, route_request
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from knnmoe import channels, tensors
from knnmoe.client import ServiceError, service_error
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import memory_admin_pb2_grpc, routing_pb2_grpc
from knnmoe.v1 import routing_pb2 as routing_pb
from knnmoe.v1 import types_pb2 as types_pb
from numpy.typing import NDArray

READY_TIMEOUT_S = 60.0
EXIT_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 60.0

ASSIGNMENT = types_pb.MEMORY_KIND_ASSIGNMENT
LOGIT_DELTA = types_pb.MEMORY_KIND_LOGIT_DELTA
LOGITS = types_pb.MEMORY_KIND_LOGITS
# The field of entries whose values have a number for each expert, by kind.
DENSE_VALUES = {LOGIT_DELTA: "logit_deltas", LOGITS: "logits"}
RBF = types_pb.SIMILARITY_RBF
COSINE = types_pb.SIMILARITY_COSINE

LAYERS, HIDDEN, EXPERTS, TOP_K = 3, 16, 8, 2


class Sidecar:
    """`python -m router_service serve` until stop() or kill()."""

    def __init__(
        self,
        data: Path,
        *,
        backend: str = "edge",
        listen: str = "127.0.0.1:0",
        flags: Sequence[str] = (),
        **popen: Any,
    ) -> None:
        """Returns when the service listens. Raises AssertionError with its stderr when it does not."""
        self.data = data
        self._log = data.parent / f"{data.name}.{time.monotonic_ns()}.stderr"
        self._channel: grpc.Channel | None = None
        command = [sys.executable, "-m", "router_service", "serve", "--data", str(data)]
        command += ["--backend", backend, "--listen", listen, "--drain-s", "1", *flags]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, **popen)
        self.target = self._wait_until_ready()

    def __enter__(self) -> Sidecar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_channel()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(EXIT_TIMEOUT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()

    @property
    def stderr(self) -> str:
        """What the service logged so far."""
        return self._log.read_text()

    @property
    def channel(self) -> grpc.Channel:
        """One channel, opened at the first use."""
        if self._channel is None:
            self._channel = channels.open_channel(self.target)
        return self._channel

    @property
    def routing(self) -> routing_pb2_grpc.RoutingServiceStub:
        """The data plane."""
        return routing_pb2_grpc.RoutingServiceStub(self.channel)

    @property
    def admin(self) -> memory_admin_pb2_grpc.MemoryAdminServiceStub:
        """The admin plane."""
        return memory_admin_pb2_grpc.MemoryAdminServiceStub(self.channel)

    def close_channel(self) -> None:
        """Ends the connection and every stream on it."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Asks the service to end and returns its exit code."""
        self.process.send_signal(number)
        return self.process.wait(EXIT_TIMEOUT_S)

    def kill(self) -> None:
        """SIGKILL: nothing is flushed or closed."""
        self.process.kill()
        self.process.wait(EXIT_TIMEOUT_S)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, none of its threads runs: SIGSTOP works some time after it was sent."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def stop_cleanly(self) -> None:
        """SIGTERM; the service must end with 0 and without a traceback."""
        self.close_channel()
        code = self.stop()
        assert code == 0, self.stderr
        assert "Traceback" not in self.stderr, self.stderr

    def create(self, name: str, *, model: dict[str, Any] | None = None, **settings: Any) -> str:
        """A new memory; returns the digest that requests carry."""
        request = admin_pb.CreateMemoryRequest(
            name=name,
            fingerprint=make_fingerprint(**(model or {})),
            settings=types_pb.MemorySettings(**settings),
        )
        return self.admin.CreateMemory(request, timeout=CALL_TIMEOUT_S).memory.model_digest

    def upsert(
        self, name: str, layer: int, entries: admin_pb.Entries, *, fsync: bool = False
    ) -> admin_pb.UpsertResponse:
        """Writes entries and returns the acknowledgement."""
        durability = admin_pb.DURABILITY_FSYNC if fsync else admin_pb.DURABILITY_PROCESS
        request = admin_pb.UpsertRequest(
            memory=name,
            layer=layer,
            entries=entries,
            durability=durability,
            model_digest=self.describe(name).model_digest,
        )
        return next(iter(self.admin.Upsert(iter([request]), timeout=CALL_TIMEOUT_S)))

    def describe(self, name: str) -> routing_pb.MemoryDescription:
        """A memory."""
        request = admin_pb.DescribeMemoryRequest(memory=name)
        return self.admin.DescribeMemory(request, timeout=CALL_TIMEOUT_S).memory

    def route(self, request: routing_pb.RouteRequest) -> routing_pb.RouteResponse:
        """One unary lookup."""
        return self.routing.Route(request, timeout=CALL_TIMEOUT_S)

    def _wait_until_ready(self) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], READY_TIMEOUT_S)
        line = self.process.stdout.readline().decode() if ready else ""
        if not line.startswith("listening on "):
            self.__exit__()
            raise AssertionError(f"the service did not start: {line!r}\n{self.stderr}")
        return line.removeprefix("listening on ").strip()


@contextmanager
def running_sidecar(data: Path, **options: Any) -> Iterator[Sidecar]:
    """A service that must end cleanly on SIGTERM."""
    with Sidecar(data, **options) as sidecar:
        yield sidecar
        sidecar.stop_cleanly()


def probe(target: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m knnmoe.probe` as a container's health check runs it."""
    command = [sys.executable, "-m", "knnmoe.probe"]
    variables = {**os.environ, "ROUTER_ADMIN_TARGET": target, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables)


def serve_and_fail(*arguments: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """`router-service serve` that is expected to refuse; `prefix` is a command that runs it."""
    command = [*prefix, sys.executable, "-m", "router_service", "serve", *arguments]
    environment = {**os.environ, "NO_COLOR": "1"}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=READY_TIMEOUT_S,
        env=environment,
        check=False,
    )


def make_fingerprint(**changes: Any) -> types_pb.ModelFingerprint:
    """A small model: 3 MoE layers, hidden size 16, 8 experts, top-2."""
    fields = {
        "architecture": "tiny_moe",
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        "router_hash": "5eed" * 16,
    }
    return types_pb.ModelFingerprint(**(fields | changes))


@dataclass(frozen=True)
class Assignments:
    """Sparse assignments of T tokens: experts i32 [T, k], weights f32 [T, k]."""

    experts: NDArray[np.int32]
    weights: NDArray[np.float32]

    def message(self, dtype: str = "f32") -> types_pb.SparseAssignment:
        """On the wire, the weights in `dtype`."""
        return types_pb.SparseAssignment(
            experts=tensors.to_tensor(self.experts), weights=floats(self.weights, dtype)
        )


def random_assignments(rng: np.random.Generator, tokens: int) -> Assignments:
    """k distinct experts per token, weights that sum to 1."""
    experts = rng.random((tokens, EXPERTS)).argsort(axis=1)[:, :TOP_K].astype(np.int32)
    weights = rng.uniform(0.1, 1.0, (tokens, TOP_K)).astype(np.float32)
    return Assignments(experts, weights / weights.sum(axis=1, keepdims=True))


def random_keys(rng: np.random.Generator, rows: int, width: int = HIDDEN) -> NDArray[np.float32]:
    """Normal numbers, f32 [rows, width]."""
    return rng.standard_normal((rows, width)).astype(np.float32)


def random_entries(kind: int, rows: int, seed: int = 0, first_id: int = 1) -> admin_pb.Entries:
    """Entries of 10 examples in two sources, ids spread over [0, 2^63); every third has a snippet."""
    rng = np.random.default_rng(seed)
    numbers = np.arange(first_id, first_id + rows, dtype=np.uint64)
    ids = numbers * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(1)
    origins = [
        types_pb.Provenance(
            source=f"text-{n % 2}",
            example=f"example-{n % 10}",
            position=n,
            token=n + 7,
            gain=0.5,
            **({} if n % 3 else {"snippet": f"the wörd {n}\n", "token_start": 3, "token_end": 8}),
        )
        for n in range(rows)
    ]
    entries = admin_pb.Entries(
        ids=tensors.to_tensor(ids), keys=floats(random_keys(rng, rows)), provenance=origins
    )
    if kind in DENSE_VALUES:
        values = getattr(entries, DENSE_VALUES[kind])
        values.CopyFrom(floats(random_keys(rng, rows, EXPERTS)))
    else:
        entries.assignments.CopyFrom(random_assignments(rng, rows).message())
    return entries


def floats(array: NDArray[Any], dtype: str = "f32") -> types_pb.Tensor:
    """A float tensor of `dtype` f32, f16 or bf16."""
    if dtype == "f16":
        return tensors.to_tensor(array.astype(np.float16))
    return tensors.to_tensor(array.astype(np.float32), bf16=dtype == "bf16")


def route_request(
    name: str,
    digest: str,
    inputs: NDArray[np.float32],
    own: Assignments | NDArray[np.float32],
    *,
    layer: int = 0,
    dtype: str = "f32",
    **fields: Any,
) -> routing_pb.RouteRequest:
    """A lookup of tokens with the model's own assignments or logits."""
    request = routing_pb.RouteRequest(
        memory=name,
        layer=layer,
        model_digest=digest,
        router_inputs=floats(inputs, dtype),
        **fields,
    )
    if isinstance(own, Assignments):
        request.assignment.CopyFrom(own.message(dtype))
    else:
        request.router_logits.CopyFrom(floats(own, dtype))
    return request


def exported(sidecar: Sidecar, name: str, layer: int) -> list[admin_pb.Entries]:
    """Every entry of a layer, message by message."""
    request = admin_pb.ExportRequest(memory=name, layer=layer)
    return [reply.entries for reply in sidecar.admin.Export(request, timeout=CALL_TIMEOUT_S)]


def refusal(call: Any, request: Any) -> ServiceError:
    """The structured error of a unary or streaming call that must fail."""
    try:
        reply = call(request, timeout=CALL_TIMEOUT_S)
        if hasattr(reply, "cancel"):  # a stream
            list(reply)
    except grpc.RpcError as error:
        return service_error(error)
    raise AssertionError("the call was expected to fail")

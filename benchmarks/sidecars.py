"""Two sidecars as processes over the same indexed collection, one behind TCP and one behind a Unix socket."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knnmoe import tensors
from knnmoe.channels import open_channel
from knnmoe.client.calls import DuplexStream, Stream
from knnmoe.client.direct import DirectStream
from knnmoe.fingerprint import ModelFingerprint
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import routing_pb2 as pb
from knnmoe.v1.memory_admin_pb2_grpc import MemoryAdminServiceStub
from knnmoe.v1.routing_pb2_grpc import RoutingServiceStub
from knnmoe.v1.types_pb2 import (
    MEMORY_KIND_LOGIT_DELTA,
    MemorySettings,
    Provenance,
)

from benchmarks.clustered import Workload
from benchmarks.exact import Reading
from model_runner.progress import Progress
from model_runner.sidecar import running_sidecar

MEMORY = "benchmark"
TOP_K = 8
LAMBDA0 = 0.5
QUANTIZATION = "int8"
ENTRIES_PER_UPSERT = 256
TOKENS_PER_DOCUMENT = 128
UPSERTS_AHEAD = 4
TIMEOUT_S = 600.0


class SidecarClient:
    """One sidecar's data plane, unary and over one stream that stays open, as the model runner keeps it."""

    def __init__(self, target: str) -> None:
        self._channel = open_channel(target)
        self._stub = RoutingServiceStub(self._channel)
        self.memory = self._stub.Describe(
            pb.DescribeRequest(memory=MEMORY), timeout=TIMEOUT_S, wait_for_ready=True
        ).memory
        self._target = target
        self._stream = self._connected()

    def _connected(self) -> Stream[pb.RouteRequest, pb.RouteResponse]:
        """As RoutingClient."""
        direct = DirectStream.connected(self._target)
        return direct or DuplexStream(self._stub.RouteStream, self._target)

    def request(
        self, inputs: Any, logits: Any, k: int, *, with_neighbours: bool = False
    ) -> pb.RouteRequest:
        """Tokens [T, d] and their own logits [T, N], f16 or f32 on the wire as they are here; k 0: the memory's K."""
        return pb.RouteRequest(
            memory=MEMORY,
            model_digest=self.memory.model_digest,
            router_inputs=tensors.to_tensor(inputs),
            router_logits=tensors.to_tensor(logits),
            neighbours=k or None,
            with_neighbours=with_neighbours,
        )

    def unary(self, request: pb.RouteRequest) -> pb.RouteResponse:
        """One Route call."""
        return self._stub.Route(request, timeout=TIMEOUT_S)

    def streamed(self, request: pb.RouteRequest) -> pb.RouteResponse:
        """The next exchange of the stream."""
        self._stream.send(request)
        return self._stream.receive(TIMEOUT_S)

    def reconnect(self) -> None:
        """After an exchange that failed: another stream."""
        self._stream.close()
        self._stream = self._connected()

    def search_with(self, hnsw_ef: int) -> None:
        """Sets the size of the candidate list for the calls that follow."""
        request = admin_pb.UpdateSettingsRequest(
            memory=MEMORY, settings=MemorySettings(hnsw_ef=hnsw_ef)
        )
        admin = MemoryAdminServiceStub(self._channel)
        self.memory = admin.UpdateSettings(request, timeout=TIMEOUT_S).memory

    def reading(self) -> Reading:
        """What the memory's answers depend on."""
        settings = self.memory.settings
        return Reading(settings.gamma[0], settings.step_size[0], settings.null_weight)

    def close(self) -> None:
        """Ends the stream and the connection."""
        self._stream.close()
        self._channel.close()


@dataclass(frozen=True, slots=True)
class Sidecars:
    """Clients of two sidecars that serve copies of the same files."""

    tcp: SidecarClient
    unix: SidecarClient
    build_s: float

    def search_with(self, hnsw_ef: int) -> None:
        """See SidecarClient.search_with."""
        for client in (self.tcp, self.unix):
            client.search_with(hnsw_ef)


@contextmanager
def running_sidecars(workload: Workload, directory: Path, progress: Progress) -> Iterator[Sidecars]:
    """Fills and indexes a memory through the admin plane, then serves it twice until the block is left."""
    first, second, socket = directory / "tcp", directory / "unix", f"unix:{directory}/route.sock"
    with running_sidecar(first, directory / "fill.log") as target:
        build_s = build_layers(target, workload, 1, [0], progress)
    shutil.copytree(first, second)
    with (
        running_sidecar(first, directory / "tcp.log") as tcp_target,
        running_sidecar(second, directory / "unix.log", socket) as unix_target,
        _client(tcp_target, len(workload.ids)) as tcp,
        _client(unix_target, len(workload.ids)) as unix,
    ):
        yield Sidecars(tcp, unix, build_s)


@contextmanager
def _client(target: str, entries: int) -> Iterator[SidecarClient]:
    client = SidecarClient(target)
    try:
        layer = client.memory.layers[0]
        indexed = (layer.entries, layer.indexed_entries, layer.quantization)
        if indexed != (entries, entries, QUANTIZATION):
            raise RuntimeError(f"{target} serves {layer}, expected {entries} indexed entries")
        yield client
    finally:
        client.close()


def build_layers(
    target: str, workload: Workload, layers: int, indexed: Sequence[int], progress: Progress
) -> float:
    """Makes a memory, fills some of its layers and indexes them; returns the seconds that indexing took."""
    with open_channel(target) as channel:
        stub = MemoryAdminServiceStub(channel)
        _create(stub, workload, layers)
        for layer in indexed:
            upsert_all(target, workload, layer, progress)
        progress.say(f"Optimize ({QUANTIZATION}) ...")
        request = admin_pb.OptimizeRequest(memory=MEMORY, layers=indexed, quantization=QUANTIZATION)
        started = time.monotonic()
        for _ in stub.Optimize(request, timeout=TIMEOUT_S):
            pass
        build_s = time.monotonic() - started
        progress.say(f"Optimize took {build_s:.1f} s")
        inputs = [
            admin_pb.LayerInputs(layer=layer, router_inputs=tensors.to_tensor(workload.held_out))
            for layer in indexed
        ]
        stub.Calibrate(
            admin_pb.CalibrateRequest(memory=MEMORY, lambda0=LAMBDA0, inputs=inputs, dry_run=False),
            timeout=TIMEOUT_S,
        )
    return build_s


def _create(stub: MemoryAdminServiceStub, workload: Workload, layers: int) -> None:
    fingerprint = fingerprint_of(workload, layers).message()
    request = admin_pb.CreateMemoryRequest(
        name=MEMORY,
        fingerprint=fingerprint,
        settings=MemorySettings(kind=MEMORY_KIND_LOGIT_DELTA, neighbours=1),
    )
    stub.CreateMemory(request, timeout=TIMEOUT_S, wait_for_ready=True)


def fingerprint_of(workload: Workload, layers: int) -> ModelFingerprint:
    """Of the model that there is not."""
    return ModelFingerprint(
        architecture="benchmark",
        num_layers=layers,
        hidden_size=workload.keys.shape[1],
        num_experts=workload.deltas.shape[1],
        top_k=TOP_K,
        router_hash="0" * 64,
    )


def upsert_all(
    target: str,
    workload: Workload,
    layer: int,
    progress: Progress,
    at_a_time: int = ENTRIES_PER_UPSERT,
) -> None:
    """Writes every entry of the workload to a layer, a few requests on their way at a time."""
    with open_channel(target) as channel:
        stub = MemoryAdminServiceStub(channel)
        describe = admin_pb.DescribeMemoryRequest(memory=MEMORY)
        digest = stub.DescribeMemory(describe, timeout=TIMEOUT_S).memory.model_digest
        stream = DuplexStream[admin_pb.UpsertRequest, admin_pb.UpsertResponse](stub.Upsert, target)
        starts = range(0, len(workload.ids), at_a_time)
        try:
            for sent, start in enumerate(progress.track(starts, "Upsert", "requests")):
                stream.send(
                    upsert_request(digest, workload, layer, slice(start, start + at_a_time))
                )
                if sent >= UPSERTS_AHEAD:
                    stream.receive(TIMEOUT_S)
            for _ in range(min(len(starts), UPSERTS_AHEAD)):
                stream.receive(TIMEOUT_S)
        finally:
            stream.close()


def upsert_request(
    digest: str, workload: Workload, layer: int, rows: slice
) -> admin_pb.UpsertRequest:
    """Some entries of the workload."""
    start = int(rows.start)
    places = [divmod(start + i, TOKENS_PER_DOCUMENT) for i in range(len(workload.ids[rows]))]
    entries = admin_pb.Entries(
        ids=tensors.to_tensor(workload.ids[rows]),
        keys=tensors.to_tensor(workload.keys[rows]),
        logit_deltas=tensors.to_tensor(workload.deltas[rows]),
        provenance=[Provenance(source="made up", example=str(d), position=p) for d, p in places],
    )
    return admin_pb.UpsertRequest(
        memory=MEMORY, layer=layer, entries=entries, model_digest=digest, request_id=start
    )

"""The admin plane's handlers: memories and their entries, and the doctor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
from knnmoe.v1 import doctor_pb2, doctor_pb2_grpc, memory_admin_pb2_grpc, routing_pb2
from knnmoe.v1 import memory_admin_pb2 as pb

from router_service import __version__, checks
from router_service.arrays import F32, Entries
from router_service.backends.base import Report, pages
from router_service.doctor import Severity, check_known_keys, diagnose_store
from router_service.errors import Cancelled, InvalidField
from router_service.jobs.optimize import Indexed, SearchChoice, optimized, optimized_to
from router_service.jobs.sources import Sources, sources_of
from router_service.memories.calibration import LayerCalibration
from router_service.memories.counters import DURATION_BOUNDS
from router_service.memories.memory import RoutingMemory, sample_entries
from router_service.memories.store import MemoryStore
from router_service.memories.swap import replace_memory
from router_service.operations import Operations
from router_service.rpc import codec, stats
from router_service.rpc.operations import encoded
from router_service.rpc.planes import Planes
from router_service.rpc.quantization import decode_compression, encode_indexed, filled_layers
from router_service.rpc.replication import Copy
from router_service.rpc.write_limits import WriteGuard

DEFAULT_EXPORT_BATCH = 512
DEFAULT_SAMPLE = 1000
MAX_SAMPLE, MAX_EXPORT_SAMPLE = 100_000, 10_000
# Bytes of one Export message stay well under the message limit.
EXPORT_BYTES = 4 * 1024 * 1024
# Of one message; a name has 1,024 characters at most.
_SOURCES_PER_PAGE = 512
_Calibration = pb.CalibrateRequest | pb.CalibrateWatchedRequest
_SEVERITIES = {
    Severity.OK: doctor_pb2.SEVERITY_OK,
    Severity.WARNING: doctor_pb2.SEVERITY_WARNING,
    Severity.ERROR: doctor_pb2.SEVERITY_ERROR,
}


class MemoryAdminService(memory_admin_pb2_grpc.MemoryAdminServiceServicer):
    """Create, list, describe, delete, replace, fill, count, export, calibrate, optimize."""

    def __init__(
        self,
        store: MemoryStore,
        operations: Operations,
        planes: Planes,
        copies: Callable[[], list[Copy]],
        writes: WriteGuard,
    ) -> None:
        self._store, self._operations, self._planes = store, operations, planes
        self._copies, self._writes, self._started = copies, writes, time.monotonic()

    def CreateMemory(  # noqa: N802
        self, request: pb.CreateMemoryRequest, context: grpc.ServicerContext
    ) -> pb.CreateMemoryResponse:
        """An empty memory for one model."""
        memory = self._store.create(
            request.name,
            codec.decode_fingerprint(request.fingerprint),
            codec.decode_settings(request.settings),
            lambda: _require_caller(context),
        )
        return pb.CreateMemoryResponse(memory=codec.encode_memory(memory))

    def ListMemories(  # noqa: N802
        self, request: pb.ListMemoriesRequest, context: grpc.ServicerContext
    ) -> pb.ListMemoriesResponse:
        """Every memory that serves."""
        with self._store.exclusive():  # a memory that is being deleted has no counts
            memories = [codec.encode_memory(memory) for memory in self._store.latest()]
        return pb.ListMemoriesResponse(memories=memories)

    def DescribeMemory(  # noqa: N802
        self, request: pb.DescribeMemoryRequest, context: grpc.ServicerContext
    ) -> pb.DescribeMemoryResponse:
        """One memory."""
        memory = self._store.asked(request.memory, codec.encode_memory)
        return pb.DescribeMemoryResponse(memory=memory)

    def DeleteMemory(  # noqa: N802
        self, request: pb.DeleteMemoryRequest, context: grpc.ServicerContext
    ) -> pb.DeleteMemoryResponse:
        """Removes a memory and its files."""
        return pb.DeleteMemoryResponse(entries=self._store.delete(request.memory))

    def ReplaceMemory(  # noqa: N802
        self, request: pb.ReplaceMemoryRequest, context: grpc.ServicerContext
    ) -> pb.ReplaceMemoryResponse:
        """Swaps a memory in under the name of another."""
        done = replace_memory(self._store, self._operations, request.memory, request.by)
        return pb.ReplaceMemoryResponse(
            memory=codec.encode_memory(done.memory), removed=done.removed
        )

    def UpdateSettings(  # noqa: N802
        self, request: pb.UpdateSettingsRequest, context: grpc.ServicerContext
    ) -> pb.UpdateSettingsResponse:
        """Changes how a memory is read."""
        changes = codec.decode_changes(request.settings)
        memory = self._store.change_settings(request.memory, changes)
        return pb.UpdateSettingsResponse(memory=codec.encode_memory(memory))

    def Upsert(  # noqa: N802
        self, request_iterator: Iterator[pb.UpsertRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.UpsertResponse]:
        """Writes and acknowledges one request after the other."""
        for request in request_iterator:
            upserted = self._store.asked(request.memory, partial(self._upsert, request, context))
            yield pb.UpsertResponse(request_id=request.request_id, upserted=upserted)

    def _upsert(
        self, request: pb.UpsertRequest, context: grpc.ServicerContext, memory: RoutingMemory
    ) -> int:
        entries = codec.decode_entries(request.entries, memory.record.settings.kind)
        fsync = codec.decode_fsync(request.durability)
        self._writes.require(context, memory, request.layer, entries)
        memory.upsert(request.layer, request.model_digest, entries, fsync=fsync)
        return len(entries)

    def Count(self, request: pb.CountRequest, context: grpc.ServicerContext) -> pb.CountResponse:  # noqa: N802
        """Exact counts."""
        layers = self._store.asked(request.memory, partial(_counted, request))
        return pb.CountResponse(layers=layers, total=sum(layer.entries for layer in layers))

    def Export(  # noqa: N802
        self, request: pb.ExportRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ExportResponse]:
        """A layer's entries in the order of ids."""
        memory = self._store.get(request.memory)
        kind = memory.record.settings.kind
        size = _export_batch(memory, request.batch_size)
        for entries in _wanted(memory, request, size):
            yield pb.ExportResponse(entries=codec.encode_entries(entries, kind))

    def Calibrate(  # noqa: N802
        self, request: pb.CalibrateRequest, context: grpc.ServicerContext
    ) -> pb.CalibrateResponse:
        """Gamma per layer from distances to the nearest key."""
        return self._calibrated(request, lambda *_: _require_caller(context))

    def CalibrateWatched(  # noqa: N802
        self, request: pb.CalibrateWatchedRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.CalibrateWatchedResponse]:
        """The same, as an operation."""
        self._store.get(request.memory)

        def steps(report: Report) -> Iterator[pb.CalibrateResponse]:
            yield self._calibrated(request, report)

        running = self._operations.run("calibrate", request.memory, steps, exclusive=False)
        return encoded(running, pb.CalibrateWatchedResponse, lambda done: {"calibration": done})

    def _calibrated(self, request: _Calibration, report: Report) -> pb.CalibrateResponse:
        memory = self._store.get(request.memory)
        checks.require_fraction("lambda0", request.lambda0)
        if request.quantile:
            checks.require_fraction("quantile", request.quantile)
        results = _calibrate(memory, request, report)
        if not request.dry_run:
            gamma = _gamma_with(memory, results)
            memory = self._store.change_settings(request.memory, {"gamma": gamma}, memory)
        return pb.CalibrateResponse(
            layers=[codec.filled(pb.LayerCalibration, result) for result in results],
            memory=codec.encode_memory(memory),
        )

    def Optimize(  # noqa: N802
        self, request: pb.OptimizeRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.OptimizeResponse]:
        """Indexes layers side by side."""
        memory = self._store.get(request.memory)
        label = request.quantization
        compression = decode_compression(memory, "quantization", label) if label else None
        layers, recall = memory.chosen_layers(request.layers), request.recall
        if not 0 <= recall <= 1:
            raise InvalidField("recall", recall, "a share from 0 (leaves the settings) to 1")

        def steps(report: Report) -> Iterator[Indexed | SearchChoice]:
            if recall:
                return optimized_to(self._store, memory, layers, compression, recall, report)
            return optimized(memory, layers, compression, report)

        def encode(done: object) -> dict[str, Any]:
            if isinstance(done, Indexed):
                return encode_indexed(memory, done)
            assert isinstance(done, SearchChoice)  # noqa: S101  # there is no third
            measured = [codec.filled(pb.LayerSearch, each) for each in done.layers]
            return {"search": codec.filled(pb.SearchChoice, done, layers=measured)}

        running = self._operations.run("optimize", request.memory, steps)
        return encoded(running, pb.OptimizeResponse, encode)

    def Stats(self, request: pb.StatsRequest, context: grpc.ServicerContext) -> pb.StatsResponse:  # noqa: N802
        """What the service holds and did since it started."""
        with self._store.exclusive():
            asked = [self._store.get(request.memory)] if request.memory else self._store.latest()
            memories = [stats.encode_memory(memory) for memory in asked]
        return pb.StatsResponse(
            memories=memories,
            uptime_s=int(time.monotonic() - self._started),
            resident_bytes=stats.resident_bytes(),
            service_version=__version__,
            in_flight=self._planes.in_flight,
            refused_lookups=self._planes.routing.refused.lookups(),
            duration_bounds_s=DURATION_BOUNDS,
            replicas=stats.encode_copies(self._copies(), request.memory),
        )

    def ListSources(  # noqa: N802
        self, request: pb.ListSourcesRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ListSourcesResponse]:
        """What there is of each source."""
        layers = self._store.get(request.memory).chosen_layers(request.layers)

        def steps(report: Report) -> Iterator[pb.SourcePage]:
            yield from _source_pages(sources_of(layers, report))

        running = self._operations.run("sources", request.memory, steps, exclusive=False)
        return encoded(running, pb.ListSourcesResponse, lambda page: {"page": page})

    def ExplainEntry(  # noqa: N802
        self, request: pb.ExplainEntryRequest, context: grpc.ServicerContext
    ) -> pb.ExplainEntryResponse:
        """What answers a token like a stored one."""
        return self._store.asked(request.memory, partial(stats.explain, request))

    def RecentLookups(  # noqa: N802
        self, request: pb.RecentLookupsRequest, context: grpc.ServicerContext
    ) -> pb.RecentLookupsResponse:
        """Tokens that were looked up just now."""

        def recent(memory: RoutingMemory) -> list[pb.LookedUpToken]:
            layer = memory.layer(request.layer)
            return stats.encode_tokens(memory, layer, layer.recent.look())

        tokens = self._store.asked(request.memory, recent)
        return pb.RecentLookupsResponse(tokens=tokens)


def _source_pages(found: Sources) -> Iterator[pb.SourcePage]:
    """One at least."""
    rows = [codec.filled(pb.SourceDescription, source) for source in found.sources]
    for start in range(0, max(1, len(rows)), _SOURCES_PER_PAGE):
        page = pb.SourcePage(sources=rows[start : start + _SOURCES_PER_PAGE])
        if start + _SOURCES_PER_PAGE >= len(rows):
            page.unlisted_entries = found.unlisted_entries
        yield page


def _counted(request: pb.CountRequest, memory: RoutingMemory) -> list[routing_pb2.LayerDescription]:
    numbers = [request.layer] if request.HasField("layer") else range(len(memory.layers))
    layers = [codec.encode_layer(memory, number) for number in numbers]
    if request.HasField("ids"):
        ids = codec.decode_ids("ids", request.ids)
        checks.require_ids("ids", ids)
        for layer in layers:
            layer.entries = memory.layer(layer.layer).count_of(ids)
    return layers


def _require_caller(context: grpc.ServicerContext) -> None:
    """Raises Cancelled."""
    if not context.is_active():
        raise Cancelled("the caller has gone; nothing was stored")


def _calibrate(
    memory: RoutingMemory, request: _Calibration, report: Report
) -> list[LayerCalibration]:
    quantile, sample = request.quantile or 0.5, request.sample or DEFAULT_SAMPLE
    if sample > MAX_SAMPLE:
        raise InvalidField("sample", sample, f"0 to {MAX_SAMPLE}")
    # Without inputs every layer's own keys; a layer that is not read, or is empty, has nothing to measure.
    inputs: list[tuple[int, F32 | None]] = [
        (item.layer, codec.decode_floats("inputs.router_inputs", item.router_inputs))
        for item in request.inputs
    ] or [(layer.layer, None) for layer in filled_layers(memory)]

    def on_page(number: int, done: int) -> None:
        report(f"layer {number}: compare", done, memory.layer(number).info().entries)

    return [
        memory.calibrate(number, request.lambda0, quantile, rows, sample, partial(on_page, number))
        for number, rows in inputs
    ]


def _gamma_with(memory: RoutingMemory, results: list[LayerCalibration]) -> tuple[float, ...]:
    """One gamma per layer: the measured ones, the stored ones elsewhere."""
    gamma = [memory.record.settings.gamma_of(number) for number in range(len(memory.layers))]
    for result in results:
        gamma[result.layer] = result.gamma
    return tuple(gamma)


def _wanted(memory: RoutingMemory, request: pb.ExportRequest, size: int) -> Iterator[Entries]:
    """The entries that an export wants, `size` at a time."""
    layer, with_keys = memory.layer(request.layer), not request.without_keys
    if not request.sample:
        yield from pages(layer.collection, size, with_keys=with_keys)
        return
    if request.sample > MAX_EXPORT_SAMPLE:
        raise InvalidField("sample", request.sample, f"0 to {MAX_EXPORT_SAMPLE}")
    found = sample_entries(layer, request.sample)
    chosen = found.slice(0, request.sample)
    if not with_keys:
        chosen = replace(chosen, keys=chosen.keys[:, :0])
    for start in range(0, len(chosen), size):
        yield chosen.slice(start, start + size)


def _export_batch(memory: RoutingMemory, asked: int) -> int:
    width = memory.record.fingerprint.hidden_size + memory.record.value_width
    most = max(1, EXPORT_BYTES // (4 * width))
    return min(asked or DEFAULT_EXPORT_BATCH, most)


class DoctorService(doctor_pb2_grpc.DoctorServiceServicer):
    """Looks at the service's own store."""

    def __init__(self, store: MemoryStore, min_free_bytes: int | None) -> None:
        self._store, self._min_free_bytes = store, min_free_bytes

    def Diagnose(  # noqa: N802
        self, request: doctor_pb2.DiagnoseRequest, context: grpc.ServicerContext
    ) -> doctor_pb2.DiagnoseResponse:
        """Every finding, or whether lookups find what one memory holds."""
        found = (
            check_known_keys(self._store.get(request.memory))
            if request.memory
            else diagnose_store(self._store, self._min_free_bytes, deep=request.deep)
        )
        findings = [
            codec.filled(doctor_pb2.Finding, finding, severity=_SEVERITIES[finding.severity])
            for finding in found
        ]
        return doctor_pb2.DiagnoseResponse(findings=findings, service_version=__version__)

"""The memories of a running service, over its RPCs."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing

from knnmoe import tensors
from knnmoe.client import AdminClient, ServiceError
from knnmoe.v1 import doctor_pb2 as doctor_pb
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1 import retention_pb2 as retention_pb
from knnmoe.v1 import routing_pb2 as routing_pb
from typing_extensions import override

from router_service.arrays import U64, Entries
from router_service.backends.base import Compression, Report
from router_service.fingerprint import ModelFingerprint
from router_service.memories.memory import MemoryRecord
from router_service.memories.settings import MemorySettings
from router_service.rpc import codec
from router_service.transfer.endpoints import Batch, Endpoint, LayerState, MemoryEntries

# What `migrate` calls the service that it talks to.
EMBEDDED = "embedded"
_ERROR = doctor_pb.SEVERITY_ERROR
_REFUSED = "ERROR_REASON_INVALID_FIELD"


class ServiceEndpoint(Endpoint):
    """The memories of a service; with `fsync` entries are acknowledged when they are on disk. Raises ServiceError."""

    def __init__(self, client: AdminClient, *, fsync: bool = False) -> None:
        super().__init__(EMBEDDED)
        self._client, self._fsync = client, fsync

    @override
    def names(self) -> list[str]:
        reply = self._client.unary(self._client.admin.ListMemories, pb.ListMemoriesRequest())
        return sorted(memory.name for memory in reply.memories)

    @override
    def find(self, name: str) -> MemoryRecord | None:
        memory = self._client.find(name)
        return None if memory is None else _record(memory)

    @override
    def create(self, name: str, fingerprint: ModelFingerprint, settings: MemorySettings) -> None:
        request = pb.CreateMemoryRequest(
            name=name,
            fingerprint=codec.encode_fingerprint(fingerprint),
            settings=codec.encode_settings(settings),
        )
        self._client.unary(self._client.admin.CreateMemory, request)

    @override
    def delete(self, name: str) -> None:
        request = pb.DeleteMemoryRequest(memory=name)
        self._client.unary(self._client.admin.DeleteMemory, request, long=True)

    @override
    def change_settings(self, name: str, settings: MemorySettings) -> None:
        wanted = codec.encode_settings(settings)
        # No layers listed means all, which a request can only say by listing them.
        wanted.layers[:] = settings.layers or range(
            self._client.describe(name).fingerprint.num_layers
        )
        request = pb.UpdateSettingsRequest(memory=name, settings=wanted)
        self._client.unary(self._client.admin.UpdateSettings, request, repeat=True)

    @override
    def entries(self, name: str) -> ServiceEntries:
        return ServiceEntries(self._client, _record(self._client.describe(name)), self._fsync)


class ServiceEntries(MemoryEntries):
    """The entries of a service's memory. Raises ServiceError."""

    def __init__(self, client: AdminClient, record: MemoryRecord, fsync: bool) -> None:
        self.record = record
        self._client = client
        self._durability = pb.DURABILITY_FSYNC if fsync else pb.DURABILITY_PROCESS

    @override
    def pages(self, layer: int, *, with_keys: bool = True) -> Generator[Entries, None, None]:
        request = pb.ExportRequest(memory=self.record.name, layer=layer, without_keys=not with_keys)
        # One stream, that waits while nothing is taken from it.
        with closing(self._client.replies(self._client.admin.Export(request))) as replies:
            for reply in replies:
                yield codec.decode_entries(reply.entries, self.record.settings.kind)

    @override
    def write(self, batches: Iterable[Batch]) -> Iterator[int]:
        for reply in self._client.upsert(map(self._upsert, batches)):
            yield reply.upserted

    def count(self, layer: int, ids: U64) -> int:
        """How many of these ids [n] the layer holds."""
        request = pb.CountRequest(memory=self.record.name, layer=layer, ids=tensors.to_tensor(ids))
        total: int = self._client.unary(self._client.admin.Count, request, repeat=True).total
        return total

    @override
    def holds_any(self, layer: int, ids: U64) -> bool:
        return self.count(layer, ids) > 0

    @override
    def delete(self, layer: int, ids: U64) -> int:
        request = retention_pb.DeleteRequest(
            memory=self.record.name, layer=layer, ids=tensors.to_tensor(ids)
        )
        deleted: int = self._client.unary(
            self._client.retention.Delete, request, long=True, repeat=True
        ).deleted
        return deleted

    @override
    def state(self, layer: int) -> LayerState:
        request = pb.CountRequest(memory=self.record.name, layer=layer)
        [found] = self._client.unary(self._client.admin.Count, request, repeat=True).layers
        compression = Compression.parse(found.quantization)
        return LayerState(found.entries, found.indexed_entries, compression)

    @override
    def optimize(self, layer: int, compression: Compression, report: Report) -> str:
        request = pb.OptimizeRequest(
            memory=self.record.name, layers=[layer], quantization=compression.label
        )
        try:
            call = self._client.admin.Optimize(request)
            # The service ends the operation when the stream ends.
            with closing(self._client.replies(call, long=True)) as replies:
                for reply in replies:
                    now = reply.operation
                    report(now.stage, now.done, now.total)
        except ServiceError as error:
            if error.reason != _REFUSED:
                raise
            return error.message
        return ""

    @override
    def unfound(self) -> str:
        request = doctor_pb.DiagnoseRequest(memory=self.record.name)
        reply = self._client.unary(self._client.doctor.Diagnose, request, long=True)
        return "; ".join(finding.what for finding in reply.findings if finding.severity == _ERROR)

    def _upsert(self, batch: Batch) -> pb.UpsertRequest:
        return pb.UpsertRequest(
            memory=self.record.name,
            layer=batch.layer,
            entries=codec.encode_entries(batch.entries, self.record.settings.kind),
            durability=self._durability,
            model_digest=self.record.fingerprint.digest(),
        )


def _record(memory: routing_pb.MemoryDescription) -> MemoryRecord:
    return MemoryRecord(
        memory.name,
        codec.decode_fingerprint(memory.fingerprint),
        codec.decode_settings(memory.settings),
        memory.created_unix_ms,
    )

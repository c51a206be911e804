"""The memories of a running service, as one end of a migration."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing

from knnmoe import tensors
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1 import retention_pb2 as retention_pb
from knnmoe.v1 import routing_pb2 as routing_pb

from router_service.arrays import U64, Entries
from router_service.backends.base import Compression, Report
from router_service.cli.admin_client import AdminClient
from router_service.cli.errors import ServiceRefused
from router_service.fingerprint import ModelFingerprint
from router_service.memories.memory import MemoryRecord
from router_service.memories.settings import MemorySettings
from router_service.rpc import codec
from router_service.transfer import LayerState

_REFUSED = "ERROR_REASON_INVALID_FIELD"


class ServicePlace:
    """A Place over RPCs. Raises AdminError."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client

    def names(self) -> list[str]:
        """See Place.names."""
        reply = self._client.unary(self._client.admin.ListMemories, pb.ListMemoriesRequest())
        return sorted(memory.name for memory in reply.memories)

    def record(self, name: str) -> MemoryRecord | None:
        """See Place.record."""
        memory = self._client.find_memory(name)
        return None if memory is None else _record(memory)

    def create(self, name: str, fingerprint: ModelFingerprint, settings: MemorySettings) -> None:
        """See Place.create."""
        request = pb.CreateMemoryRequest(
            name=name,
            fingerprint=codec.encode_fingerprint(fingerprint),
            settings=codec.encode_settings(settings),
        )
        self._client.unary(self._client.admin.CreateMemory, request)

    def change_settings(self, name: str, settings: MemorySettings) -> None:
        """See Place.change_settings. No layers listed means all, which a request can only say by listing them."""
        wanted = codec.encode_settings(settings)
        wanted.layers[:] = settings.layers or range(
            self._client.memory(name).fingerprint.num_layers
        )
        request = pb.UpdateSettingsRequest(memory=name, settings=wanted)
        self._client.unary(self._client.admin.UpdateSettings, request)

    def side(self, name: str) -> ServiceSide:
        """See Place.side."""
        return ServiceSide(self._client, _record(self._client.memory(name)))


class ServiceSide:
    """A Side over RPCs. Raises AdminError."""

    def __init__(self, client: AdminClient, record: MemoryRecord) -> None:
        self._client, self._record = client, record

    def pages(self, layer: int) -> Generator[Entries, None, None]:
        """See Side.pages: one stream, that waits while nothing is taken from it."""
        request = pb.ExportRequest(memory=self._record.name, layer=layer)
        with closing(self._client.replies(self._client.admin.Export(request))) as replies:
            for reply in replies:
                yield codec.decode_entries(reply.entries, self._record.settings.kind)

    def write(self, layer: int, batches: Iterable[Entries]) -> Iterator[int]:
        """See Side.write: one stream, with a few batches on their way."""
        for reply in self._client.upsert(self._upsert(layer, batch) for batch in batches):
            yield reply.upserted

    def delete(self, layer: int, ids: U64) -> int:
        """See Side.delete."""
        request = retention_pb.DeleteRequest(
            memory=self._record.name, layer=layer, ids=tensors.to_tensor(ids)
        )
        deleted: int = self._client.unary(self._client.retention.Delete, request, long=True).deleted
        return deleted

    def state(self, layer: int) -> LayerState:
        """See Side.state."""
        request = pb.CountRequest(memory=self._record.name, layer=layer)
        [found] = self._client.unary(self._client.admin.Count, request).layers
        compression = Compression.parse(found.quantization)
        return LayerState(found.entries, found.indexed_entries, compression)

    def optimize(self, layer: int, compression: Compression, report: Report) -> str:
        """See Side.optimize. The service ends the operation when the stream ends."""
        request = pb.OptimizeRequest(
            memory=self._record.name, layers=[layer], quantization=compression.label
        )
        try:
            call = self._client.admin.Optimize(request)
            with closing(self._client.replies(call, long=True)) as replies:
                for reply in replies:
                    now = reply.operation
                    report(now.stage, now.done, now.total)
        except ServiceRefused as refusal:
            if refusal.error.reason != _REFUSED:
                raise
            return str(refusal)
        return ""

    def _upsert(self, layer: int, entries: Entries) -> pb.UpsertRequest:
        return pb.UpsertRequest(
            memory=self._record.name,
            layer=layer,
            entries=codec.encode_entries(entries, self._record.settings.kind),
            durability=pb.DURABILITY_PROCESS,
            model_digest=self._record.fingerprint.digest(),
        )


def _record(memory: routing_pb.MemoryDescription) -> MemoryRecord:
    return MemoryRecord(
        memory.name,
        codec.decode_fingerprint(memory.fingerprint),
        codec.decode_settings(memory.settings),
        memory.created_unix_ms,
    )

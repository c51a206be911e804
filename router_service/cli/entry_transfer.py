"""Entries from a file into a memory and back, batch by batch."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1 import routing_pb2 as routing_pb
from knnmoe.v1 import types_pb2 as types_pb

from router_service.cli.admin_client import AdminClient
from router_service.cli.entry_files import EntryBatch, EntryShape, FileError, format_of, open_writer
from router_service.cli.entry_files.batches import EntryReader, EntryWriter, regroup
from router_service.cli.errors import BadInput, ServiceRefused
from router_service.cli.file_description import FileDescription, metadata_for
from router_service.memories.settings import Kind
from router_service.rpc import codec

_ROW_OF_FIELD = re.compile(r"entries\.[a-z_.]+\[(\d+)\]")
_KINDS = {
    types_pb.MEMORY_KIND_ASSIGNMENT: Kind.ASSIGNMENT,
    types_pb.MEMORY_KIND_LOGIT_DELTA: Kind.LOGIT_DELTA,
}


def shape_of(memory: routing_pb.MemoryDescription | FileDescription) -> EntryShape:
    """What the entries of a memory look like."""
    model = memory.fingerprint
    kind = _KINDS[memory.settings.kind]
    return EntryShape(kind, model.hidden_size, model.num_experts, model.top_k)


class Upload:
    """Writes the entries of one file; `written` counts the acknowledged ones by layer."""

    def __init__(
        self,
        client: AdminClient,
        memory: routing_pb.MemoryDescription,
        reader: EntryReader,
        fsync: bool,
    ) -> None:
        self.written: Counter[int] = Counter()
        self._client, self._memory, self._reader = client, memory, reader
        self._durability = pb.DURABILITY_FSYNC if fsync else pb.DURABILITY_PROCESS
        self._shape = shape_of(memory)
        self._unacknowledged: deque[EntryBatch] = deque()
        self._seen: dict[int, set[int]] = {}

    def run(self, layer: int | None, advance: Callable[[int], None]) -> None:
        """Sends every entry (of one layer, when given). Raises AdminError that names the file and the row."""
        batches = (b for b in self._reader.batches() if layer is None or b.layer == layer)
        try:
            for _ in self._client.upsert(self._requests(batches)):
                batch = self._unacknowledged.popleft()
                self.written[batch.layer] += len(batch)
                advance(len(batch))
        except FileError as error:
            raise BadInput(f"{error}{self._so_far()}") from error
        except ServiceRefused as error:
            raise self._refusal(error) from error

    def _requests(self, batches: Iterable[EntryBatch]) -> Iterator[pb.UpsertRequest]:
        for number, batch in enumerate(regroup(batches, self._shape.batch_entries)):
            self._check_ids(batch)
            self._unacknowledged.append(batch)
            yield pb.UpsertRequest(
                memory=self._memory.name,
                layer=batch.layer,
                entries=codec.encode_entries(batch.entries, self._shape.kind),
                durability=self._durability,
                request_id=number,
                model_digest=self._memory.model_digest,
            )

    def _check_ids(self, batch: EntryBatch) -> None:
        seen = self._seen.setdefault(batch.layer, set())
        for row, entry in zip(batch.rows, batch.entries.ids.tolist(), strict=True):
            if entry in seen:
                place = self._reader.place(batch.layer, row)
                raise FileError(
                    self._reader.path, place, f"id: {entry} is there twice in layer {batch.layer}"
                )
            seen.add(entry)

    def _refusal(self, error: ServiceRefused) -> BadInput | ServiceRefused:
        """The service's answer to the oldest batch on its way, with the row that it is about."""
        found = _ROW_OF_FIELD.match(error.error.metadata.get("field", ""))
        if not found or not self._unacknowledged:
            return ServiceRefused(f"{error}{self._so_far()}", error.error)
        batch = self._unacknowledged[0]
        place = self._reader.place(batch.layer, batch.rows[int(found[1])])
        return BadInput(f"{self._reader.path}: {place}: {error}{self._so_far()}")

    def _so_far(self) -> str:
        return (
            f" ({self.written.total()} entries were acknowledged before; writing them again replaces them)"
            if self.written
            else ""
        )


def download(
    client: AdminClient,
    memory: routing_pb.MemoryDescription,
    layers: Sequence[int],
    file: Path,
    advance: Callable[[int], None],
) -> dict[int, int]:
    """Writes the entries of layers to a new file, which appears when it is whole. Returns the counts by layer."""
    partial = file.with_name(file.name + ".partial")
    try:
        writer = open_writer(partial, shape_of(memory), format_of(file), metadata_for(memory))
        with closing(writer):
            counts = {n: _download_layer(client, memory, n, writer, advance) for n in layers}
            writer.finish()
        partial.replace(file)
    except FileError as error:
        raise BadInput(str(error)) from error
    except OSError as error:
        raise BadInput(f"{file}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return counts


def _download_layer(
    client: AdminClient,
    memory: routing_pb.MemoryDescription,
    layer: int,
    writer: EntryWriter,
    advance: Callable[[int], None],
) -> int:
    count = 0
    request = pb.ExportRequest(memory=memory.name, layer=layer)
    for reply in client.replies(client.admin.Export(request)):
        entries = codec.decode_entries(reply.entries, shape_of(memory).kind)
        writer.write(layer, entries)
        count += len(entries)
        advance(len(entries))
    return count

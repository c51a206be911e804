"""Entries of one memory into another, layer by layer, in the order of ids: nothing is held but a few batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from knnmoe import tensors
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1 import routing_pb2 as routing_pb

from router_service.arrays import U64, Bool, Entries
from router_service.cli.admin_client import AdminClient
from router_service.cli.entry_transfer import shape_of
from router_service.cli.errors import ServiceRefused
from router_service.rpc import codec


class Conflict(StrEnum):
    """Which entry stays when both memories have its id."""

    KEEP = "keep"
    REPLACE = "replace"
    NEWER = "newer"


@dataclass(slots=True)
class MergeCounts:
    """What became of the entries of one layer of FROM."""

    added: int = 0
    replaced: int = 0
    kept: int = 0

    def add(self, other: MergeCounts) -> None:
        """Sums."""
        self.added += other.added
        self.replaced += other.replaced
        self.kept += other.kept

    @property
    def total(self) -> int:
        """Entries that were looked at."""
        return self.added + self.replaced + self.kept


@dataclass(frozen=True, slots=True)
class Side:
    """A memory and the service that holds it."""

    client: AdminClient
    memory: routing_pb.MemoryDescription


@dataclass(slots=True)
class Merge:
    """Writes the entries of `source` into `target`; `counts` has what was acknowledged, by layer."""

    source: Side
    target: Side
    on_conflict: Conflict
    fsync: bool
    counts: dict[int, MergeCounts] = field(default_factory=dict)
    _waiting: deque[tuple[int, MergeCounts]] = field(default_factory=deque)

    def run(self, advance: Callable[[int], None]) -> None:
        """Raises AdminError; what was acknowledged stays, and merging again goes on."""
        try:
            for _ in self.target.client.upsert(self._requests(advance)):
                self._count(*self._waiting.popleft(), advance)
        except ServiceRefused as error:
            raise ServiceRefused(
                f"{error} (merging again goes on where this ended)", error.error
            ) from error

    def _requests(self, advance: Callable[[int], None]) -> Iterator[pb.UpsertRequest]:
        for layer in (item.layer for item in self.source.memory.layers if item.entries):
            present = _Present(self.target, layer)
            with closing(present), closing(self._batches(layer)) as batches:
                for batch in batches:
                    chosen, counts = self._chosen(batch, present.created(batch.ids))
                    if chosen.any():
                        self._waiting.append((layer, counts))
                        yield self._request(layer, _rows(batch, chosen))
                    else:
                        self._count(layer, counts, advance)

    def _batches(self, layer: int) -> Generator[Entries, None, None]:
        memory = self.source.memory
        call = self.source.client.admin.Export(pb.ExportRequest(memory=memory.name, layer=layer))
        kind = shape_of(memory).kind
        with closing(self.source.client.replies(call)) as replies:
            for reply in replies:
                yield codec.decode_entries(reply.entries, kind)

    def _chosen(self, batch: Entries, created: dict[int, int]) -> tuple[Bool, MergeCounts]:
        """Which rows to write, and what that makes of the batch."""
        there = np.array([entry in created for entry in batch.ids.tolist()], dtype=bool)
        replaced = there & np.array(
            [
                self._wins(origin.created_unix_ms, created.get(entry, 0))
                for entry, origin in zip(batch.ids.tolist(), batch.provenance, strict=True)
            ],
            dtype=bool,
        )
        added = int((~there).sum())
        kept = int((there & ~replaced).sum())
        return ~there | replaced, MergeCounts(added, int(replaced.sum()), kept)

    def _wins(self, ours_ms: int, theirs_ms: int) -> bool:
        if self.on_conflict is Conflict.NEWER:
            return ours_ms > theirs_ms
        return self.on_conflict is Conflict.REPLACE

    def _request(self, layer: int, entries: Entries) -> pb.UpsertRequest:
        memory = self.target.memory
        return pb.UpsertRequest(
            memory=memory.name,
            layer=layer,
            entries=codec.encode_entries(entries, shape_of(memory).kind),
            durability=pb.DURABILITY_FSYNC if self.fsync else pb.DURABILITY_PROCESS,
            model_digest=memory.model_digest,
        )

    def _count(self, layer: int, counts: MergeCounts, advance: Callable[[int], None]) -> None:
        self.counts.setdefault(layer, MergeCounts()).add(counts)
        advance(counts.total)


class _Present:
    """When the entries of a layer were made, asked for by rising ids: one pass over the layer, without its keys."""

    def __init__(self, side: Side, layer: int) -> None:
        self._side, self._layer = side, layer
        request = pb.ExportRequest(memory=side.memory.name, layer=layer, without_keys=True)
        self._request = request
        self._replies: Generator[pb.ExportResponse, None, None] | None = None
        self._page: dict[int, int] = {}

    def created(self, ids: U64) -> dict[int, int]:
        """Milliseconds since the epoch by id, of those of the rising ids [n] that the layer has."""
        request = pb.CountRequest(
            memory=self._side.memory.name, layer=self._layer, ids=tensors.to_tensor(ids)
        )
        expected = self._side.client.unary(self._side.client.admin.Count, request).total
        wanted, found = set(ids.tolist()), dict[int, int]()
        while len(found) < expected:
            found |= {entry: ms for entry, ms in self._page.items() if entry in wanted}
            if max(self._page, default=-1) >= int(ids[-1]) or not self._next_page():
                break
        return found

    def close(self) -> None:
        """Ends the pass."""
        if self._replies is not None:
            self._replies.close()

    def _next_page(self) -> bool:
        if self._replies is None:
            client = self._side.client
            self._replies = client.replies(client.admin.Export(self._request))
        reply = next(self._replies, None)
        if reply is None:
            return False
        ids = codec.decode_ids("entries.ids", reply.entries.ids).tolist()
        made = (origin.created_unix_ms for origin in reply.entries.provenance)
        self._page = dict(zip(ids, made, strict=True))
        return True


def _rows(entries: Entries, chosen: Bool) -> Entries:
    if chosen.all():
        return entries
    rows = np.flatnonzero(chosen).tolist()
    return Entries(
        entries.ids[rows],
        entries.keys[rows],
        entries.values[rows],
        [entries.provenance[row] for row in rows],
    )

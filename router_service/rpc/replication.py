"""Handlers of copies of memories that are kept in step beside the models."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import grpc
import numpy as np
from knnmoe import tensors
from knnmoe.v1 import replication_pb2 as pb
from knnmoe.v1 import replication_pb2_grpc
from knnmoe.v1 import routing_pb2 as routing_pb
from knnmoe.v1 import types_pb2 as types_pb

from router_service import __version__, checks
from router_service.arrays import F32, U64, HitCounts, Provenance, require_ascending
from router_service.errors import (
    Cancelled,
    InvalidField,
    InvalidTensor,
    Overloaded,
    ReplicaBehind,
    RoutingServiceError,
    ShuttingDown,
)
from router_service.memories.changes import Position
from router_service.memories.foreign_writes import ForeignWrites
from router_service.memories.layer import LayerMemory
from router_service.memories.memory import RoutingMemory
from router_service.memories.replication import Deleted, Event, Feed, Held, Synced, Upserted
from router_service.memories.settings import Kind
from router_service.rpc import codec
from router_service.rpc.routing import Memories

# Copies that are kept in step at a time: each has a thread.
MOST_COPIES = 64
# How long those that end by themselves may take when the service stops; those whose client does not read are cut off.
_END_S = 0.5
# Of one message of entries: what reads and packs a larger one keeps lookups waiting, 1 MiB twice as long, and smaller
# ones copy no faster (benchmarks/README.md). And entries in it: the names of examples may be long.
_MESSAGE_BYTES, _MOST_ENTRIES = 1 << 18, 4096
_DEFAULT_HEARTBEAT_MS, _LEAST_HEARTBEAT_MS, _MOST_HEARTBEAT_MS = 1000, 20, 60_000
_KEY_BYTES = {
    types_pb.DTYPE_F32: 4,
    types_pb.DTYPE_F16: 2,
    types_pb.DTYPE_BF16: 2,
    types_pb.DTYPE_I8: 1,
}
# The most that a client can have counted.
_MOST_COUNTED = 1 << 40
# Sums of as many lambdas, which are 1 at most but for rounding.
_ROUNDED = 1.001
_IDS_PER_LOOK = 512


class ServedMemories(Memories, Protocol):
    """Where copies find memories."""

    def serves(self, memory: RoutingMemory) -> bool:
        """Whether it has its name still."""
        ...


class ReplicationService(replication_pb2_grpc.ReplicationServiceServicer):
    """Replicate, ReportHits."""

    def __init__(self, memories: ServedMemories) -> None:
        self._memories = memories
        self._copies = _Copies()
        self._reporting = threading.Lock()
        self._foreign: WeakKeyDictionary[RoutingMemory, ForeignWrites] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Ends every copy, soon, and refuses new ones."""
        self._copies.stop()

    def copies(self) -> list[Copy]:
        """Those that are kept in step now."""
        return self._copies.all()

    def Replicate(  # noqa: N802
        self, request: pb.ReplicateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ReplicateResponse]:
        """All entries, or what differs, and then every change."""
        memory = self._memories.get(request.memory)
        if request.HasField("fingerprint"):
            client = codec.decode_fingerprint(request.fingerprint)
            memory.record.fingerprint.require_same(client, memory.record.name)
        wanted = _decode_wanted(request, memory)
        foreign = self._foreign_writes_of(memory)

        def why_over() -> RoutingServiceError | None:
            if not self._memories.serves(memory):
                return self._not_served(request.memory)
            return foreign.problem or self._copies.why_over(context)

        with self._copies.one(memory, context) as copy, foreign.followed() as late_ms:
            feed = Feed(memory, wanted.layers, wanted.page_entries, wanted.heartbeat_s, why_over)
            entries = feed.go_on(wanted.after) if wanted.after else feed.copy(wanted.held)
            start = pb.ReplicaStart(
                memory=codec.encode_memory(memory),
                service_version=__version__,
                entries=entries,
                foreign_writes_after_ms=late_ms,
            )
            yield pb.ReplicateResponse(start=start)
            for event in feed.events():
                yield _encode_event(event, memory.record.settings.kind, request.key_dtype)
                if isinstance(event, Synced):  # the client has taken it
                    copy.version, copy.synced = event.position.version, time.monotonic()

    def ReportHits(  # noqa: N802
        self, request: pb.ReportHitsRequest, context: grpc.ServicerContext
    ) -> pb.ReportHitsResponse:
        """Counts what lookups in a copy found."""
        checks.require_text("client", request.client)
        if not request.client:
            raise InvalidField("client", "nothing", "the client's name for itself, unique")

        def report(memory: RoutingMemory) -> None:
            memory.record.fingerprint.require_digest(request.model_digest)
            counted = [_decode_hits(memory, n, hits) for n, hits in enumerate(request.layers)]
            with self._reporting:
                self._count(request, counted)

        self._memories.asked(request.memory, report)
        return pb.ReportHitsResponse()

    def _count(self, request: pb.ReportHitsRequest, counted: Sequence[_Counted]) -> None:
        """Once, however often it comes, as long as the client is among the last that reported."""
        of_client = request.client, request.number
        layers = {each.layer for each in counted}
        known = {layer for layer in layers if layer.hits.has_report(*of_client)}
        for each in counted:
            if each.layer not in known:
                each.layer.hits.add_report(*of_client, each.hits)
                each.layer.counters.add_found(
                    *(each.message.lookups, each.message.tokens),
                    *(each.message.tokens_abstained, each.message.lambda_sum),
                )

    def _not_served(self, name: str) -> RoutingServiceError:
        """Why a memory does not serve under its name. Called under the lock of its changes: looks nowhere."""
        return ReplicaBehind(f"memory {name!r} was deleted, replaced or restored")

    def _foreign_writes_of(self, memory: RoutingMemory) -> ForeignWrites:
        with self._lock:
            if memory not in self._foreign:
                self._foreign[memory] = ForeignWrites(memory)
            return self._foreign[memory]


@dataclass(eq=False, slots=True)
class Copy:
    """A copy that is kept in step."""

    memory: RoutingMemory
    began: float = field(default_factory=time.monotonic)
    version: int = 0  # that it was last brought to
    synced: float | None = None  # when that was, or when it was last heard that nothing had changed

    @property
    def staleness_s(self) -> float:
        """What it has was the memory so many seconds ago; before it has all, how long it has been being made."""
        return time.monotonic() - (self.began if self.synced is None else self.synced)


class _Copies:
    """Those that are kept in step."""

    def __init__(self) -> None:
        self._of: dict[grpc.ServicerContext, Copy] = {}
        self._stopping = False
        self._changed = threading.Condition()

    @contextmanager
    def one(self, memory: RoutingMemory, context: grpc.ServicerContext) -> Iterator[Copy]:
        """Raises Overloaded, ShuttingDown."""
        copy = Copy(memory)
        with self._changed:
            if self._stopping:
                raise _shutting_down()
            if len(self._of) >= MOST_COPIES:
                raise Overloaded(f"{MOST_COPIES} copies are kept in step already; end one of them")
            self._of[context] = copy
        context.add_callback(memory.changes.wake)  # when the client has left
        try:
            yield copy
        finally:
            with self._changed:
                del self._of[context]
                self._changed.notify_all()

    def all(self) -> list[Copy]:
        """At this moment."""
        with self._changed:
            return list(self._of.values())

    def why_over(self, context: grpc.ServicerContext) -> RoutingServiceError | None:
        """None while it goes on."""
        if self._stopping:
            return _shutting_down()
        return None if context.is_active() else Cancelled("the client has left")

    def stop(self) -> None:
        """Ends them all, and refuses new ones."""
        with self._changed:
            self._stopping = True
            waiting = list(self._of.values())
        for copy in waiting:
            copy.memory.changes.wake()
        with self._changed:
            self._changed.wait_for(lambda: not self._of, _END_S)
            for context in self._of:
                context.cancel()


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("the service is shutting down; go on when it is back, or on another")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a ReplicateRequest asks."""

    layers: list[LayerMemory]
    page_entries: int
    heartbeat_s: float
    after: Position | None
    held: dict[int, Held]


def _decode_wanted(request: pb.ReplicateRequest, memory: RoutingMemory) -> _Wanted:
    layers = memory.chosen_layers(request.layers)
    if request.HasField("after") and request.held:
        raise InvalidField("held", f"{len(request.held)} layers beside after", "after, or held")
    number = request.key_dtype or types_pb.DTYPE_F32
    if number not in _KEY_BYTES:
        allowed = ", ".join(tensors.dtype_name(each) for each in _KEY_BYTES)
        raise InvalidField("key_dtype", tensors.dtype_name(number), f"one of {allowed}")
    heartbeat_ms = request.heartbeat_ms or _DEFAULT_HEARTBEAT_MS
    if not _LEAST_HEARTBEAT_MS <= heartbeat_ms <= _MOST_HEARTBEAT_MS:
        expected = f"0, or {_LEAST_HEARTBEAT_MS} to {_MOST_HEARTBEAT_MS} ms"
        raise InvalidField("heartbeat_ms", heartbeat_ms, expected)
    record = memory.record
    entry_bytes = record.fingerprint.hidden_size * _KEY_BYTES[number] + 4 * record.value_width + 32
    after = Position(request.after.epoch, request.after.version)
    return _Wanted(
        layers,
        min(max(1, _MESSAGE_BYTES // entry_bytes), _MOST_ENTRIES),
        heartbeat_ms / 1000,
        after if request.HasField("after") else None,
        _decode_held(request.held, {layer.layer for layer in layers}),
    )


def _decode_held(messages: Sequence[pb.HeldEntries], layers: set[int]) -> dict[int, Held]:
    held: dict[int, Held] = {}
    for number, message in enumerate(messages):
        field = f"held[{number}]"
        if message.layer not in layers or message.layer in held:
            raise InvalidField(f"{field}.layer", message.layer, "each of the wanted layers once")
        ids = codec.decode_ids(f"{field}.ids", message.ids)
        digests = codec.decode_ids(f"{field}.digests", message.digests)
        require_ascending(f"{field}.ids", ids, len(ids))
        if len(digests) != len(ids):
            raise InvalidTensor(f"{field}.digests", f"{len(digests)}", f"{len(ids)}, as ids")
        held[message.layer] = Held(ids, digests)
    return held


def _encode_event(event: Event, kind: Kind, dtype: int) -> pb.ReplicateResponse:
    match event:
        case Upserted():
            return pb.ReplicateResponse(upserted=_encode_entries(event, kind, dtype))
        case Deleted(layer, ids):
            deleted = pb.ReplicaDeletion(layer=layer, ids=tensors.to_tensor(ids))
            return pb.ReplicateResponse(deleted=deleted)
        case Synced(position):
            where = pb.ReplicaPosition(epoch=position.epoch, version=position.version)
            return pb.ReplicateResponse(synced=pb.ReplicaSynced(position=where))
        case _:
            return pb.ReplicateResponse(settings=codec.encode_settings(event))


def _encode_entries(event: Upserted, kind: Kind, dtype: int) -> pb.ReplicaEntries:
    entries = event.entries
    examples, numbers = _examples_of(entries.provenance)
    keys, scales = encode_keys(event.layer, entries.ids, entries.keys, dtype)
    return pb.ReplicaEntries(
        layer=event.layer,
        ids=tensors.to_tensor(entries.ids),
        keys=keys,
        scales=scales,
        digests=tensors.to_tensor(event.digests),
        examples=examples,
        example_numbers=tensors.to_tensor(numbers),
        **codec.encode_values(entries.values, kind),
    )


def encode_keys(
    layer: int, ids: U64, keys: F32, dtype: int
) -> tuple[types_pb.Tensor, types_pb.Tensor | None]:
    """Keys [n, d] of entries in a dtype, with a scale per key [n] for DTYPE_I8.

    Raises InvalidField when one has numbers that f16 does not.
    """
    if dtype == types_pb.DTYPE_BF16:
        return tensors.to_tensor(keys, bf16=True), None
    if dtype == types_pb.DTYPE_F16:
        with np.errstate(over="ignore"):
            half = keys.astype(np.float16)
        rows = np.flatnonzero(np.isinf(half).any(axis=1))
        if len(rows):
            largest = float(np.abs(keys[rows[0]]).max())
            raise InvalidField(
                "key_dtype",
                f"f16, and {largest:.6g} in the key of entry {ids[rows[0]]} of layer {layer}",
                f"f32, bf16 or i8: f16 ends at {np.finfo(np.float16).max:.0f}",
            )
        return tensors.to_tensor(half), None
    if dtype == types_pb.DTYPE_I8:
        largest_of = np.abs(keys).max(axis=1, initial=0.0)
        scales = (largest_of / np.float32(127)).astype(np.float32)
        divisors = np.where(scales > 0, scales, np.float32(1))
        numbers = np.clip(np.rint(keys / divisors[:, None]), -127, 127).astype(np.int8)
        return tensors.to_tensor(numbers), tensors.to_tensor(scales)
    return tensors.to_tensor(keys), None


def _examples_of(
    provenance: Sequence[Provenance],
) -> tuple[list[routing_pb.ExampleRef], tensors.Array]:
    """The examples of entries, each once, and for each entry the number of its example i32 [n]."""
    numbers: dict[tuple[str, str], int] = {}
    of_entry = [numbers.setdefault((p.source, p.example), len(numbers)) for p in provenance]
    examples = [routing_pb.ExampleRef(source=s, example=e) for s, e in numbers]
    return examples, np.array(of_entry, np.int32)


@dataclass(frozen=True, slots=True)
class _Counted:
    """What a report says of a layer, without the ids that are gone."""

    layer: LayerMemory
    hits: HitCounts
    message: pb.LayerHits


def _decode_hits(memory: RoutingMemory, number: int, message: pb.LayerHits) -> _Counted:
    field, layer = f"layers[{number}]", memory.layer(message.layer)
    ids = codec.decode_ids(f"{field}.ids", message.ids)
    hits = codec.decode_ids(f"{field}.hits", message.hits)
    checks.require_ids(f"{field}.ids", ids)
    if len(hits) != len(ids):
        raise InvalidTensor(f"{field}.hits", f"{len(hits)} hits", f"{len(ids)}, as ids")
    counts = {
        "hits": int(hits.max(initial=0)),
        "lookups": message.lookups,
        "tokens": message.tokens,
        "tokens_abstained": message.tokens_abstained,
    }
    for name, count in counts.items():
        if count > _MOST_COUNTED:
            raise InvalidField(f"{field}.{name}", count, f"at most {_MOST_COUNTED}")
    if message.tokens_abstained > message.tokens:
        expected = f"at most {message.tokens}, as tokens"
        raise InvalidField(f"{field}.tokens_abstained", message.tokens_abstained, expected)
    if not 0 <= message.lambda_sum <= _ROUNDED * message.tokens:  # NaN is not
        expected = f"0 to {message.tokens}, as tokens"
        raise InvalidField(f"{field}.lambda_sum", message.lambda_sum, expected)
    there = [_there(layer, ids[n : n + _IDS_PER_LOOK]) for n in range(0, len(ids), _IDS_PER_LOOK)]
    kept = np.isin(ids, np.concatenate([np.empty(0, np.uint64), *there]))
    ids, hits = ids[kept], hits[kept]
    order = np.argsort(ids)
    return _Counted(layer, HitCounts(ids[order], hits[order].astype(np.int64)), message)


def _there(layer: LayerMemory, ids: U64) -> U64:
    found = layer.provenance_of(ids)
    return np.fromiter(found.keys(), np.uint64, len(found))

"""Messages that nobody sends: valid requests of every method with fields changed, and their bytes damaged."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from grpc_health.v1 import health_pb2
from knnmoe import tensors
from knnmoe.v1 import (
    doctor_pb2,
    memory_admin_pb2,
    operations_pb2,
    quantization_pb2,
    replication_pb2,
    retention_pb2,
    routing_pb2,
    snapshots_pb2,
)

from tests.sidecar import (
    EXPERTS,
    LOGIT_DELTA,
    floats,
    make_fingerprint,
    random_entries,
    random_keys,
    route_request,
)

FILES = (
    doctor_pb2,
    memory_admin_pb2,
    operations_pb2,
    quantization_pb2,
    replication_pb2,
    retention_pb2,
    routing_pb2,
    snapshots_pb2,
)
METHODS: list[MethodDescriptor] = [
    method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
HEALTH: list[MethodDescriptor] = list(health_pb2.DESCRIPTOR.services_by_name["Health"].methods)
# Of a memory that valid() asks to be verified and restored.
SNAPSHOT = "nightly"
_REPLICATE, _WATCH = "/Replicate", "/Watch"
_OF_SNAPSHOTS = (
    snapshots_pb2.CreateSnapshotRequest,
    snapshots_pb2.PackSnapshotRequest,
    snapshots_pb2.DeleteSnapshotRequest,
)
INTEGERS = [0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -1]
NUMBERS = [0.0, -1.0, 1e-45, 1e300, -1e38, float("inf"), float("-inf"), float("nan")]
TEXTS = ["", "a", "x" * 4000, "a/../b", "\0", "~", "é" * 100, "%s{0}", "layer-000"]
LIMITS = {
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
}


def path_of(method: MethodDescriptor) -> str:
    """E.g. `/knnmoe.v1.RoutingService/Route`."""
    return f"/{method.containing_service.full_name}/{method.name}"


def request_class(method: MethodDescriptor) -> Any:
    """Of its requests."""
    return message_factory.GetMessageClass(method.input_type)


def read_enough(path: str, answers: Any) -> int:
    """How many answers there were; of streams that go on for ever what comes until there is no more for now."""
    count = 0
    for answer in answers:
        count += 1
        if path.endswith(_REPLICATE):
            known = replication_pb2.ReplicateResponse.FromString(answer).HasField("synced")
        else:
            known = path.endswith(_WATCH)
        if known:
            answers.cancel()
            break
    return count


def valid(kind: Any, memory: str, digest: str, rng: Any, operation: str = "") -> Any:
    """A request that can be answered; fields of one name mean the same in every message, and are set where they are.

    `operation`: the id of one, for requests about operations.
    """
    if kind is routing_pb2.RouteRequest:
        return route_request(memory, digest, random_keys(rng, 2), random_keys(rng, 2, EXPERTS))
    request, fields = kind(), kind.DESCRIPTOR.fields_by_name
    entries = random_entries(LOGIT_DELTA, 4)
    known = {
        "memory": memory,
        "by": f"{memory}-other",
        "model_digest": digest,
        "lambda0": 0.5,
        "quantization": "int8",
        "compression": "int8",
        "sample": 4,
        "name": SNAPSHOT if kind in _OF_SNAPSHOTS else f"{memory}-new",
        "as_memory": f"{memory}-restored",
        "id": operation,
        "client": f"{memory}-client",
        "number": 1,
        "heartbeat_ms": 20,
        "key_dtype": 0,
    }
    for name in fields.keys() & known.keys():
        if fields[name].type == FieldDescriptor.TYPE_STRING or not isinstance(known[name], str):
            setattr(request, name, known[name])
    fill_in: dict[str, Callable[[], object]] = {
        "fingerprint": lambda: request.fingerprint.CopyFrom(make_fingerprint()),
        "settings": lambda: request.settings.gamma.append(0.5),
        "entries": lambda: request.entries.CopyFrom(entries),
        "ids": lambda: request.ids.CopyFrom(entries.ids),
        "inputs": lambda: request.inputs.add(router_inputs=floats(random_keys(rng, 4))),
        "plan": lambda: setattr(request.plan, "older_than_unix_ms", 1),
        "snapshot": lambda: request.snapshot.MergeFrom(_snapshot_of(memory)),
    }
    if kind is replication_pb2.ReplicateRequest:
        ids = tensors.to_tensor(np.sort(tensors.to_array(entries.ids)))
        fill_in["held"] = lambda: request.held.add(ids=ids, digests=entries.ids)
    if kind is replication_pb2.ReportHitsRequest:
        counted = tensors.to_tensor(np.ones(4, np.uint64))
        fill_in["layers"] = lambda: request.layers.add(
            ids=entries.ids, hits=counted, lookups=1, tokens=2, lambda_sum=0.5
        )
    if kind is memory_admin_pb2.ExplainEntryRequest:
        request.id = int(tensors.to_array(entries.ids)[0])
    for name in fields.keys() & fill_in.keys():
        fill_in[name]()
    return request


def _snapshot_of(memory: str) -> snapshots_pb2.SnapshotRef:
    return snapshots_pb2.SnapshotRef(name=SNAPSHOT, memory=memory)


def leaves(message: Any) -> Iterator[tuple[Any, FieldDescriptor | None]]:
    """Every field of a message, and of the messages in it that are set."""
    for field in message.DESCRIPTOR.fields:
        yield message, field
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        if field.is_repeated:
            for each in getattr(message, field.name):
                yield from leaves(each)
        elif message.HasField(field.name):
            yield from leaves(getattr(message, field.name))


def change(message: Any, field: FieldDescriptor, random_: random.Random) -> None:
    """Sets a field to what few would send."""
    if random_.random() < 0.15:
        message.ClearField(field.name)
        return
    if field.message_type is not None:
        if not field.is_repeated:
            getattr(message, field.name).SetInParent()
        elif not field.message_type.GetOptions().map_entry:
            getattr(message, field.name).add()
        return
    value: Any
    if field.type == FieldDescriptor.TYPE_STRING:
        value = random_.choice(TEXTS)
    elif field.type == FieldDescriptor.TYPE_BYTES:
        value = random_.randbytes(random_.choice([0, 1, 7, 64]))
    elif field.cpp_type in LIMITS:
        least, most = LIMITS[field.cpp_type]
        value = random_.choice([n for n in INTEGERS if least <= n <= most])
    elif field.type == FieldDescriptor.TYPE_BOOL:
        value = random_.random() < 0.5
    else:
        value = random_.choice(NUMBERS)
    if field.is_repeated:
        getattr(message, field.name).extend([value] * random_.choice([1, 2, 300]))
    else:
        setattr(message, field.name, value)


def mutate(request: Any, random_: random.Random) -> None:
    """Changes a field or two, also of the messages in it."""
    for _ in range(random_.choice([1, 1, 2])):
        holder, field = random_.choice(list(leaves(request)) or [(request, None)])
        if field is not None:
            change(holder, field, random_)


# Bytes.

# How a message is spoilt, and how often of a hundred.
FORMS = {
    "valid": 6,
    "fields": 46,
    "truncated": 8,
    "flipped": 14,
    "garbage": 6,
    "wrong type": 6,
    "surrogate": 5,
    "nested": 3,
    "spliced": 4,
    "large": 2,
}
# The bytes of half a character (U+D800), which no string may have, and as many of a character that may be there.
_HALF, _PLACEHOLDER = b"\xed\xa0\x80", "\u1234"
LARGE_BYTES, DEEPEST = 8 << 20, 20_000
_LENGTH, _BEGIN_GROUP, _END_GROUP, _WIRE_TYPES = 2, 3, 4, 8


def spoilt(request: Any, form: str, random_: random.Random) -> bytes:
    """The bytes of a valid request in one of FORMS; the request is changed."""
    spoil: Callable[[Any, random.Random], bytes] = {
        "valid": lambda request, _: bytes(request.SerializeToString()),
        "fields": _with_fields,
        "truncated": _truncated,
        "flipped": _flipped,
        "garbage": lambda _, random_: random_.randbytes(random_.choice([1, 2, 9, 64, 1000])),
        "wrong type": _wrong_type,
        "surrogate": _surrogate,
        "nested": _nested,
        "spliced": _spliced,
        "large": _large,
    }[form]
    return spoil(request, random_)


def _with_fields(request: Any, random_: random.Random) -> bytes:
    mutate(request, random_)
    return bytes(request.SerializeToString())


def _truncated(request: Any, random_: random.Random) -> bytes:
    data = bytes(request.SerializeToString())
    return data[: random_.randrange(len(data) + 1)]


def _flipped(request: Any, random_: random.Random) -> bytes:
    data = bytearray(request.SerializeToString())
    for _ in range(random_.choice([1, 1, 2, 8]) if data else 0):
        data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
    return bytes(data)


def _wrong_type(request: Any, random_: random.Random) -> bytes:
    """A field as another wire type, of those that there are or not."""
    fields = request.DESCRIPTOR.fields
    number = random_.choice(fields).number if fields else 1
    tag = _varint(number << 3 | random_.randrange(_WIRE_TYPES))
    return bytes(request.SerializeToString()) + tag + random_.randbytes(random_.randrange(12))


def _surrogate(request: Any, random_: random.Random) -> bytes:
    texts = [
        (holder, field)
        for holder, field in leaves(request)
        if field is not None and field.type == FieldDescriptor.TYPE_STRING
    ]
    if not texts:
        return _delimited(1, _HALF)
    holder, field = random_.choice(texts)
    text = f"a{_PLACEHOLDER}b"
    if field.is_repeated:
        getattr(holder, field.name).append(text)
    else:
        setattr(holder, field.name, text)
    return bytes(request.SerializeToString()).replace(_PLACEHOLDER.encode(), _HALF)


def _nested(request: Any, random_: random.Random) -> bytes:
    """Groups in groups, or messages in messages, in a field that may be one of the method's."""
    number, depth = random_.randrange(1, 16), random_.choice([2, 50, 101, 1000, DEEPEST])
    data = bytes(request.SerializeToString())
    if random_.random() < 0.5:
        closed = random_.choice([depth, depth - 1])
        begin, end = (_varint(number << 3 | wire) for wire in (_BEGIN_GROUP, _END_GROUP))
        return data + begin * depth + end * closed
    inner = b""
    for _ in range(min(depth, 1000)):
        inner = _delimited(number, inner)
    return data + inner


def _spliced(request: Any, random_: random.Random) -> bytes:
    """With the request of another method, or itself, before or behind it."""
    other = valid(request_class(random_.choice(METHODS)), "a", "b", np.random.default_rng(0))
    parts = [
        bytes(each.SerializeToString()) for each in (request, random_.choice([request, other]))
    ]
    random_.shuffle(parts)
    return b"".join(parts)


def _large(request: Any, random_: random.Random) -> bytes:
    """A field of megabytes, or with many elements."""
    fields = [(h, f) for h, f in leaves(request) if f is not None]
    if not fields or random_.random() < 0.2:
        return _delimited(random_.randrange(1, 40), bytes(LARGE_BYTES))
    holder, field = random_.choice(fields)
    if field.is_repeated and field.message_type is not None:
        if not field.message_type.GetOptions().map_entry:
            for _ in range(20_000):
                getattr(holder, field.name).add()
    elif field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        value: Any = "x" * (1 << 20)
        if field.type == FieldDescriptor.TYPE_BYTES:
            value = bytes(random_.choice([1 << 20, LARGE_BYTES]))
        if field.is_repeated:
            getattr(holder, field.name).append(value)
        else:
            setattr(holder, field.name, value)
    else:
        change(holder, field, random_)
    return bytes(request.SerializeToString())


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*made, number])


def _delimited(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | _LENGTH) + _varint(len(data)) + data

"""Valid requests of every method with a field or two changed to what nobody sends: answered or refused, no defect."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from knnmoe.client import service_error
from knnmoe.v1 import (
    doctor_pb2,
    memory_admin_pb2,
    operations_pb2,
    quantization_pb2,
    retention_pb2,
    routing_pb2,
    snapshots_pb2,
)

from tests.sidecar import (
    CALL_TIMEOUT_S,
    EXPERTS,
    LOGIT_DELTA,
    Sidecar,
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
PER_METHOD = int(os.environ.get("MUTATED_MESSAGES", "10"))
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


def valid(kind: Any, memory: str, digest: str, rng: Any) -> Any:
    """A request that can be answered; fields of one name mean the same in every message, and are set where they are."""
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
        "name": f"{memory}-new",
    }
    for name in fields.keys() & known.keys():
        if fields[name].type == FieldDescriptor.TYPE_STRING or name in ("lambda0", "sample"):
            setattr(request, name, known[name])
    fill_in: dict[str, Callable[[], object]] = {
        "fingerprint": lambda: request.fingerprint.CopyFrom(make_fingerprint()),
        "settings": lambda: request.settings.gamma.append(0.5),
        "entries": lambda: request.entries.CopyFrom(entries),
        "ids": lambda: request.ids.CopyFrom(entries.ids),
        "inputs": lambda: request.inputs.add(router_inputs=floats(random_keys(rng, 4))),
        "plan": lambda: setattr(request.plan, "older_than_unix_ms", 1),
        "snapshot": lambda: setattr(request.snapshot, "name", "nightly"),
    }
    for name in fields.keys() & fill_in.keys():
        fill_in[name]()
    return request


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


def answer(sidecar: Sidecar, method: MethodDescriptor, request: Any) -> grpc.StatusCode:
    """The status of a call with one message."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    call = sidecar.channel.stream_stream(path)
    try:
        list(call(iter([request.SerializeToString()]), timeout=CALL_TIMEOUT_S))
    except grpc.RpcError as error:
        failed = service_error(error)
        assert failed.code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), (
            f"{path}: {failed.message}\n{request!s:.2000}"
        )
        return failed.code
    return grpc.StatusCode.OK


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_no_message_is_a_defect(sidecar: Sidecar, method: MethodDescriptor, name: str) -> None:
    random_, rng = random.Random(f"{method.full_name} {PER_METHOD}"), np.random.default_rng(7)
    kind = message_factory.GetMessageClass(method.input_type)
    before = memories(sidecar)
    for _ in range(PER_METHOD):
        digest, _ = (digest_of(sidecar, each) for each in (name, f"{name}-other"))
        request = valid(kind, name, digest, rng)
        for _ in range(random_.choice([1, 1, 2])):
            holder, field = random_.choice(list(leaves(request)) or [(request, None)])
            if field is not None:
                change(holder, field, random_)
        answer(sidecar, method, request)
    for each in memories(sidecar) - before:
        sidecar.admin.DeleteMemory(memory_admin_pb2.DeleteMemoryRequest(memory=each))


def digest_of(sidecar: Sidecar, name: str) -> str:
    """Of a memory of 8 entries, which is made where a call has deleted it."""
    try:
        return sidecar.describe(name).model_digest
    except grpc.RpcError as error:
        if service_error(error).code is not grpc.StatusCode.NOT_FOUND:
            raise
    digest = sidecar.create(name, kind=LOGIT_DELTA, gamma=[0.05])
    sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, 8))
    return digest


def memories(sidecar: Sidecar) -> set[str]:
    reply = sidecar.admin.ListMemories(memory_admin_pb2.ListMemoriesRequest())
    return {memory.name for memory in reply.memories}


@pytest.mark.parametrize("number", [2**63, 2**64 - 1])
def test_a_time_beyond_what_engines_store(sidecar: Sidecar, name: str, number: int) -> None:
    digest = sidecar.create(name, kind=LOGIT_DELTA)
    entries = random_entries(LOGIT_DELTA, 3)
    entries.provenance[1].created_unix_ms = number
    request = memory_admin_pb2.UpsertRequest(memory=name, entries=entries, model_digest=digest)
    with pytest.raises(grpc.RpcError) as refused:
        list(sidecar.admin.Upsert(iter([request]), timeout=CALL_TIMEOUT_S))
    error = service_error(refused.value)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.metadata["field"] == "entries.provenance[1].created_unix_ms"
    assert str(number) in error.message

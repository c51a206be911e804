"""Valid requests of every method with a field or two changed to what nobody sends: answered or refused, no defect."""

from __future__ import annotations

import os
import random
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import MethodDescriptor
from knnmoe.client import service_error
from knnmoe.v1 import memory_admin_pb2

from tests.faults.messages import METHODS, mutate, path_of, read_enough, request_class, valid
from tests.sidecar import CALL_TIMEOUT_S, LOGIT_DELTA, Sidecar, random_entries

PER_METHOD = int(os.environ.get("MUTATED_MESSAGES", "10"))


def answer(sidecar: Sidecar, method: MethodDescriptor, request: Any) -> grpc.StatusCode:
    """The status of a call with one message."""
    path = path_of(method)
    call = sidecar.channel.stream_stream(path)
    try:
        read_enough(path, call(iter([request.SerializeToString()]), timeout=CALL_TIMEOUT_S))
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
    before = memories(sidecar)
    for _ in range(PER_METHOD):
        digest, _ = (digest_of(sidecar, each) for each in (name, f"{name}-other"))
        request = valid(request_class(method), name, digest, rng)
        mutate(request, random_)
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

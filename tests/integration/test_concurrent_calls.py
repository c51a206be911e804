"""Lookups, writes, settings, exports and deletions at the same time: every call is answered, or says why not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
from knnmoe import tensors
from knnmoe.client import ServiceError, service_error
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import types_pb2

from tests.sidecar import (
    CALL_TIMEOUT_S,
    EXPERTS,
    LOGIT_DELTA,
    Sidecar,
    exported,
    random_entries,
    random_keys,
    route_request,
)

ROUNDS = 25
ONE_LAYER = {"num_layers": 1}
# What a call may meet while the memory under it comes and goes.
GONE = {"ERROR_REASON_MEMORY_NOT_FOUND", "ERROR_REASON_BUSY"}


def _route(sidecar: Sidecar, memory: str, digest: str) -> None:
    rng = np.random.default_rng(0)
    inputs, own = random_keys(rng, 9), random_keys(rng, 9, EXPERTS)
    reply = sidecar.route(
        route_request(memory, digest, inputs, own, neighbours=4, with_neighbours=True)
    )
    assert np.isfinite(tensors.to_array(reply.lambdas)).all()


def _come_and_go(sidecar: Sidecar, memory: str) -> None:
    sidecar.create(memory, model=ONE_LAYER)
    sidecar.upsert(memory, 0, random_entries(LOGIT_DELTA, 10))
    sidecar.admin.DeleteMemory(admin_pb.DeleteMemoryRequest(memory=memory), timeout=CALL_TIMEOUT_S)


def _look_around(sidecar: Sidecar) -> None:
    sidecar.admin.ListMemories(admin_pb.ListMemoriesRequest(), timeout=CALL_TIMEOUT_S)
    sidecar.admin.Stats(admin_pb.StatsRequest(), timeout=CALL_TIMEOUT_S)


def _set(sidecar: Sidecar, memory: str) -> None:
    settings = types_pb2.MemorySettings(neighbours=3)
    request = admin_pb.UpdateSettingsRequest(memory=memory, settings=settings)
    sidecar.admin.UpdateSettings(request, timeout=CALL_TIMEOUT_S)


def test_calls_at_the_same_time(sidecar: Sidecar, name: str) -> None:
    digest = sidecar.create(name, model=ONE_LAYER, gamma=[0.05])
    brief = f"{name}-brief"
    batches = iter(range(1, 10_000))

    def write(memory: str) -> None:
        first = 40 * next(batches)
        sidecar.upsert(memory, 0, random_entries(LOGIT_DELTA, 40, seed=first, first_id=first))

    refused: list[ServiceError] = []
    jobs: list[Callable[[], Any]] = [
        lambda: _route(sidecar, name, digest),
        lambda: write(name),
        lambda: exported(sidecar, name, 0),
        lambda: _set(sidecar, name),
        lambda: _look_around(sidecar),
        lambda: _come_and_go(sidecar, brief),
        lambda: _route(sidecar, brief, digest),
        lambda: sidecar.upsert(brief, 0, random_entries(LOGIT_DELTA, 10)),
    ]
    threads = [threading.Thread(target=_repeat, args=(job, refused)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {error.reason for error in refused} <= GONE, refused
    assert sidecar.describe(name).layers[0].entries == 40 * ROUNDS


def _repeat(job: Callable[[], Any], refused: list[ServiceError]) -> None:
    for _ in range(ROUNDS):
        try:
            job()
        except grpc.RpcError as error:
            refused.append(service_error(error))

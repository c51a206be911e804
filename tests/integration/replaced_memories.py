"""Two memories of which one takes the place of the other, and lookups that show which of them answered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from knnmoe import tensors
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import routing_pb2 as routing_pb

from tests.sidecar import (
    CALL_TIMEOUT_S,
    EXPERTS,
    LAYERS,
    LOGIT_DELTA,
    Sidecar,
    exported,
    random_entries,
    random_keys,
    route_request,
)

OLD, NEW = 20, 30  # entries per layer


def fill(sidecar: Sidecar, name: str, entries: int, **settings: Any) -> None:
    """A memory with the same ids for the same number of entries, and other keys and values."""
    sidecar.create(name, kind=LOGIT_DELTA, **settings)
    for layer in range(LAYERS):
        rows = random_entries(LOGIT_DELTA, entries, seed=10 * entries + layer)
        sidecar.upsert(name, layer, rows)


def fill_both(sidecar: Sidecar, name: str, by: str) -> None:
    """The one that serves, and the rebuilt one; they are read in different ways."""
    fill(sidecar, name, OLD, gamma=[0.05], neighbours=4)
    fill(sidecar, by, NEW, gamma=[0.02], neighbours=7)


def request_of(sidecar: Sidecar, name: str, layer: int = 0) -> routing_pb.RouteRequest:
    """The same lookup whatever the name."""
    rng = np.random.default_rng(5)
    digest = sidecar.describe(name).model_digest
    logits = random_keys(rng, 3, EXPERTS)
    return route_request(name, digest, random_keys(rng, 3), logits, layer=layer)


def answer(reply: routing_pb.RouteResponse) -> bytes:
    """What a client makes use of."""
    return bytes(reply.router_logits.data) + bytes(reply.lambdas.data)


def answers(sidecar: Sidecar, name: str) -> list[bytes]:
    """Of every layer."""
    return [answer(sidecar.route(request_of(sidecar, name, layer))) for layer in range(LAYERS)]


def contents(sidecar: Sidecar, name: str) -> list[bytes]:
    """The keys of every layer."""
    layers = [exported(sidecar, name, layer) for layer in range(LAYERS)]
    return [b"".join(tensors.to_array(part.keys).tobytes() for part in parts) for parts in layers]


def replace(sidecar: Sidecar, name: str, by: str) -> admin_pb.ReplaceMemoryResponse:
    request = admin_pb.ReplaceMemoryRequest(memory=name, by=by)
    return sidecar.admin.ReplaceMemory(request, timeout=CALL_TIMEOUT_S)


def names(sidecar: Sidecar) -> list[str]:
    reply = sidecar.admin.ListMemories(admin_pb.ListMemoriesRequest(), timeout=CALL_TIMEOUT_S)
    return [memory.name for memory in reply.memories]


def stats(sidecar: Sidecar, name: str) -> list[tuple[int, int, int]]:
    """Entries, lookups and hits of each layer."""
    request = admin_pb.StatsRequest(memory=name)
    [memory] = sidecar.admin.Stats(request, timeout=CALL_TIMEOUT_S).memories
    return [(layer.entries, layer.route_requests, layer.hits) for layer in memory.layers]


@contextmanager
def asking(sidecar: Sidecar, name: str) -> Iterator[Callable[[], list[routing_pb.RouteResponse]]]:
    """Lookups of a memory without pause; what is yielded ends them and returns the replies. None may fail."""
    request, done = request_of(sidecar, name), threading.Event()
    replies: list[routing_pb.RouteResponse] = []
    failures: list[grpc.RpcError] = []

    def ask() -> None:
        try:
            while not done.wait(0.002):
                replies.append(sidecar.route(request))
        except grpc.RpcError as error:
            failures.append(error)

    thread = threading.Thread(target=ask)
    thread.start()

    def end() -> list[routing_pb.RouteResponse]:
        done.set()
        thread.join()
        assert failures == []
        return replies

    try:
        yield end
    finally:
        done.set()
        thread.join()

"""A stand-in with a key, a service in front of it, and what tests of snapshots ask of both."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from knnmoe.v1 import routing_pb2 as pb
from qdrant_client import grpc as q
from typer.testing import CliRunner

from router_service.cli.admin import app
from router_service.memories.store import MemoryStore
from router_service.settings import ServiceSettings
from router_service.snapshots.local import LocalSnapshotStore
from router_service.storage import make_snapshot_store, make_store
from tests.qdrant_standin import QdrantStandIn
from tests.sidecar import (
    EXPERTS,
    LOGIT_DELTA,
    Sidecar,
    random_entries,
    random_keys,
    route_request,
)

KEY = "secret"
KEY_VARIABLE = "ROUTER_SERVICE_QDRANT_API_KEY"
LAYERS, ENTRIES = 2, 40
PATIENCE_S = 60.0
METADATA = (("api-key", KEY),)


class Admin:
    """`router-admin` on one service."""

    def __init__(self, service: Sidecar) -> None:
        self._service = service

    def __call__(self, *arguments: str, code: int = 0) -> Any:
        """The result of a command that ends with `code`."""
        result = CliRunner().invoke(app, ["--target", self._service.target, *arguments])
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result

    def json(self, *arguments: str) -> Any:
        """The document that a command prints."""
        return json.loads(self("--json", *arguments).stdout)

    def refused(self, *arguments: str) -> str:
        """What a command says that ends with 1."""
        return str(self(*arguments, code=1).stderr)

    def listed(self, memory: str = "") -> list[str]:
        """Names of snapshots."""
        found = self.json("snapshot", "list", *filter(None, [memory]))["snapshots"]
        return [each["name"] for each in found]


def serve(server: QdrantStandIn, data: Path, *flags: str) -> Sidecar:
    """A service that knows the key; the caller ends it."""
    environment = {**os.environ, KEY_VARIABLE: KEY}
    return Sidecar(data, backend=server.url, flags=flags, env=environment)


def fill(service: Sidecar, name: str, seed: int = 0, **settings: Any) -> str:
    """A memory with 40 entries in each of 2 layers."""
    wanted = {"kind": LOGIT_DELTA, "gamma": [0.05], "model": {"num_layers": LAYERS}} | settings
    service.create(name, **wanted)
    write(service, name, seed)
    return name


def write(service: Sidecar, name: str, seed: int) -> None:
    """The entries of fill() with other keys and values."""
    for layer in range(LAYERS):
        service.upsert(name, layer, random_entries(LOGIT_DELTA, ENTRIES, seed=10 * seed + layer))


def request_of(service: Sidecar, name: str) -> pb.RouteRequest:
    rng = np.random.default_rng(5)
    digest = service.describe(name).model_digest
    return route_request(name, digest, random_keys(rng, 3), random_keys(rng, 3, EXPERTS))


def answer_of(service: Sidecar, request: pb.RouteRequest) -> bytes:
    reply = service.route(request)
    return bytes(reply.router_logits.data) + bytes(reply.lambdas.data)


def until(happened: Callable[[], object]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.02)


@contextmanager
def opened_snapshots(
    server: QdrantStandIn, data: Path
) -> Iterator[tuple[LocalSnapshotStore, MemoryStore]]:
    """As a service that starts has them, before it sweeps."""
    where: dict[str, Any] = {"backend": server.url, "data": data}
    settings = ServiceSettings(**where)
    backend, store = make_store(settings)
    store.open_all()
    yield make_snapshot_store(settings, backend, store), store
    store.close()
    backend.close()


@contextmanager
def channel_of(server: QdrantStandIn) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel


def collections_of(server: QdrantStandIn, memory: str) -> list[str]:
    """Names of the collections that were made for a memory."""
    with channel_of(server) as channel:
        stub = q.CollectionsStub(channel)
        reply = stub.List(q.ListCollectionsRequest(), metadata=METADATA)
    return sorted(each.name for each in reply.collections if f"~{memory}~" in each.name)


def records_of(server: QdrantStandIn) -> int:
    """How many restores are written down."""
    name = "knnmoe~snapshots"  # made at its first use
    with channel_of(server) as channel:
        there = q.CollectionExistsRequest(collection_name=name)
        reply = q.CollectionsStub(channel).CollectionExists(there, metadata=METADATA)
        if not reply.result.exists:
            return 0
        request = q.CountPoints(collection_name=name, exact=True)
        return int(q.PointsStub(channel).Count(request, metadata=METADATA).result.count)

"""What the tests of the stand-in send it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
import qdrant_client.grpc as pb
from numpy.typing import NDArray
from qdrant_client import QdrantClient, models

NAME = "knnmoe~m~layer-000~1"
EUCLID = models.VectorParams(size=8, distance=models.Distance.EUCLID)
TIMEOUT_S = 60.0


@contextmanager
def connect(port: int, timeout: int = 5) -> Iterator[QdrantClient]:
    """A client that speaks gRPC only; its address for REST leads nowhere."""
    client = QdrantClient(
        url="http://127.0.0.1:1",
        grpc_port=port,
        prefer_grpc=True,
        check_compatibility=False,
        timeout=timeout,
    )
    try:
        yield client
    finally:
        client.close()


def create(client: QdrantClient, name: str = NAME, **settings: Any) -> None:
    """A collection of 8 dimensions, Euclid unless told otherwise."""
    client.create_collection(name, **{"vectors_config": EUCLID, **settings})


def rows(count: int, seed: int = 0, width: int = 8) -> NDArray[np.float32]:
    """Normal numbers, f32 [count, width]."""
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def points(keys: NDArray[np.float32], first: int = 0, **payload: Any) -> list[models.PointStruct]:
    """Points with consecutive ids; a payload value may be a function of the id."""
    return [
        models.PointStruct(
            id=first + n,
            vector=key.tolist(),
            payload={k: v(first + n) if callable(v) else v for k, v in payload.items()},
        )
        for n, key in enumerate(keys)
    ]


def upsert(client: QdrantClient, sent: Sequence[models.PointStruct], name: str = NAME) -> None:
    client.upsert(name, list(sent), wait=True)


def ids(found: Sequence[Any]) -> list[Any]:
    return [point.id for point in found]


@contextmanager
def refused(code: grpc.StatusCode, text: str) -> Iterator[None]:
    """The call inside must end with this status, and a text that contains `text`."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert caught.value.code() == code
    assert text in caught.value.details()


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def wait_until_green(client: QdrantClient, name: str = NAME) -> models.CollectionInfo:
    green = models.CollectionStatus.GREEN
    wait_for(lambda: client.get_collection(name).status == green)
    return client.get_collection(name)


def stubs(
    port: int,
) -> tuple[grpc.Channel, pb.CollectionsStub, pb.PointsStub, Callable[..., Any]]:
    """A channel of one's own, with the raw stubs of collections, points and the health check."""
    # Else what one test could not reach makes the next one wait.
    options = (("grpc.use_local_subchannel_pool", 1),)
    channel = grpc.insecure_channel(f"127.0.0.1:{port}", options)
    health = pb.QdrantStub(channel).HealthCheck
    return channel, pb.CollectionsStub(channel), pb.PointsStub(channel), health

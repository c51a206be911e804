"""A stand-in for each file of tests, and qdrant-client's own client on the real wire."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from qdrant_client import QdrantClient
from standin_uses import connect

from tests.qdrant_standin import QdrantCluster, QdrantStandIn


@pytest.fixture(scope="session")
def in_memory() -> Iterator[Path]:
    """Where collections are made and dropped fast; nothing here is about disks."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def directory(in_memory: Path, request: pytest.FixtureRequest) -> Path:
    """Of a file of tests."""
    directory = in_memory / request.module.__name__
    directory.mkdir()
    return directory


@pytest.fixture(scope="module")
def standin(directory: Path) -> Iterator[QdrantStandIn]:
    with QdrantStandIn(directory / "standin") as server:
        yield server


@pytest.fixture(scope="module")
def connected(standin: QdrantStandIn) -> Iterator[QdrantClient]:
    with connect(standin.port) as client:
        yield client


@pytest.fixture
def client(standin: QdrantStandIn, connected: QdrantClient) -> Iterator[QdrantClient]:
    """The stand-in is empty, and without faults, when a test begins."""
    yield connected
    standin.faults.lift()
    for each in connected.get_collections().collections:
        connected.delete_collection(each.name)


@pytest.fixture
def cluster(in_memory: Path, request: pytest.FixtureRequest) -> Iterator[QdrantCluster]:
    """Three nodes, with nothing on them."""
    with (
        TemporaryDirectory(dir=in_memory) as directory,
        QdrantCluster(Path(directory)) as nodes,
    ):
        yield nodes


@pytest.fixture
def clients(cluster: QdrantCluster) -> Iterator[list[QdrantClient]]:
    """One of each node."""
    with ExitStack() as stack:
        yield [stack.enter_context(connect(peer.port)) for peer in cluster.peers]

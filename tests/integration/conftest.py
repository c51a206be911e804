"""Real services, shared by many tests; each test makes memories of its own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.integration.filled_memories import MemoryOf, filled_memories
from tests.integration.refusals import Memories, fill
from tests.sidecar import Sidecar, running_sidecar

_NUMBERS = count()


@pytest.fixture(scope="session", params=["exact", "edge"])
def sidecar(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sidecar]:
    """A service on each backend, on TCP; it must end cleanly after the last test."""
    data = tmp_path_factory.mktemp("service") / "data"
    with running_sidecar(data, backend=request.param) as running:
        yield running


@pytest.fixture(scope="session")
def edge_sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    """A service on Qdrant Edge, on a Unix socket; it must end cleanly after the last test."""
    data = tmp_path_factory.mktemp("service") / "data"
    with running_sidecar(data, listen=f"unix:{data.parent}/s") as running:
        yield running


@pytest.fixture
def name() -> str:
    """The name of a memory that no other test uses."""
    return f"memory-{next(_NUMBERS)}"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory that is not there yet."""
    return tmp_path / "data"


@pytest.fixture(scope="session")
def made(sidecar: Sidecar) -> Memories:
    """Memories for bad requests; see `memories`."""
    return fill(sidecar)


@pytest.fixture
def memories(made: Memories) -> Iterator[Memories]:
    """Two filled memories; afterwards nothing has changed and both answer."""
    before = made.state()
    yield made
    assert made.state() == before
    made.assert_answering()


@pytest.fixture(scope="session")
def memory_of(sidecar: Sidecar) -> MemoryOf:
    """Filled memories by kind and similarity, read as asked."""
    return filled_memories(sidecar)

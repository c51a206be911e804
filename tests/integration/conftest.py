"""Real services, shared by the tests of a module; each test makes memories of its own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.sidecar import Sidecar, running_sidecar

_NUMBERS = count()


@pytest.fixture(scope="module", params=["exact", "edge"])
def sidecar(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    """A service on each backend, on TCP; it must end cleanly after the module's tests."""
    data = tmp_path_factory.mktemp("service") / "data"
    with running_sidecar(data, backend=request.param) as running:
        yield running


@pytest.fixture(scope="module")
def edge_sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    """A service on Qdrant Edge, on a Unix socket; it must end cleanly after the module's tests."""
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

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from router_service.backends.edge.backend import EdgeBackend, EdgeCollection
from tests.congruence.fast_dir import fast_dir
from tests.unit.router_service.backends.numbered_entries import SPEC, numbered_entries

__all__ = ["collection", "data_dir", "edge", "fast_dir"]


@pytest.fixture
def data_dir(fast_dir: Path) -> Path:
    return fast_dir / "data"


@pytest.fixture
def edge(data_dir: Path) -> Iterator[EdgeBackend]:
    backend = EdgeBackend(data_dir, min_free_bytes=0)
    yield backend
    backend.close()


@pytest.fixture
def collection(edge: EdgeBackend) -> EdgeCollection:
    """600 numbered entries under the name `layer`."""
    made = edge.create("layer", SPEC)
    made.upsert(numbered_entries(0, 600))
    return made

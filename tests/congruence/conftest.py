from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from router_service.backends.base import Backend
from router_service.backends.edge import EdgeBackend
from router_service.backends.exact import ExactBackend
from tests.congruence.fast_dir import fast_dir

__all__ = ["backend", "fast_dir"]


@pytest.fixture(params=["exact", "edge"])
def backend(request: pytest.FixtureRequest, fast_dir: Path) -> Iterator[Backend]:
    made: Backend = (
        ExactBackend()
        if request.param == "exact"
        else EdgeBackend(fast_dir / "data", min_free_bytes=0)
    )
    yield made
    made.close()

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from router_service.backends.base import Backend
from router_service.backends.edge import EdgeBackend
from router_service.backends.exact import ExactBackend


@pytest.fixture(params=["exact", "edge"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    made: Backend = (
        ExactBackend() if request.param == "exact" else EdgeBackend(tmp_path / "data", min_free_bytes=0)
    )
    yield made
    made.close()

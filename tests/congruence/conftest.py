from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from router_service.backends.base import Backend
from tests.congruence.fast_dir import fast_dir
from tests.engines import ENGINES, backend_of

__all__ = ["backend", "fast_dir"]


@pytest.fixture(params=ENGINES)
def backend(request: pytest.FixtureRequest, fast_dir: Path) -> Iterator[Backend]:
    with backend_of(request.param, request, fast_dir / "data") as made:
        yield made

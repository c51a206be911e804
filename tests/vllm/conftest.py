"""Real engines of vLLM; their tests are skipped where it is not installed (make test-vllm)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tests.sidecar import Sidecar, running_sidecar
from tests.vllm.models import Checkpoint, saved

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A tiny model by family, made once."""
    directory = tmp_path_factory.mktemp("models")
    return cache(lambda family: saved(family, directory / family))


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    """A routing service of the module's own."""
    with running_sidecar(tmp_path_factory.mktemp("service") / "data") as running:
        yield running

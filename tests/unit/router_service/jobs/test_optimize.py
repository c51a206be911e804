"""What a quantization leaves behind that ends before it is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from router_service.arrays import Entries, Provenance
from router_service.backends.base import Compression, Quantization
from router_service.backends.edge.backend import EdgeBackend
from router_service.errors import Cancelled
from router_service.fingerprint import ModelFingerprint
from router_service.jobs.optimize import quantized
from router_service.memories.settings import MemorySettings
from router_service.memories.store import MemoryStore

MODEL = ModelFingerprint("tiny", 1, 16, 4, 2, "ab" * 32)
BINARY = Compression(Quantization.BINARY)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    backend = EdgeBackend(tmp_path, min_free_bytes=0)
    with closing(backend), closing(MemoryStore(backend, tmp_path)) as made:
        memory = made.create("m", MODEL, MemorySettings())
        keys = np.random.default_rng(0).normal(size=(700, 16)).astype(np.float32)
        ids, values = np.arange(700, dtype=np.uint64), np.zeros((700, 4), np.float32)
        memory.upsert(0, MODEL.digest(), Entries(ids, keys, values, [Provenance()] * 700))
        yield made


@pytest.mark.parametrize(
    ("stage", "label", "oversampling"),
    [("copy", "none", 2.0), ("measure recall", "binary", BINARY.oversampling)],
)
def test_the_candidates_are_those_that_the_layers_need(
    store: MemoryStore, stage: str, label: str, oversampling: float
) -> None:
    """Ended before a layer has changed, or just after it."""

    def ends(now: str, done: int, total: int) -> None:
        if now.endswith(stage):
            raise Cancelled("ended")

    memory = store.get("m")
    with pytest.raises(Cancelled):
        list(quantized(store, memory, memory.layers, BINARY, 0.0, ends))
    assert memory.layers[0].info().compression.label == label
    assert memory.record.settings.oversampling == oversampling

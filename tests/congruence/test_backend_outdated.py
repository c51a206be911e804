"""A graph whose entries were mostly replaced or deleted is lost: the nearest entries are found all the same."""

from __future__ import annotations

import numpy as np
import pytest

from router_service.arrays import Entries, Provenance
from router_service.backends.base import (
    Backend,
    CollectionSpec,
    Compression,
    Maintained,
    Metric,
    Quantization,
    SearchOptions,
)
from tests.engines import require_compression

SPEC = CollectionSpec(16, Metric.EUCLID, 1)
ENTRIES = 3000


def numbered(ids: np.ndarray, seed: int) -> Entries:
    keys = np.random.default_rng(seed).uniform(-1, 1, (ENTRIES, 16)).astype(np.float32)[ids]
    return Entries(
        ids.astype(np.uint64), keys, ids[:, None].astype(np.float32), [Provenance()] * len(ids)
    )


@pytest.mark.parametrize("how", ["deleted", "replaced"])
@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.FLOAT16])
def test_entries_are_found_when_most_of_the_index_is_outdated(
    backend: Backend, how: str, quantization: Quantization
) -> None:
    require_compression(backend, quantization)
    collection = backend.create("layer", SPEC)
    entries = numbered(np.arange(ENTRIES), 0)
    collection.upsert(entries)
    collection.optimize(Compression(quantization))
    gone, left = entries.ids[: ENTRIES * 9 // 10], entries.slice(ENTRIES * 9 // 10, ENTRIES)
    if how == "deleted":
        collection.delete(gone)
    else:
        collection.upsert(numbered(np.arange(ENTRIES * 9 // 10), 1))
    if isinstance(collection, Maintained):
        assert collection.outdated_share == pytest.approx(0.9)
    found = collection.search(left.keys, 1, SearchOptions())
    np.testing.assert_array_equal(found.ids[:, 0], left.ids)
    np.testing.assert_allclose(found.distances, 0, atol=1e-6)
    collection.optimize(Compression(quantization))
    if isinstance(collection, Maintained):
        assert collection.outdated_share == 0

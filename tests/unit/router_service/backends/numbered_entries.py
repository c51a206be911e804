"""Entries whose keys and values follow from their ids, so that a lost or torn one shows."""

from __future__ import annotations

import numpy as np

from router_service.arrays import Entries, Provenance
from router_service.backends.base import Collection, CollectionSpec, Metric, SearchOptions

SPEC = CollectionSpec(8, Metric.EUCLID, 3)
OPTIONS = SearchOptions()


def numbered_entries(start: int, stop: int) -> Entries:
    ids = np.arange(start, stop, dtype=np.uint64)
    random = np.random.default_rng(0).normal(size=(stop, 8)).astype(np.float32)
    values = np.stack([ids, ids * 2, ids % 7], axis=1).astype(np.float32)
    return Entries(ids, random[start:], values, [Provenance("s", f"e{i // 10}") for i in ids])


def assert_holds(collection: Collection, entries: int) -> None:
    """The collection has numbered_entries(0, entries) and nothing else, and finds them."""
    expected = numbered_entries(0, entries)
    stored = collection.scroll(None, entries + 1)
    np.testing.assert_array_equal(stored.ids, expected.ids)
    np.testing.assert_array_equal(stored.keys, expected.keys)
    np.testing.assert_array_equal(stored.values, expected.values)
    found = collection.search(expected.keys[:200], 1, OPTIONS)
    np.testing.assert_array_equal(found.values[:, 0], expected.values[:200])

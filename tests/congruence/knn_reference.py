"""Nearest neighbours one pair at a time in float64, and what a backend's answer must have in common with them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from router_service.arrays import F32, NO_ID, Entries, ExampleRef, Neighbours, Provenance
from router_service.backends.base import Backend, Collection, CollectionSpec, Metric, SearchOptions

# Squared distances: f32 differences and sums of the engine. Cosine distances cancel near 0: absolute.
SQUARED_RTOL = 1e-5
COSINE_ATOL = 1e-6

OPTIONS = SearchOptions()
EUCLID = CollectionSpec(16, Metric.EUCLID, 6)
NAME = "bible/layer-003"


def filled(backend: Backend, entries: Entries, metric: Metric = Metric.EUCLID) -> Collection:
    spec = CollectionSpec(entries.keys.shape[1], metric, entries.values.shape[1])
    collection = backend.create(NAME, spec)
    collection.upsert(entries)
    return collection


def clustered_entries(
    n: int, dimension: int, width: int = 6, *, seed: int = 0, scale: float = 1.0
) -> Entries:
    """Entries around n / 40 centres, ids 5, 8, 11, ..., 10 to an example, values unlike each other."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(max(1, n // 40), dimension)) * 3
    keys = centres[random.integers(0, len(centres), n)] + random.normal(size=(n, dimension))
    ids = np.arange(n, dtype=np.uint64) * 3 + 5
    provenance = [Provenance("bible", f"chapter {row // 10}", row % 10, row) for row in range(n)]
    values = random.normal(size=(n, width)).astype(np.float32)
    return Entries(ids, (keys * scale).astype(np.float32), values, provenance)


def queries_near(entries: Entries, count: int, *, noise: float = 0.3, seed: int = 1) -> F32:
    """Keys picked at random, moved a little."""
    random = np.random.default_rng(seed)
    keys = entries.keys[random.integers(0, len(entries), count)]
    return (keys + noise * random.normal(size=keys.shape)).astype(np.float32)


def true_distances(queries: F32, keys: F32, metric: Metric) -> NDArray[np.float64]:
    """[T, n]"""
    q, k = queries.astype(np.float64), keys.astype(np.float64)
    if metric is Metric.COSINE:
        q /= np.linalg.norm(q, axis=1, keepdims=True)
        k /= np.linalg.norm(k, axis=1, keepdims=True)
        return 1.0 - q @ k.T
    return np.array([((row - k) ** 2).sum(axis=1) for row in q]).reshape(len(q), len(k))


def assert_distances_agree(found: NDArray[np.floating], true: NDArray[np.floating], metric: Metric):
    if metric is Metric.COSINE:
        np.testing.assert_allclose(found, true, rtol=0, atol=COSINE_ATOL)
    else:
        np.testing.assert_allclose(found, true, rtol=SQUARED_RTOL, atol=1e-30)


def assert_nearest(
    found: Neighbours,
    entries: Entries,
    queries: F32,
    k: int,
    metric: Metric,
    excluded: list[ExampleRef | None] | None = None,
) -> None:
    """The k smallest true distances, each with the id and value it belongs to; ties in any order."""
    true = true_distances(queries, entries.keys, metric)
    for query, ref in enumerate(excluded or []):
        same = [ExampleRef(p.source, p.example) == ref for p in entries.provenance]
        true[query, same] = np.inf
    assert_slots_agree(found, entries, true, k, metric)
    expected = np.sort(true, axis=1)[:, :k]
    filled = found.ids != NO_ID
    np.testing.assert_array_equal(filled.sum(axis=1), np.isfinite(expected).sum(axis=1))
    assert_distances_agree(found.distances[filled], expected[np.isfinite(expected)], metric)


def assert_slots_agree(
    found: Neighbours, entries: Entries, true: NDArray[np.float64], k: int, metric: Metric
) -> None:
    """Each slot holds an entry's own value and true distance, or nothing; nearest first, none twice."""
    assert found.ids.shape == found.distances.shape == (len(true), k)
    assert found.values.shape == (len(true), k, entries.values.shape[1])
    assert [found.ids.dtype, found.distances.dtype, found.values.dtype] == [
        np.uint64,
        np.float32,
        np.float32,
    ]
    filled = found.ids != NO_ID
    assert np.isinf(found.distances[~filled]).all()
    assert not found.values[~filled].any()
    token, slot = np.nonzero(filled)
    row = np.searchsorted(entries.ids, found.ids[token, slot])
    np.testing.assert_array_equal(entries.ids[row], found.ids[token, slot])
    np.testing.assert_array_equal(entries.values[row], found.values[token, slot])
    assert_distances_agree(found.distances[token, slot], true[token, row], metric)
    assert (found.distances[:, 1:] >= found.distances[:, :-1]).all()
    assert all(len(set(ids)) == len(ids) for ids in (r[r != NO_ID].tolist() for r in found.ids))

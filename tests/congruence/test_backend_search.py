"""Every backend finds the same neighbours. Tolerances are in knn_reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router_service.arrays import NO_ID, ExampleRef, Provenance
from router_service.backends.base import (
    Backend,
    Metric,
)
from router_service.errors import InvalidField
from router_service.kernels import mean_lambda, rbf_similarity
from tests.congruence.knn_reference import (
    EUCLID,
    NAME,
    OPTIONS,
    assert_distances_agree,
    assert_nearest,
    clustered_entries,
    filled,
    queries_near,
    true_distances,
)


@pytest.mark.parametrize("k", [1, 3, 32])
@pytest.mark.parametrize("metric", list(Metric))
def test_search_finds_the_nearest_entries(backend: Backend, metric: Metric, k: int) -> None:
    entries = clustered_entries(300, 24)
    collection, queries = filled(backend, entries, metric), queries_near(entries, 20)
    assert_nearest(collection.search(queries, k, OPTIONS), entries, queries, k, metric)


@pytest.mark.parametrize("count", [1, 2, 128, 129, 2048])
def test_any_number_of_queries(backend: Backend, count: int) -> None:
    entries = clustered_entries(150, 8)
    collection, queries = filled(backend, entries), queries_near(entries, count)
    assert_nearest(collection.search(queries, 2, OPTIONS), entries, queries, 2, Metric.EUCLID)


def test_no_queries(backend: Backend) -> None:
    collection = filled(backend, clustered_entries(5, 16))
    assert collection.search(np.empty((0, 16), np.float32), 3, OPTIONS).ids.shape == (0, 3)


def test_more_neighbours_than_entries_leave_empty_slots(backend: Backend) -> None:
    entries = clustered_entries(3, 16)
    found = filled(backend, entries).search(queries_near(entries, 4), 32, OPTIONS)
    assert_nearest(found, entries, queries_near(entries, 4), 32, Metric.EUCLID)
    assert (found.ids[:, 3:] == NO_ID).all()


@pytest.mark.parametrize("k", [1, 32])
def test_an_empty_collection(backend: Backend, k: int) -> None:
    collection = backend.create(NAME, EUCLID)
    found = collection.search(np.ones((5, 16), np.float32), k, OPTIONS)
    assert (found.ids == NO_ID).all()
    assert np.isinf(found.distances).all()
    assert not found.values.any()
    assert found.values.shape == (5, k, 6)
    assert len(collection.scroll(None, 10)) == 0
    assert collection.info().entries == 0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e6])
def test_distances_are_exact_for_queries_close_to_long_keys(backend: Backend, scale: float) -> None:
    entries = clustered_entries(200, 128, scale=scale)
    queries = queries_near(entries, 40, noise=1e-4 * scale)
    found = filled(backend, entries).search(queries, 3, OPTIONS)
    assert_nearest(found, entries, queries, 3, Metric.EUCLID)


def test_lambda_agrees_with_numpy_over_the_exported_entries(backend: Backend) -> None:
    entries = clustered_entries(300, 64)
    collection, queries = filled(backend, entries), queries_near(entries, 50)
    exported = collection.scroll(None, 300)
    squared = np.sort(true_distances(queries, exported.keys, Metric.EUCLID), axis=1)[:, :3]
    gamma = float(1.0 / np.median(squared))
    found = mean_lambda(rbf_similarity(collection.search(queries, 3, OPTIONS).distances, gamma))
    np.testing.assert_allclose(found, np.exp(-gamma * squared).mean(axis=1), atol=1e-5)


def test_a_stored_key_is_at_distance_zero(backend: Backend) -> None:
    entries = clustered_entries(50, 16)
    found = filled(backend, entries).search(entries.keys, 1, OPTIONS)
    np.testing.assert_array_equal(found.ids[:, 0], entries.ids)
    assert not found.distances.any()


def test_under_cosine_keys_are_stored_with_unit_length(backend: Backend) -> None:
    entries = clustered_entries(60, 16)
    lengths = np.geomspace(1e-12, 1e12, 60, dtype=np.float32)[:, None]
    scaled = replace(entries, keys=(entries.keys * lengths).astype(np.float32))
    collection = filled(backend, scaled, Metric.COSINE)
    stored = collection.scroll(None, 60).keys
    np.testing.assert_allclose(np.linalg.norm(stored.astype(np.float64), axis=1), 1, atol=1e-6)
    found = collection.search(scaled.keys, 3, OPTIONS)
    assert_nearest(found, scaled, scaled.keys, 3, Metric.COSINE)


def test_a_zero_vector_under_cosine_is_refused_by_name(backend: Backend) -> None:
    entries = clustered_entries(10, 16)
    collection = filled(backend, entries, Metric.COSINE)
    broken = replace(entries, keys=entries.keys.copy(), ids=entries.ids + np.uint64(1000))
    broken.keys[7] = 0
    with pytest.raises(InvalidField, match=r"keys\[7\]"):
        collection.upsert(broken)
    with pytest.raises(InvalidField, match=r"queries\[7\]"):
        collection.search(broken.keys, 1, OPTIONS)
    assert collection.info().entries == 10


def test_a_zero_vector_is_fine_under_euclid(backend: Backend) -> None:
    entries = clustered_entries(10, 16)
    entries.keys[7] = 0
    found = filled(backend, entries).search(np.zeros((1, 16), np.float32), 1, OPTIONS)
    assert found.ids[0, 0] == entries.ids[7]


def test_one_excluded_example_for_all_queries(backend: Backend) -> None:
    entries = clustered_entries(100, 16)
    collection, queries = filled(backend, entries), queries_near(entries, 20)
    ref = ExampleRef("bible", "chapter 3")
    found = collection.search(queries, 5, OPTIONS, [ref])
    assert_nearest(found, entries, queries, 5, Metric.EUCLID, [ref] * 20)


def test_an_excluded_example_per_query(backend: Backend) -> None:
    entries = clustered_entries(100, 16)
    collection = filled(backend, entries)
    refs = [ExampleRef(p.source, p.example) for p in entries.provenance]
    found = collection.search(entries.keys, 5, OPTIONS, refs)
    assert_nearest(found, entries, entries.keys, 5, Metric.EUCLID, list(refs))
    assert not (found.ids[:, 0] == entries.ids).any()


def test_exclusion_compares_source_and_example_and_knows_empty_names(backend: Backend) -> None:
    entries = clustered_entries(4, 16)
    names = [("", ""), ("", "a"), ("b", ""), ("b", "a")]
    named = replace(entries, provenance=[Provenance(*name) for name in names])
    collection = filled(backend, named)
    for row, name in enumerate(names):
        found = collection.search(entries.keys[:1], 4, OPTIONS, [ExampleRef(*name)])
        assert set(found.ids[0].tolist()) == {NO_ID, *entries.ids.tolist()} - {entries.ids[row]}
    unknown = collection.search(entries.keys[:1], 4, OPTIONS, [ExampleRef("b", "c")])
    assert NO_ID not in unknown.ids


def test_a_wrong_number_of_exclusions_is_refused(backend: Backend) -> None:
    entries = clustered_entries(10, 16)
    collection = filled(backend, entries)
    with pytest.raises(InvalidField, match="exclude"):
        collection.search(entries.keys, 1, OPTIONS, [ExampleRef("a", "b")] * 2)


def test_a_batch_is_the_same_as_its_queries_one_by_one(backend: Backend) -> None:
    entries = clustered_entries(200, 32)
    collection, queries = filled(backend, entries), queries_near(entries, 30)
    batch = collection.search(queries, 3, OPTIONS)
    single = [collection.search(query[None], 3, OPTIONS) for query in queries]
    np.testing.assert_array_equal(batch.ids, np.concatenate([one.ids for one in single]))
    distances = np.concatenate([one.distances for one in single])
    assert_distances_agree(batch.distances, distances, Metric.EUCLID)


def test_few_neighbours_are_the_first_of_many(backend: Backend) -> None:
    entries = clustered_entries(200, 32)
    collection, queries = filled(backend, entries), queries_near(entries, 30)
    many = collection.search(queries, 32, OPTIONS)
    np.testing.assert_array_equal(collection.search(queries, 3, OPTIONS).ids, many.ids[:, :3])


@pytest.mark.parametrize(("shift", "scale"), [(8.0, 1.0), (0.0, 4.0)])
def test_moving_and_scaling_keys_and_queries(backend: Backend, shift: float, scale: float) -> None:
    # a grid of 1/64, on which both are exact in f32
    entries = clustered_entries(200, 16)
    grid = replace(entries, keys=np.round(entries.keys * 64) / np.float32(64))
    queries = np.round(queries_near(entries, 30) * 64) / np.float32(64)
    plain = filled(backend, grid).search(queries, 3, OPTIONS)
    moved = replace(grid, keys=(grid.keys * scale + shift).astype(np.float32))
    other = backend.create("moved", EUCLID)
    other.upsert(moved)
    found = other.search((queries * scale + shift).astype(np.float32), 3, OPTIONS)
    assert_distances_agree(found.distances, plain.distances * scale**2, Metric.EUCLID)


def test_the_order_of_upserts_does_not_matter(backend: Backend) -> None:
    entries = clustered_entries(90, 16)
    collection = backend.create(NAME, EUCLID)
    for start in (60, 0, 30):
        collection.upsert(entries.slice(start, start + 30))
    queries = queries_near(entries, 30)
    assert_nearest(collection.search(queries, 3, OPTIONS), entries, queries, 3, Metric.EUCLID)


def test_overwriting_and_restoring_changes_nothing(backend: Backend) -> None:
    entries, other = clustered_entries(60, 16), clustered_entries(60, 16, seed=3)
    collection = filled(backend, entries)
    before = collection.search(entries.keys, 3, OPTIONS)
    collection.upsert(other)
    collection.upsert(entries)
    after = collection.search(entries.keys, 3, OPTIONS)
    np.testing.assert_array_equal(before.ids, after.ids)
    np.testing.assert_array_equal(before.distances, after.distances)
    np.testing.assert_array_equal(before.values, after.values)


def test_entries_too_far_for_f32_are_no_neighbours(backend: Backend) -> None:
    entries = clustered_entries(2, 16)
    entries.keys[:] = [[2.0**61], [-(2.0**61)]]
    found = filled(backend, entries).search(entries.keys[:1] * 2, 2, OPTIONS)
    assert found.ids[0].tolist() == [entries.ids[0], NO_ID]
    assert np.isinf(found.distances[0, 1])
    assert not found.values[0, 1].any()

"""Every backend keeps the same entries: writing, reading back, optimizing, reopening."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router_service.arrays import MAX_ENTRY_ID, Entries, Provenance
from router_service.backends.base import (
    Backend,
    Compression,
    Metric,
    Quantization,
)
from router_service.errors import CorruptMemory, InvalidField, StorageError
from tests.congruence.knn_reference import (
    EUCLID,
    NAME,
    OPTIONS,
    assert_nearest,
    assert_slots_agree,
    clustered_entries,
    filled,
    queries_near,
    true_distances,
)


def test_an_upsert_replaces_entries_with_the_same_id(backend: Backend) -> None:
    first, other = clustered_entries(80, 16), clustered_entries(80, 16, seed=7)
    collection = filled(backend, first)
    rows = slice(30, 50)
    collection.upsert(other.slice(30, 50))
    expected = replace(first, keys=first.keys.copy(), values=first.values.copy())
    expected.keys[rows], expected.values[rows] = other.keys[rows], other.values[rows]
    queries = np.concatenate([first.keys, other.keys])
    assert collection.info().entries == 80
    assert_nearest(collection.search(queries, 3, OPTIONS), expected, queries, 3, Metric.EUCLID)
    np.testing.assert_array_equal(collection.scroll(None, 80).keys, expected.keys)


def test_of_repeated_ids_in_one_call_the_last_counts(backend: Backend) -> None:
    entries = clustered_entries(40, 16)
    repeated = replace(entries, ids=np.repeat(entries.ids[:20], 2))
    stored = filled(backend, repeated).scroll(None, 100)
    np.testing.assert_array_equal(stored.ids, entries.ids[:20])
    np.testing.assert_array_equal(stored.keys, entries.keys[1::2])
    np.testing.assert_array_equal(stored.values, entries.values[1::2])


def test_an_upsert_of_nothing(backend: Backend) -> None:
    collection = filled(backend, clustered_entries(5, 16))
    collection.upsert(clustered_entries(5, 16).slice(0, 0))
    assert collection.info().entries == 5


def test_what_comes_back_is_what_was_stored_to_the_last_bit(backend: Backend) -> None:
    rows = [0.0, -0.0, 1e-45, np.finfo(np.float32).max, 1.0 / 3.0, -1e-30]
    entries = Entries(
        np.array([0, 7, MAX_ENTRY_ID], np.uint64),
        np.array([[1e-20, -0.0], [3.3, 1e18], [0.1, 0.2]], np.float32),
        np.array([rows, rows[::-1], rows], np.float32),
        [
            Provenance(),
            Provenance('sönne "x"\n', "例え" * 40, 2**40, -1, -0.1, 1_700_000_000_123),
            Provenance("", "only an example", 0, 50_256, 1e-9, 0, "例 \t\N{SNOWMAN}\n", 2, 4),
        ],
    )
    collection = filled(backend, entries)
    stored = collection.scroll(None, 10)
    np.testing.assert_array_equal(stored.ids, entries.ids)
    assert stored.keys.tobytes() == entries.keys.tobytes()
    assert stored.values.tobytes() == entries.values.tobytes()
    assert list(stored.provenance) == list(entries.provenance)
    found = collection.search(entries.keys, 1, OPTIONS)
    assert found.values[:, 0].tobytes() == entries.values.tobytes()


def test_scroll_pages_through_all_ids_in_order(backend: Backend) -> None:
    entries = clustered_entries(100, 16)
    shuffled = np.random.default_rng(0).permutation(100)
    collection = filled(
        backend,
        Entries(
            entries.ids[shuffled],
            entries.keys[shuffled],
            entries.values[shuffled],
            [entries.provenance[row] for row in shuffled],
        ),
    )
    pages, after = [], None
    while len(page := collection.scroll(after, 7)):
        pages.append(page)
        after = int(page.ids[-1])
    np.testing.assert_array_equal(np.concatenate([p.ids for p in pages]), entries.ids)
    np.testing.assert_array_equal(np.concatenate([p.keys for p in pages]), entries.keys)
    np.testing.assert_array_equal(np.concatenate([p.values for p in pages]), entries.values)
    assert [x for p in pages for x in p.provenance] == list(entries.provenance)


def test_scroll_starts_above_an_id_whether_or_not_it_exists(backend: Backend) -> None:
    entries = clustered_entries(10, 16)  # ids 5, 8, 11, ...
    collection = filled(backend, entries)
    assert collection.scroll(8, 2).ids.tolist() == [11, 14]
    assert collection.scroll(9, 2).ids.tolist() == [11, 14]
    assert collection.scroll(0, 2).ids.tolist() == [5, 8]
    assert len(collection.scroll(MAX_ENTRY_ID, 5)) == 0
    assert len(collection.scroll(None, 0)) == 0
    assert len(collection.scroll(None, 2**40)) == 10


@pytest.mark.parametrize("limit", [0, 4])
def test_scroll_without_keys(backend: Backend, limit: int) -> None:
    entries = clustered_entries(10, 16)
    page = filled(backend, entries).scroll(None, limit, with_keys=False)
    assert page.keys.shape == (limit, 0)
    np.testing.assert_array_equal(page.values, entries.values[:limit])


def test_provenance_of_known_ids(backend: Backend) -> None:
    entries = clustered_entries(10, 16)  # ids 5, 8, 11, ...
    collection = filled(backend, entries)
    found = collection.provenance(np.array([11, 6, 5, 11, MAX_ENTRY_ID], np.uint64))
    assert found == {5: entries.provenance[0], 11: entries.provenance[2]}
    assert collection.provenance(np.empty(0, np.uint64)) == {}


@pytest.mark.parametrize("metric", list(Metric))
def test_optimized_collections_find_the_same(backend: Backend, metric: Metric) -> None:
    entries = clustered_entries(1500, 32)
    collection, queries = filled(backend, entries, metric), queries_near(entries, 300)
    true = true_distances(queries, entries.keys, metric)
    for quantization in (Quantization.INT8, Quantization.NONE):
        collection.optimize(Compression(quantization))
        info = collection.info()
        assert (info.entries, info.compression.quantization) == (1500, quantization)
        for k in (1, 5):
            found = collection.search(queries, k, OPTIONS)
            assert_slots_agree(found, entries, true, k, metric)
            recall = (found.ids[:, 0] == entries.ids[true.argmin(axis=1)]).mean()
            assert recall >= 0.99


def test_entries_written_after_optimize_are_found(backend: Backend) -> None:
    entries, later = clustered_entries(1200, 16), clustered_entries(1200, 16, seed=9)
    collection = filled(backend, entries)
    collection.optimize(Compression(Quantization.INT8))
    collection.upsert(later.slice(0, 100))
    new = replace(later.slice(100, 150), ids=later.ids[100:150] + np.uint64(10**6))
    collection.upsert(new)
    found = collection.search(later.keys[:150], 1, OPTIONS)
    expected = np.concatenate([later.ids[:100], new.ids])
    assert (found.ids[:, 0] == expected).mean() >= 0.99
    assert collection.info().entries == 1250
    assert collection.info().compression.quantization is Quantization.INT8
    assert collection.scroll(None, 5).ids.tolist() == entries.ids[:5].tolist()


@pytest.mark.parametrize("entries", [0, 1, 30])
def test_tiny_collections_can_be_optimized_and_stay_exact(backend: Backend, entries: int) -> None:
    stored = clustered_entries(entries, 16)
    collection = filled(backend, stored)
    collection.optimize(Compression(Quantization.INT8))
    queries = np.ones((4, 16), np.float32)
    assert_nearest(collection.search(queries, 3, OPTIONS), stored, queries, 3, Metric.EUCLID)


@pytest.mark.parametrize("quantization", [None, Quantization.INT8])
def test_everything_is_there_after_reopening(
    backend: Backend, quantization: Quantization | None
) -> None:
    entries = clustered_entries(1100, 16)
    collection, queries = filled(backend, entries), queries_near(entries, 30)
    if quantization:
        collection.optimize(Compression(quantization))
    before, info = collection.search(queries, 3, OPTIONS), collection.info()
    collection.close()
    collection.close()
    again = backend.open(NAME, EUCLID)
    after = again.search(queries, 3, OPTIONS)
    np.testing.assert_array_equal(before.ids, after.ids)
    np.testing.assert_array_equal(before.distances, after.distances)
    np.testing.assert_array_equal(before.values, after.values)
    assert replace(again.info(), disk_bytes=0) == replace(info, disk_bytes=0)


def test_a_closed_collection_refuses_to_work(backend: Backend) -> None:
    entries = clustered_entries(10, 16)
    collection = filled(backend, entries)
    collection.close()
    calls = [
        lambda: collection.search(entries.keys, 1, OPTIONS),
        lambda: collection.upsert(entries),
        lambda: collection.scroll(None, 1),
        lambda: collection.optimize(Compression()),
        collection.info,
        collection.flush,
    ]
    for call in calls:
        with pytest.raises(StorageError, match="closed"):
            call()


def test_collections_are_made_once_and_found_by_name_and_spec(backend: Backend) -> None:
    with pytest.raises(CorruptMemory):
        backend.open(NAME, EUCLID)
    collection = backend.create(NAME, EUCLID)
    with pytest.raises(StorageError, match="already"):
        backend.create(NAME, EUCLID)
    with pytest.raises(StorageError, match="already open"):
        backend.open(NAME, EUCLID)
    collection.close()
    with pytest.raises(CorruptMemory, match="expected"):
        backend.open(NAME, replace(EUCLID, metric=Metric.COSINE))
    backend.open(NAME, EUCLID)


def test_dropping_a_collection(backend: Backend) -> None:
    backend.drop("never/there")
    collection = filled(backend, clustered_entries(10, 16))
    with pytest.raises(StorageError, match="close it"):
        backend.drop(NAME)
    collection.close()
    backend.drop(NAME)
    with pytest.raises(CorruptMemory):
        backend.open(NAME, EUCLID)
    assert backend.create(NAME, EUCLID).info().entries == 0


def test_collections_do_not_share_entries(backend: Backend) -> None:
    entries = clustered_entries(20, 16)
    one, other = backend.create("a", EUCLID), backend.create("a/b", EUCLID)
    one.upsert(entries.slice(0, 10))
    other.upsert(entries.slice(10, 20))
    one.close()
    backend.drop("a")
    assert other.scroll(None, 30).ids.tolist() == entries.ids[10:].tolist()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc",
        "..",
        "a/../b",
        "a//b",
        "a\0",
        ".hidden",
        "a/gen-000001",
        "LOCK",
        "a" * 300,
        "a b",
    ],
)
def test_unsafe_names_are_refused(backend: Backend, name: str) -> None:
    for call in (backend.create, backend.open):
        with pytest.raises(InvalidField, match="name"):
            call(name, EUCLID)
    with pytest.raises(InvalidField, match="name"):
        backend.drop(name)


def test_closing_a_backend_closes_its_collections(backend: Backend) -> None:
    collection = filled(backend, clustered_entries(10, 16))
    backend.close()
    with pytest.raises(StorageError):
        collection.info()
    backend.close()

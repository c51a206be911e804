"""Every backend gives a copy the same entries with the same digests, whichever way they are read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router_service.arrays import (
    MAX_ENTRY_ID,
    U64,
    Entries,
    Provenance,
    combined_digests,
    digests_of,
)
from router_service.backends.base import Backend, Collection, Compression, Metric
from tests.congruence.knn_reference import EUCLID, NAME, clustered_entries, filled


def wanted(*numbers: int) -> U64:
    return np.array(numbers, np.uint64)


def require_same(found: Entries, expected: Entries) -> None:
    np.testing.assert_array_equal(found.ids, expected.ids)
    assert found.keys.tobytes() == expected.keys.tobytes()
    assert found.values.tobytes() == expected.values.tobytes()
    assert list(found.provenance) == list(expected.provenance)


def everything(collection: Collection, page_entries: int) -> tuple[Entries, U64]:
    """In the order of ids, each of which came once."""
    pages = list(collection.all_entries(page_entries))
    assert all(0 < len(page) <= page_entries for page, _ in pages)
    both = Entries.concat([page for page, _ in pages], 16, 6)
    order = np.argsort(both.ids)
    assert len(np.unique(both.ids)) == len(both)
    digests = np.concatenate([np.empty(0, np.uint64), *(each for _, each in pages)])
    return both.take(order), digests[order]


def changed(backend: Backend, metric: Metric) -> Collection:
    """Some of an index, some replaced since, some gone, some new, and some with the same key."""
    entries, other = clustered_entries(700, 16), clustered_entries(700, 16, seed=7)
    entries.keys[40:44] = entries.keys[0]
    collection = filled(backend, entries, metric)
    collection.optimize(Compression.parse("int8"))
    collection.upsert(other.slice(100, 140))
    new = replace(other, ids=other.ids + np.uint64(10**6))
    collection.upsert(new.slice(0, 30))
    collection.delete(entries.ids[[3, 41, 110, 600]])
    return collection


@pytest.mark.parametrize("metric", list(Metric))
def test_whichever_way_entries_are_read(backend: Backend, metric: Metric) -> None:
    collection = changed(backend, metric)
    stored = collection.scroll(None, 10_000)
    expected = combined_digests(digests_of(stored))
    for page_entries in (7, 10_000):
        found, digests = everything(collection, page_entries)
        require_same(found, stored)
        np.testing.assert_array_equal(digests, expected)
    after = None
    for start in range(0, len(stored), 300):
        ids, digests = collection.digests(after, 300)
        np.testing.assert_array_equal(ids, stored.ids[start : start + 300])
        np.testing.assert_array_equal(digests, expected[start : start + 300])
        after = int(ids[-1])
    assert len(collection.digests(after, 300)[0]) == 0
    require_same(collection.entries(stored.ids), stored)
    asked = wanted(5, 6, 8, 10**6 + 8, MAX_ENTRY_ID)
    rows = np.flatnonzero(np.isin(stored.ids, asked))
    assert len(rows) == 3
    require_same(collection.entries(asked), stored.take(rows))
    assert len(collection.entries(wanted())) == 0


def test_a_layer_that_nothing_was_written_to(backend: Backend) -> None:
    collection = backend.create(NAME, EUCLID)
    assert list(collection.all_entries(10)) == []
    assert len(collection.entries(wanted(1))) == 0
    assert len(collection.digests(None, 10)[0]) == 0


def test_each_part_of_an_entry_counts_in_its_digest() -> None:
    entry = clustered_entries(1, 16)
    [origin] = entry.provenance
    others = [
        replace(entry, ids=entry.ids + np.uint64(1)),
        replace(entry, keys=-entry.keys),
        replace(entry, values=-entry.values),
        replace(entry, provenance=[replace(origin, example="another")]),
        replace(entry, provenance=[replace(origin, created_unix_ms=1)]),
        replace(entry, provenance=[replace(origin, snippet="it is")]),
        replace(entry, provenance=[replace(origin, snippet="it is", token_end=2)]),
        replace(entry, provenance=[replace(origin, snippet="it is", token_start=2, token_end=2)]),
    ]
    digests = [int(combined_digests(digests_of(each))[0]) for each in [entry, *others]]
    assert len(set(digests)) == len(digests)


def test_an_entry_without_a_snippet_has_the_digests_that_it_always_had() -> None:
    """Those on disk, and those of copies, are compared with them: numbers of a version that knew no snippets."""
    origin = Provenance("täxt", "e", 3, 4, 0.5, 6)
    key, value = np.array([[1, 2]], np.float32), np.array([[0.5]], np.float32)
    [digests] = digests_of(Entries(np.array([7], np.uint64), key, value, [origin]))
    assert digests.tolist() == [0x66557A26D78F100A, 0x88E0C687FAB9E2E1]

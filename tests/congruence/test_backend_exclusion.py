"""Leaving out an example that is much of an indexed layer, or all that is near a query, hides no other entry."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router_service.arrays import ExampleRef, Provenance
from router_service.backends.base import Backend, Compression, Metric, SearchOptions
from tests.congruence.knn_reference import assert_nearest, clustered_entries, filled
from tests.engines import require_compression

ENTRIES = 2500
K = 32
BOOK, ABSENT = ExampleRef("bible", "book"), ExampleRef("bible", "not stored")


@pytest.mark.parametrize("label", ["none", "int8", "pca12+float16"])
@pytest.mark.parametrize("share", [0.02, 0.8, 0.95, 0.999])
def test_everything_else_is_found(backend: Backend, label: str, share: float) -> None:
    require_compression(backend, label)
    plain = clustered_entries(ENTRIES, 24)
    # Among the others up to a half, and beyond it whole clusters: the order of keys[0].
    place = np.argsort(np.argsort(plain.keys[:, 0])) / ENTRIES
    scattered = np.random.default_rng(3).random(ENTRIES)
    in_book = (place if share > 0.9 else scattered) < share
    origins = [
        replace(origin, example="book") if book else origin
        for origin, book in zip(plain.provenance, in_book, strict=True)
    ]
    entries = replace(plain, provenance=origins)
    collection = filled(backend, entries)
    collection.optimize(Compression.parse(label))
    rows = np.flatnonzero(in_book)[:30]
    options = SearchOptions(64, Compression.parse(label).oversampling)
    found = collection.search(entries.keys[rows], K, options, [BOOK])
    assert_nearest(found, entries, entries.keys[rows], K, Metric.EUCLID, [BOOK] * len(rows))


def test_each_query_leaves_out_its_own(backend: Backend) -> None:
    entries = clustered_entries(600, 24)
    collection = filled(backend, entries)
    collection.optimize()
    rows = np.arange(0, 600, 7)
    own = [ExampleRef(p.source, p.example) for p in map(entries.provenance.__getitem__, rows)]
    some: list[ExampleRef] = [ref if n % 3 else ABSENT for n, ref in enumerate(own)]
    found = collection.search(entries.keys[rows], 3, SearchOptions(128), some)
    assert_nearest(found, entries, entries.keys[rows], 3, Metric.EUCLID, list(some))


def test_an_example_with_the_words_of_another_is_not_it(backend: Backend) -> None:
    entries = clustered_entries(600, 24)
    origins = [Provenance("b" if n % 2 else "a", "x", n) for n in range(600)]
    entries = replace(entries, provenance=origins)
    collection = filled(backend, entries)
    collection.optimize()
    for ref in (ExampleRef("a", "x"), ExampleRef("b", "x"), ExampleRef("a", "b")):
        found = collection.search(entries.keys[:9], K, SearchOptions(128), [ref])
        assert_nearest(found, entries, entries.keys[:9], K, Metric.EUCLID, [ref] * 9)

"""Every compression of search keys finds the same entries at their exact distances, and is undone without a trace."""

from __future__ import annotations

import re

import numpy as np
import pytest

from router_service.arrays import Entries, ExampleRef, Provenance
from router_service.backends.base import Backend, Compression, Metric, Quantization, SearchOptions
from router_service.backends.qdrant_server.backend import ServerBackend
from router_service.errors import InvalidField
from tests.congruence.knn_reference import (
    EUCLID,
    NAME,
    OPTIONS,
    assert_distances_agree,
    assert_nearest,
    assert_slots_agree,
    clustered_entries,
    filled,
    queries_near,
    true_distances,
)
from tests.engines import require_compression

LABELS = [*Quantization, "pca12", "random24", "pca12+int8"]
# Of 32 dimensions one bit each says little: of 128 and more it does better (docs/quantization.md).
LEAST_RECALL = {"turbo1": 0.9, "binary": 0.9}


def _options(label: str) -> SearchOptions:
    return SearchOptions(128, Compression.parse(label).oversampling)


@pytest.mark.parametrize("label", LABELS)
def test_each_compression_finds_the_nearest_at_exact_distances(
    backend: Backend, label: str
) -> None:
    require_compression(backend, label)
    entries = clustered_entries(800, 32)
    collection, queries = filled(backend, entries), queries_near(entries, 200)
    true = true_distances(queries, entries.keys, Metric.EUCLID)
    collection.optimize(Compression.parse(label))
    assert collection.info().compression.label == label
    assert collection.info().indexed_entries in (0, 800)
    for k in (1, 8):
        found = collection.search(queries, k, _options(label))
        assert_slots_agree(found, entries, true, k, Metric.EUCLID)
        nearest = entries.ids[np.argsort(true, axis=1)[:, :k]]
        recall = np.mean(
            [len(set(a) & set(b)) / k for a, b in zip(found.ids, nearest, strict=True)]
        )
        assert recall >= LEAST_RECALL.get(label, 0.98)


@pytest.mark.parametrize("label", LABELS)
def test_a_layer_of_a_few_hundred_entries_is_searched_exactly(backend: Backend, label: str) -> None:
    """Keys without clusters, of which the codes say least, in every state of the index."""
    require_compression(backend, label)
    random = np.random.default_rng(7)
    keys = random.normal(size=(400, 32)).astype(np.float32)
    origins = [Provenance()] * len(keys)
    entries = Entries(np.arange(400, dtype=np.uint64), keys, keys[:, :6], origins)
    collection = filled(backend, entries.slice(0, 300))
    queries = random.normal(size=(64, 32)).astype(np.float32)
    collection.optimize(Compression.parse(label))
    for least, most in ((0, 300), (0, 400), (150, 400)):
        if most > 300:
            collection.upsert(entries.slice(300, 400))
        if least:
            collection.delete(entries.ids[:least])
        there = entries.slice(least, most)
        found = collection.search(queries, 10, SearchOptions())
        assert_nearest(found, there, queries, 10, Metric.EUCLID)


@pytest.mark.parametrize("label", ["turbo4", "pca12+float16"])
def test_under_the_cosine_metric(backend: Backend, label: str) -> None:
    require_compression(backend, label)
    entries = clustered_entries(700, 32)
    collection = filled(backend, entries, Metric.COSINE)
    queries = queries_near(entries, 60)
    true = true_distances(queries, entries.keys, Metric.COSINE)
    collection.optimize(Compression.parse(label))
    found = collection.search(queries, 1, _options(label))
    assert_slots_agree(found, entries, true, 1, Metric.COSINE)
    assert_distances_agree(found.distances[:, 0], true.min(axis=1), Metric.COSINE)


def test_entries_written_and_deleted_under_search_keys_apart(backend: Backend) -> None:
    require_compression(backend, "pca8+float16")
    entries = clustered_entries(600, 16)
    collection = filled(backend, entries.slice(0, 500))
    collection.optimize(Compression.parse("pca8+float16"))
    collection.upsert(entries.slice(500, 600))
    assert collection.delete(entries.ids[:50]) == 50
    found = collection.search(entries.keys, 1, OPTIONS)
    np.testing.assert_array_equal(found.ids[50:, 0], entries.ids[50:])
    assert not np.isin(found.ids[:, 0], entries.ids[:50]).any()
    page = collection.scroll(None, 1000)
    assert page.keys.tobytes() == entries.keys[50:].tobytes()
    assert list(page.provenance) == list(entries.provenance[50:])


def test_exclusions_hold_under_search_keys_apart(backend: Backend) -> None:
    require_compression(backend, "random8")
    entries = clustered_entries(600, 16)
    collection = filled(backend, entries)
    collection.optimize(Compression.parse("random8"))
    own = [ExampleRef(each.source, each.example) for each in entries.provenance]
    found = collection.search(entries.keys, 4, OPTIONS, own)
    rows = (found.ids - 5) // 3
    assert not (rows // 10 == np.arange(600, dtype=np.uint64)[:, None] // np.uint64(10)).any()


def test_search_keys_apart_are_kept_too(backend: Backend) -> None:
    require_compression(backend, "pca8")
    collection = filled(backend, clustered_entries(600, 16))
    for wanted in (Compression.parse("pca8"), None):
        collection.optimize(wanted)
        assert collection.info().compression.label == "pca8"


@pytest.mark.parametrize("label", ["float16", "pca8", "random8+int8"])
def test_what_a_backend_does_not_have_is_refused_and_nothing_changes(
    backend: Backend, label: str
) -> None:
    if not isinstance(backend, ServerBackend):
        pytest.skip("this backend has every compression")
    collection = filled(backend, clustered_entries(600, 16))
    collection.optimize(Compression(Quantization.INT8))
    with pytest.raises(InvalidField, match=f"{re.escape(label)}.*--backend edge"):
        collection.optimize(Compression.parse(label))
    assert collection.info().compression.label == "int8"


def test_a_compression_is_kept_until_another_is_asked_for(backend: Backend) -> None:
    entries = clustered_entries(600, 16)
    collection = filled(backend, entries)
    for wanted, label in (
        (Compression.parse("binary"), "binary"),
        (None, "binary"),
        (Compression(Quantization.INT8), "int8"),
        (None, "int8"),
    ):
        collection.optimize(wanted)
        assert collection.info().compression.label == label
    collection.close()
    assert backend.open(NAME, EUCLID).info().compression == Compression(Quantization.INT8)


@pytest.mark.parametrize("label", ["turbo2", "pca8+float16"])
def test_back_to_none_every_answer_is_what_it_was(backend: Backend, label: str) -> None:
    require_compression(backend, label)
    entries = clustered_entries(900, 16)
    collection, queries = filled(backend, entries), queries_near(entries, 100)
    collection.optimize(Compression())
    before = collection.search(queries, 5, SearchOptions(256))
    collection.optimize(Compression.parse(label))
    collection.optimize(Compression())
    after = collection.search(queries, 5, SearchOptions(256))
    for name in ("ids", "distances", "values"):
        assert getattr(after, name).tobytes() == getattr(before, name).tobytes()
    assert collection.scroll(None, 1000).keys.tobytes() == entries.keys.tobytes()


def test_huge_and_tiny_keys_keep_their_exact_distances(backend: Backend) -> None:
    require_compression(backend, "float16")
    entries = clustered_entries(300, 16)
    keys = entries.keys.copy()
    keys[:5] *= np.float32(1e15)
    keys[5:10] *= np.float32(1e-25)
    odd = Entries(entries.ids, keys, entries.values, entries.provenance)
    collection = filled(backend, odd)
    for label in ("float16", "random8+float16"):
        collection.optimize(Compression.parse(label))
        found = collection.search(keys[10:], 1, OPTIONS)
        np.testing.assert_array_equal(found.ids[:, 0], entries.ids[10:])
        assert not found.distances.any()

"""A sample of a layer's own keys is found on every engine, by any search keys, whatever the keys are like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from router_service.arrays import F32, Entries, ExampleRef, Neighbours, Provenance
from router_service.backends.base import (
    Backend,
    Collection,
    CollectionReader,
    CollectionSpec,
    Compression,
    Metric,
    SearchOptions,
)
from router_service.errors import KeysNotFound
from router_service.memories.known_keys import require_found
from tests.congruence.knn_reference import clustered_entries
from tests.engines import require_compression

SIZE, DIMENSION = 1500, 32


def _keys(kind: str) -> np.ndarray:
    rng = np.random.default_rng(7)
    if kind == "clustered":
        return clustered_entries(SIZE, DIMENSION).keys
    centres = rng.normal(size=(5, DIMENSION))[rng.integers(0, 5, SIZE)]
    near = 1e-3 * rng.normal(size=(SIZE, DIMENSION))
    return (centres if kind == "copies" else centres + near).astype(np.float32)


def _filled(backend: Backend, keys: np.ndarray, metric: Metric = Metric.EUCLID) -> Collection:
    collection = backend.create("layer", CollectionSpec(keys.shape[1], metric, 1))
    rng = np.random.default_rng(3)
    ids = np.sort(rng.integers(0, 2**63 - 1, len(keys), dtype=np.int64)).astype(np.uint64)
    values = np.zeros((len(keys), 1), np.float32)
    collection.upsert(Entries(ids, keys, values, [Provenance()] * len(keys)))
    return collection


@pytest.mark.parametrize("label", ["none", "int8", "turbo1", "binary", "product", "pca12+int8"])
@pytest.mark.parametrize("kind", ["clustered", "copies", "nearly copies"])
def test_nothing_is_said_of_a_layer_that_is_whole(backend: Backend, label: str, kind: str) -> None:
    require_compression(backend, label)
    collection = _filled(backend, _keys(kind))
    require_found(collection, "layer 0")
    collection.optimize(Compression.parse(label))
    require_found(collection, "layer 0")


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("size", [0, 1, 40])
def test_of_small_layers(backend: Backend, metric: Metric, size: int) -> None:
    keys = 1e3 * np.random.default_rng(1).normal(size=(size, 8)).astype(np.float32)
    require_found(_filled(backend, keys, metric), "layer 0")


class _Seeing(CollectionReader):
    """A layer whose searches find nothing, or what others are near to; `indexed`: unless they look at every entry."""

    def __init__(self, behind: Collection, *, others: bool, indexed: bool) -> None:
        self.behind, self.others, self.indexed = behind, others, indexed
        self.scroll = behind.scroll  # type: ignore[method-assign]

    def search(
        self, queries: F32, k: int, options: SearchOptions, exclude: Sequence[ExampleRef] = ()
    ) -> Neighbours:
        if options.exact and self.indexed:
            return self.behind.search(queries, k, options)
        if self.others:
            return self.behind.search(np.roll(queries, 1, axis=1), k, options)
        return Neighbours.empty(len(queries), k, 1)


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_searches_that_find_nothing_or_others(
    backend: Backend, others: bool, indexed: bool
) -> None:
    layer = _Seeing(_filled(backend, _keys("clustered")), others=others, indexed=indexed)
    with pytest.raises(KeysNotFound, match=r"layer 3 of memory 'law': .* 32 of 32 keys.*ext4"):
        require_found(layer, "layer 3 of memory 'law'")


class _Changing(_Seeing):
    """Before each search half of the entries go, and the others get another key."""

    def search(
        self, queries: F32, k: int, options: SearchOptions, exclude: Sequence[ExampleRef] = ()
    ) -> Neighbours:
        read = self.behind.scroll(None, SIZE)
        self.behind.delete(read.ids[: SIZE // 2])
        rest = read.slice(SIZE // 2, SIZE)
        self.behind.upsert(Entries(rest.ids, rest.keys + 9, rest.values, rest.provenance))
        return self.behind.search(queries, k, options)


def test_what_goes_or_changes_meanwhile_is_not_missed(backend: Backend) -> None:
    collection = _filled(backend, _keys("clustered"))
    require_found(_Changing(collection, others=False, indexed=False), "layer 0")

"""Shards that are made anew for other search keys: same entries, kept where they can stay, sound when it fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from router_service.backends.base import Compression, SearchOptions
from router_service.backends.edge.backend import EdgeBackend, EdgeCollection
from router_service.backends.edge.search_keys import FILE
from router_service.errors import CorruptMemory, StorageError
from tests.unit.router_service.backends.numbered_entries import SPEC, numbered_entries

PCA = Compression.parse("pca4")


def search_keys_file(data_dir: Path) -> Path:
    (found,) = data_dir.rglob(FILE)
    return found


@pytest.fixture
def reduced(collection: EdgeCollection) -> EdgeCollection:
    collection.optimize(PCA)
    return collection


def test_nothing_but_the_new_shard_is_left(reduced: EdgeCollection, data_dir: Path) -> None:
    generation = search_keys_file(data_dir).parent.parent
    assert [path.name for path in (data_dir / "layer").glob("gen-*")] == [generation.name]
    assert sorted(path.name for path in generation.iterdir()) == [
        "shard",
        "sums.json",
        "values.npz",
        "writes.log",
    ]
    assert reduced.info().indexed_entries == 600


def test_search_keys_stay_until_the_entries_have_doubled(
    reduced: EdgeCollection, data_dir: Path
) -> None:
    before = search_keys_file(data_dir).read_bytes()
    reduced.optimize()
    assert search_keys_file(data_dir).read_bytes() == before
    reduced.upsert(numbered_entries(0, 1201))
    reduced.optimize()
    assert search_keys_file(data_dir).read_bytes() != before


def test_without_their_file_nothing_is_answered(
    edge: EdgeBackend, reduced: EdgeCollection, data_dir: Path
) -> None:
    reduced.close()
    search_keys_file(data_dir).unlink()
    with pytest.raises(CorruptMemory, match=FILE):
        edge.open("layer", SPEC)


def test_a_rebuild_that_fails_changes_nothing(reduced: EdgeCollection, data_dir: Path) -> None:
    entries = numbered_entries(0, 600)
    search_keys_file(data_dir).write_bytes(b"damaged")
    with pytest.raises(StorageError, match="optimizing"):
        reduced.optimize(Compression.parse("random3"))
    assert reduced.info().compression == PCA
    found = reduced.search(entries.keys, 1, SearchOptions())
    np.testing.assert_array_equal(found.ids[:, 0], entries.ids)
    assert len(list((data_dir / "layer").glob("gen-*"))) == 1

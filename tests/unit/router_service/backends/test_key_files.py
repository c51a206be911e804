"""Keys that are read from the engine's files: those that are there, and no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from router_service.arrays import key_digests
from router_service.backends.base import CollectionSpec, Compression, Metric
from router_service.backends.edge.backend import EdgeBackend
from router_service.backends.edge.files import CollectionFiles
from router_service.backends.edge.key_files import SoughtKeys, read_keys
from tests.congruence.knn_reference import clustered_entries


def test_all_keys_are_in_the_files_whatever_the_search_keys(fast_dir: Path) -> None:
    backend, entries = EdgeBackend(fast_dir, min_free_bytes=0), clustered_entries(300, 16)
    for label in ("none", "int8", "pca8"):
        collection = backend.create(label, CollectionSpec(16, Metric.EUCLID, 6))
        collection.upsert(entries.slice(0, 250))
        collection.optimize(Compression.parse(label))
        collection.upsert(entries.slice(250, 300))
        sought = SoughtKeys(entries.ids, key_digests(entries.keys))
        files = CollectionFiles(fast_dir, label)
        for keys in read_keys(files.shard(files.read().generation), 16, 64):
            assert len(keys) <= 64
            sought.take(key_digests(keys))
        assert not len(sought.left), label
    backend.close()


def test_files_that_are_not_there_or_are_others(tmp_path: Path) -> None:
    assert list(read_keys(tmp_path, 16, 64)) == []
    vectors = tmp_path / "segments/a/vector_storage/vectors"
    vectors.mkdir(parents=True)
    (vectors / "chunk_0.mmap").write_bytes(np.arange(40, dtype="<f4").tobytes() + b"cut")
    [keys] = read_keys(tmp_path, 16, 64)
    assert keys.tolist() == np.arange(32.0).reshape(2, 16).tolist()


def test_of_entries_with_the_same_key_each_is_found_once() -> None:
    ids, digests = np.arange(5, dtype=np.uint64), np.array([7, 8, 7, 9, 7], np.uint64)
    sought = SoughtKeys(ids, digests)
    found, rows = sought.take(np.array([1, 8, 7, 7], np.uint64))
    assert sorted(zip(found.tolist(), rows.tolist(), strict=True)) == [
        (0, 2),
        (1, 1),
        (2, 2),
        (4, 2),
    ]
    assert sought.take(np.array([7, 8], np.uint64))[0].tolist() == []
    assert sought.left.tolist() == [3]

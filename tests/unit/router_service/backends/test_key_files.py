"""Keys from files that others replace meanwhile."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from router_service.backends.edge.key_files import read_keys
from router_service.errors import StorageError

KEYS = np.arange(1, 33, dtype=np.float32).reshape(8, 4)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    for segment in ("a", "b"):
        vectors = tmp_path / f"shard/segments/{segment}/vector_storage/vectors"
        vectors.mkdir(parents=True)
        KEYS.tofile(vectors / "chunk_0.mmap")
    return tmp_path / "shard"


def test_keys_are_read_until_the_files_go(shard: Path) -> None:
    pages = read_keys(shard, 4, 8)
    np.testing.assert_array_equal(next(pages), KEYS)
    shutil.rmtree(shard)
    assert list(pages) == []
    assert list(read_keys(shard, 4, 8)) == []


def test_files_that_go_while_they_are_listed(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = os.scandir

    def going(path: Path) -> object:
        if isinstance(path, Path) and path.name == "vectors":
            monkeypatch.undo()
            shutil.rmtree(shard)
        return listed(path)

    monkeypatch.setattr(os, "scandir", going)
    assert list(read_keys(shard, 4, 8)) == []


def test_a_file_that_cannot_be_read_is_named(shard: Path) -> None:
    path = shard / "segments/a/vector_storage/vectors/chunk_1.mmap"
    path.mkdir()
    with pytest.raises(StorageError, match=f"read {path}"):
        list(read_keys(shard, 4, 8))

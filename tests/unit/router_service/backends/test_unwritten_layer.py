"""A layer without entries is nothing to the engine; its first entry makes its files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from router_service.backends.base import Compression, Quantization
from router_service.backends.edge import unwritten
from router_service.backends.edge.backend import EdgeBackend
from router_service.backends.edge.engine import EngineShard
from router_service.backends.edge.unwritten import UnwrittenShard
from router_service.errors import CorruptMemory, StorageError
from tests.unit.router_service.backends.numbered_entries import (
    OPTIONS,
    SPEC,
    assert_holds,
    numbered_entries,
)


@pytest.fixture
def shard(data_dir: Path) -> Path:
    """Where the engine's files of the layer come to lie."""
    return data_dir / "layer" / "gen-000000" / "shard"


def test_it_has_no_files_of_the_engine(edge: EdgeBackend, shard: Path) -> None:
    made = edge.create("layer", SPEC)
    for _ in range(2):
        assert list(shard.iterdir()) == []
        assert isinstance(made._served.now.shard, UnwrittenShard)
        assert made.info().entries == 0
        found = made.search(numbered_entries(0, 3).keys, 2, OPTIONS)
        assert np.isinf(found.distances).all()
        assert made.delete(np.array([1], np.uint64)) == 0
        assert made.provenance(np.array([1], np.uint64)) == {}
        assert made.scroll(None, 10).keys.shape == (0, SPEC.dimension)
        made.optimize()
        made.flush()
        made.close()
        made = edge.open("layer", SPEC)
    made.upsert(numbered_entries(0, 10))
    assert_holds(made, 10)
    made.close()
    assert_holds(edge.open("layer", SPEC), 10)


def test_the_compression_of_an_empty_layer(edge: EdgeBackend) -> None:
    made = edge.create("layer", SPEC)
    made.optimize(Compression(Quantization.INT8))
    assert made.info().compression == Compression(Quantization.INT8)
    made.upsert(numbered_entries(0, 10))
    assert_holds(made, 10)


def test_a_crash_before_the_first_entry(
    edge: EdgeBackend, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = edge.create("layer", SPEC)

    def full(_: Path) -> None:
        raise StorageError("the disk failed")

    monkeypatch.setattr(unwritten, "fsync_tree", full)
    with pytest.raises(StorageError, match="the disk failed"):
        made.upsert(numbered_entries(0, 10))
    monkeypatch.undo()
    assert list(shard.iterdir()) == []
    left = unwritten._begun(shard)
    assert left.exists()
    made.close()
    again = edge.open("layer", SPEC)
    assert not left.exists()
    assert again.info().entries == 0
    again.upsert(numbered_entries(0, 10))
    assert_holds(again, 10)


def test_a_copy_that_leaves_empty_directories_out(edge: EdgeBackend, shard: Path) -> None:
    edge.create("layer", SPEC).close()
    shard.rmdir()
    again = edge.open("layer", SPEC)
    again.upsert(numbered_entries(0, 10))
    assert_holds(again, 10)


def test_files_that_vanished_are_noticed(edge: EdgeBackend, shard: Path) -> None:
    made = edge.create("layer", SPEC)
    made.upsert(numbered_entries(0, 10))
    made.close()
    shutil.rmtree(shard)
    with pytest.raises(CorruptMemory, match="0 entries, 10 when it was closed"):
        edge.open("layer", SPEC)


def test_one_that_an_earlier_version_made(edge: EdgeBackend, shard: Path) -> None:
    edge.create("layer", SPEC).close()
    shard.rmdir()
    EngineShard.create(shard, SPEC).close()
    assert edge.open("layer", SPEC).info().entries == 0

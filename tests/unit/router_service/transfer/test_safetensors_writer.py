"""A safetensors file that is put together from columns on disk is the one that the library would write."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from router_service.arrays import Entries, Provenance
from router_service.transfer.entry_fields import FileError
from router_service.transfer.file import FileFormat, open_writer, read_metadata
from tests.unit.router_service.transfer.entry_rows import SPARSE, read_batches


def make_entries(first: int, count: int) -> Entries:
    ids = np.arange(first, first + count, dtype=np.uint64)
    keys = np.arange(3 * count, dtype=np.float32).reshape(count, 3) + first
    values = np.tile(np.array([1, 3, 0.25, 0.75], np.float32), (count, 1))
    return Entries(ids, keys, values, [Provenance("s", f"e{i}", i) for i in range(count)])


def test_layers_in_several_parts(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    writer = open_writer(path, SPARSE, FileFormat.SAFETENSORS, {"knnmoe": '{"a": "ü"}'})
    parts = [(0, make_entries(0, 2)), (0, make_entries(2, 3)), (2, make_entries(9, 1))]
    for layer, entries in parts:
        writer.append(layer, entries)
    writer.finish()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    loaded = load_file(path)
    assert loaded["layers.0.ids"].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(
        loaded["layers.0.keys"], np.concatenate([parts[0][1].keys, parts[1][1].keys])
    )
    assert loaded["layers.2.experts"].tolist() == [[1, 3]]
    assert loaded["layers.2.weights"].dtype == np.float32
    assert read_metadata(path)["knnmoe"] == '{"a": "ü"}'
    read = [batch for batch in read_batches(path, SPARSE) if batch.layer == 0]
    origins = [origin for batch in read for origin in batch.entries.provenance]
    assert origins == [*parts[0][1].provenance, *parts[1][1].provenance]


def test_the_tensors_begin_at_a_multiple_of_eight(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    writer = open_writer(path, SPARSE, FileFormat.SAFETENSORS)
    writer.append(1, make_entries(0, 3))
    writer.finish()
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0
    header = json.loads(content[8 : 8 + size])
    starts = [entry["data_offsets"][0] for name, entry in header.items() if name[0] != "_"]
    assert all(start % 4 == 0 for start in starts)


def test_provenance_that_no_header_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = "router_service.transfer.safetensors.MAX_HEADER_BYTES"
    monkeypatch.setattr(limit, 500)
    with closing(open_writer(tmp_path / "x.safetensors", SPARSE, FileFormat.SAFETENSORS)) as writer:
        writer.append(0, make_entries(0, 1))
        with pytest.raises(FileError, match="a large memory needs Parquet"):
            writer.append(0, make_entries(1, 30))


def test_the_file_is_as_readable_as_any(tmp_path: Path) -> None:
    """The library's own would be only its owner's."""
    path, other = tmp_path / "x.safetensors", tmp_path / "other"
    other.touch()
    writer = open_writer(path, SPARSE, FileFormat.SAFETENSORS)
    writer.append(0, make_entries(0, 1))
    writer.finish()
    assert path.stat().st_mode == other.stat().st_mode


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    writer = open_writer(path, SPARSE, FileFormat.SAFETENSORS)
    writer.finish()
    writer.close()
    assert load_file(path) == {}
    assert read_batches(path, SPARSE) == []

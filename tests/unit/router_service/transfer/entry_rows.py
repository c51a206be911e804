"""Rows of entries and files of them, for the tests of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from router_service.memories.settings import Kind
from router_service.transfer.endpoints import Batch, EntryShape
from router_service.transfer.entry_fields import FileError
from router_service.transfer.file import open_reader

DELTAS = EntryShape(Kind.LOGIT_DELTA, hidden_size=3, num_experts=4, top_k=2)
SPARSE = EntryShape(Kind.ASSIGNMENT, hidden_size=3, num_experts=4, top_k=2)
LOGITS = EntryShape(Kind.LOGITS, hidden_size=3, num_experts=4, top_k=2)
SUFFIXES = ("jsonl", "parquet", "safetensors")


def make_row(**changes: Any) -> dict[str, Any]:
    row = {"id": 7, "layer": 1, "key": [1.0, 2.0, 3.0], "value": [0.0, 0.5, -0.5, 1.0]}
    return {name: value for name, value in (row | changes).items() if value is not None}


def make_sparse_row(**changes: Any) -> dict[str, Any]:
    return make_row(**{"value": None, "experts": [0, 3], "weights": [0.25, 0.75]} | changes)


def write_jsonl(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def write_parquet(tmp_path: Path, *rows: dict[str, Any], schema: pa.Schema | None = None) -> Path:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)
    return path


def read_batches(path: Path, shape: EntryShape = DELTAS, layer: int | None = None) -> list[Batch]:
    return list(open_reader(path, shape, layer).read())


def error_of(path: Path, shape: EntryShape = DELTAS) -> str:
    with pytest.raises(FileError) as caught:
        read_batches(path, shape)
    assert str(caught.value).startswith(str(path))
    return str(caught.value).removeprefix(f"{path}: ")

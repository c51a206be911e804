"""Parquet files of entries, and errors that name the file, the row and the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.router_service.transfer.entry_rows import (
    error_of,
    make_row,
    read_batches,
    write_parquet,
)

BAD_PARQUET_ROWS = {
    "short key": (make_row(key=[1.0]), "row 2: key: got 1, expected 3 numbers (hidden_size)"),
    "no key": (make_row(key=None), "row 2: key: got null, expected 3 numbers"),
    "null in key": (make_row(key=[1.0, None, 3.0]), "row 2: key[1]: got nan"),
    "NaN": (make_row(value=[0.0, 1.0, float("nan"), 1.0]), "row 2: value[2]: got nan"),
    "1e300": (make_row(key=[1.0, 1e300, 1.0]), "row 2: key[1]: got 1e+300"),
    "no id": (make_row(id=None), "row 2: id: missing"),
    "id -1": (make_row(id=-1), "row 2: id: got -1"),
    "no layer": (make_row(layer=None), "row 2: layer: missing"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_PARQUET_ROWS.values(), ids=list(BAD_PARQUET_ROWS))
def test_bad_parquet_rows(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    assert error_of(write_parquet(tmp_path, make_row(), bad)).startswith(message)


def test_row_numbers_go_on_over_batches(tmp_path: Path) -> None:
    rows = [make_row(id=n) for n in range(3000)]
    rows[2500]["key"] = [1.0]
    assert error_of(write_parquet(tmp_path, *rows)).startswith("row 2501: key")


def test_parquet_columns_of_a_wrong_type(tmp_path: Path) -> None:
    assert "key: got string, expected a list of numbers" in error_of(
        write_parquet(tmp_path, make_row(key="abc"))
    )
    assert "'colour': unknown field" in error_of(write_parquet(tmp_path, make_row(colour=1)))
    assert "value: missing" in error_of(write_parquet(tmp_path, make_row(value=None)))


@pytest.mark.parametrize("list_type", [pa.list_, pa.large_list, lambda t: pa.list_(t, 3)])
@pytest.mark.parametrize("number", ["float16", "float32", "float64", "int8"])
def test_any_list_of_numbers_will_do(tmp_path: Path, list_type: Any, number: str) -> None:
    keys = np.array([[1, 2, 3]], number)
    columns = {
        "id": pa.array([1]),
        "layer": pa.array([0]),
        "key": pa.array(list(keys), list_type(pa.from_numpy_dtype(keys.dtype))),
        "value": pa.array([[0.0] * 4]),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    [batch] = read_batches(tmp_path / "x.parquet")
    assert batch.entries.keys.tolist() == [[1, 2, 3]]


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, *[make_row(id=n) for n in range(100)])
    path.write_bytes(path.read_bytes()[:-20])
    assert error_of(path).startswith("not a Parquet file of entries")

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_service.arrays import NO_ID
from router_service.backends.edge.generation import ValueTable
from router_service.errors import CorruptMemory

WIDTH = 2
batches = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=12), max_size=12)


def empty() -> ValueTable:
    return ValueTable(np.empty(0, np.uint64), np.empty((0, WIDTH), np.float32))


def rows(numbers: list[int]) -> np.ndarray:
    return np.array([[n, -n] for n in numbers], np.float32).reshape(-1, WIDTH)


def filled(ids: list[int]) -> ValueTable:
    return empty().with_rows(np.array(ids, np.uint64), rows(ids))


@given(batches)
def test_every_table_of_a_history_stays_what_it_was(history: list[list[int]]) -> None:
    table, model, number = empty(), {}, 0
    snapshots = []
    for ids in history:
        numbers = list(range(number, number + len(ids)))
        number += len(ids)
        table = table.with_rows(np.array(ids, np.uint64), rows(numbers))
        model = model | dict(zip(ids, numbers, strict=True))
        snapshots.append((table, model))
    for snapshot, expected in snapshots:
        assert len(snapshot) == len(expected)
        found = snapshot.gather(np.array(list(expected), np.uint64))
        np.testing.assert_array_equal(found, rows(list(expected.values())))


def test_rows_are_gathered_in_the_shape_of_the_ids() -> None:
    ids = np.array([[7, NO_ID], [3, 7]], np.uint64)
    np.testing.assert_array_equal(
        filled([3, 7]).gather(ids), np.array([[[7, -7], [0, 0]], [[3, -3], [7, -7]]], np.float32)
    )


@pytest.mark.parametrize("table", [empty(), filled([3, 7])])
def test_an_id_without_a_row_is_an_error_not_a_zero(table: ValueTable) -> None:
    assert not table.gather(np.array([NO_ID])).any()
    with pytest.raises(CorruptMemory, match="5"):
        table.gather(np.array([5, NO_ID], np.uint64))


def test_overwritten_rows_do_not_pile_up() -> None:
    table = filled(list(range(100)))
    for _ in range(200):
        table = table.with_rows(np.arange(100, dtype=np.uint64), np.ones((100, WIDTH), np.float32))
    assert len(table._rows.array) < 3000


def test_a_saved_table_comes_back(tmp_path: Path) -> None:
    filled([9, 3, 5]).with_rows(np.array([5], np.uint64), rows([50])).save(tmp_path / "t")
    loaded = ValueTable.load(tmp_path / "t", WIDTH)
    assert loaded is not None
    ids = np.array([3, 5, 9], np.uint64)
    np.testing.assert_array_equal(loaded.gather(ids), rows([3, 50, 9]))
    np.testing.assert_array_equal(
        loaded.with_rows(ids[:1], rows([8])).gather(ids), rows([8, 50, 9])
    )


@pytest.mark.parametrize("kept", [0, 1, 100, 400, -1])
def test_a_damaged_saved_table_is_none(tmp_path: Path, kept: int) -> None:
    filled(list(range(50))).save(tmp_path / "t")
    content = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(content[:kept])
    assert ValueTable.load(tmp_path / "t", WIDTH) is None


def test_a_saved_table_with_a_flipped_byte_or_of_another_width_is_none(tmp_path: Path) -> None:
    filled(list(range(50))).save(tmp_path / "t")
    assert ValueTable.load(tmp_path / "t", WIDTH + 1) is None
    content = bytearray((tmp_path / "t").read_bytes())
    content[len(content) // 2] ^= 0x40
    (tmp_path / "t").write_bytes(content)
    assert ValueTable.load(tmp_path / "t", WIDTH) is None
    assert ValueTable.load(tmp_path / "none", WIDTH) is None

"""Files of entries: what is written is read back, in batches."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from knnmoe.entry_ids import entry_id

from router_service.arrays import Entries, Provenance
from router_service.memories.settings import Kind
from router_service.transfer import entry_fields as fields
from router_service.transfer.endpoints import Batch, EntryShape
from router_service.transfer.entry_fields import regroup
from router_service.transfer.file import format_of, open_reader, open_writer
from tests.unit.router_service.transfer.entry_rows import (
    DELTAS,
    LOGITS,
    SPARSE,
    SUFFIXES,
    error_of,
    make_row,
    read_batches,
    write_jsonl,
    write_parquet,
)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("shape", [DELTAS, SPARSE, LOGITS], ids=lambda shape: shape.kind)
def test_round_trip(tmp_path: Path, suffix: str, shape: EntryShape) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / f"x.{suffix}"
    values = rng.standard_normal((5, shape.value_width)).astype(np.float32)
    if shape.kind is Kind.ASSIGNMENT:
        values[:, :2] = rng.integers(0, 4, (5, 2))
    origins = [Provenance("täxt", "e", n, n - 1, 0.1 * n, 2**40) for n in range(5)]
    origins[1] = replace(
        origins[1], snippet='the "ténant" \U0001f600\n', token_start=4, token_end=12
    )
    origins[2] = replace(origins[2], snippet="where it is, nobody knows")
    keys = rng.standard_normal((5, 3)).astype(np.float32)
    entries = Entries(np.array([0, 1, 2, 3, 2**63 - 1], np.uint64), keys, values, origins)
    writer = open_writer(path, shape, format_of(path))
    writer.append(0, entries.slice(0, 2))
    writer.append(2, entries.slice(2, 5))
    writer.finish()
    reader = open_reader(path, shape, None)
    assert reader.entries == 5
    first, second = reader.read()
    assert (first.layer, second.layer) == (0, 2)
    for batch, wanted in ((first, entries.slice(0, 2)), (second, entries.slice(2, 5))):
        for field in ("ids", "keys", "values"):
            assert np.array_equal(getattr(batch.entries, field), getattr(wanted, field))
        for got, origin in zip(batch.entries.provenance, wanted.provenance, strict=True):
            assert got.gain == pytest.approx(origin.gain)
            assert (got.source, got.position, got.token) == (
                origin.source,
                origin.position,
                origin.token,
            )
            assert got.created_unix_ms == origin.created_unix_ms


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_ids_and_layers_may_be_left_out(tmp_path: Path, write: Any) -> None:
    rows = [make_row(id=None, layer=None, source="a", example="b", position=p) for p in (5, 6)]
    [batch] = read_batches(write(tmp_path, *rows), layer=9)
    assert batch.layer == 9
    assert batch.entries.ids.tolist() == [entry_id("a", "b", 5), entry_id("a", "b", 6)]
    assert list(batch.rows) == [1, 2]


def test_rows_of_several_layers_are_sorted_out(tmp_path: Path) -> None:
    batches = read_batches(write_jsonl(tmp_path, *[make_row(id=n, layer=n % 2) for n in range(5)]))
    assert [(b.layer, b.entries.ids.tolist(), list(b.rows)) for b in batches] == [
        (0, [0, 2, 4], [1, 3, 5]),
        (1, [1, 3], [2, 4]),
    ]


@pytest.mark.parametrize(("shape", "other"), [(DELTAS, LOGITS), (LOGITS, DELTAS)])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_logits_are_not_read_as_deltas(
    tmp_path: Path, suffix: str, shape: EntryShape, other: EntryShape
) -> None:
    path = tmp_path / f"x.{suffix}"
    writer = open_writer(path, shape, format_of(path))
    ones, origins = np.ones((1, 4), np.float32), [Provenance()]
    writer.append(0, Entries(np.ones(1, np.uint64), ones[:, :3], ones, origins))
    writer.finish()
    field = next(name for name in fields.widths(shape) if name != "key")
    assert re.search(rf"{field}.*unknown .*\({other.kind} memory\)", error_of(path, other))


def test_empty_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, "", make_row(), "  ", make_row(id=8, key=[1.0]))
    assert error_of(path).startswith("line 4: key: got 1, expected 3 numbers (hidden_size)")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for name, message in (
        ("x.csv", "unknown format"),
        ("x", "unknown format"),
        ("x.jsonl", "no such file"),
    ):
        assert error_of(tmp_path / name).startswith(message)
    (tmp_path / "d.parquet").mkdir()
    assert error_of(tmp_path / "d.parquet") == "not a file"


def test_regroup() -> None:
    def batch(layer: int, *numbers: int) -> Batch:
        ids = np.array(numbers, np.uint64)
        rows = np.zeros((len(ids), 1), np.float32)
        return Batch(layer, Entries(ids, rows, rows, [Provenance()] * len(ids)), list(numbers))

    mixed = [batch(0, 1, 2), batch(1, 3), batch(0, 4, 5, 6, 7, 8, 9), batch(1, 10)]
    regrouped = [(b.layer, b.entries.ids.tolist(), list(b.rows)) for b in regroup(mixed, 3)]
    assert sorted(regrouped) == [
        (0, [1, 2, 4], [1, 2, 4]),
        (0, [5, 6, 7], [5, 6, 7]),
        (0, [8, 9], [8, 9]),
        (1, [3, 10], [3, 10]),
    ]


def test_a_batch_fits_into_a_message() -> None:
    assert DELTAS.batch_entries == 512
    wide = EntryShape(Kind.LOGIT_DELTA, hidden_size=8192, num_experts=256, top_k=8)
    assert wide.batch_entries * (8192 + 256) * 4 <= 4 * 2**20

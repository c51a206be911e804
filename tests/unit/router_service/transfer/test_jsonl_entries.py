"""Errors in JSONL files name the file, the line and the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.router_service.transfer.entry_rows import (
    SPARSE,
    error_of,
    make_row,
    make_sparse_row,
    write_jsonl,
    write_parquet,
)

BAD_ROWS = {
    "no JSON": ("{", "line 2: Expecting"),
    "no object": ("[1]", "line 2: expected a JSON object"),
    "NaN": ('{"key": [NaN, 1, 2]}', "line 2: NaN is no JSON number"),
    "deep": ("[" * 100_000, "line 2: nested too deeply"),
    "misspelt": (
        make_row(kye=[1]),
        "line 2: 'kye': unknown field, expected one of created_unix_ms",
    ),
    "other kind": (make_sparse_row(), "line 2: 'experts': unknown field"),
    "no key": (make_row(key=None), "line 2: key: missing"),
    "no value": (make_row(value=None), "line 2: value: missing (logit_delta memory)"),
    "short key": (make_row(key=[1.0]), "line 2: key: got 1, expected 3 numbers (hidden_size)"),
    "text key": (make_row(key="abc"), "line 2: key: got 'abc', expected 3 numbers"),
    "text in key": (make_row(key=[1, "2", 3]), "line 2: key[1]: got '2', expected a number"),
    "truth in key": (make_row(key=[1, True, 3]), "line 2: key[1]: got True, expected a number"),
    "1e300": (
        make_row(key=[1, 1e300, 3]),
        "line 2: key[1]: got 1e+300, expected a finite number of f32",
    ),
    "10^400": (make_row(key=[1, 10**400, 3]), "line 2: key[1]: got 1000"),
    "long value": (
        make_row(value=[1.0] * 5),
        "line 2: value: got 5, expected 4 numbers (num_experts)",
    ),
    "id -1": (
        make_row(id=-1),
        "line 2: id: got -1, expected a whole number from 0 to 9223372036854775807",
    ),
    "id 2^63": (make_row(id=2**63), "line 2: id: got 9223372036854775808"),
    "id 1.5": (make_row(id=1.5), "line 2: id: got 1.5"),
    "id true": (make_row(id=True), "line 2: id: got True"),
    "no id": (
        make_row(id=None, source="a"),
        "line 2: id: missing, and without example, position none",
    ),
    "no layer": (make_row(layer=None), "line 2: layer: missing"),
    "layer -1": (make_row(layer=-1), "line 2: layer: got -1"),
    "source 5": (make_row(source=5), "line 2: source: got 5, expected text"),
    "surrogate": (
        '{"key": [1,2,3], "value": [1,2,3,4], "source": "\\ud800"}',
        "line 2: source: got",
    ),
    "position": (make_row(position=2**32), "line 2: position: got 4294967296"),
    "gain": (make_row(gain="big"), "line 2: gain: got 'big', expected a finite number"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS.values(), ids=list(BAD_ROWS))
def test_bad_lines(tmp_path: Path, bad: Any, message: str) -> None:
    assert error_of(write_jsonl(tmp_path, make_row(), bad)).startswith(message)


BAD_ASSIGNMENTS = {
    "expert 4 of 4": (
        make_sparse_row(experts=[0, 4]),
        "experts[1]: got 4, expected a whole number from 0 to 3",
    ),
    "expert -1": (make_sparse_row(experts=[-1, 0]), "experts[0]: got -1"),
    "3 experts": (make_sparse_row(experts=[0, 1, 2]), "experts: got 3, expected 2"),
    "3 weights": (
        make_sparse_row(weights=[1.0, 1.0, 1.0]),
        "weights: got 3, expected 2 numbers (top_k)",
    ),
    "no weights": (make_sparse_row(weights=None), "weights: missing (assignment memory)"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_ASSIGNMENTS.values(), ids=list(BAD_ASSIGNMENTS))
@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_bad_assignments(tmp_path: Path, write: Any, bad: dict[str, Any], message: str) -> None:
    rows = [bad] if message.startswith("weights: missing") else [make_sparse_row(), bad]
    assert message in error_of(write(tmp_path, *rows), SPARSE)


def test_utf8_only(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"source": "\xff"}\n')
    assert error_of(path).startswith("line 1: ")

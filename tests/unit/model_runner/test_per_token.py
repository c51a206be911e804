"""Scores by class of token, by document, and as files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from knnmoe.client import ExampleRef

from model_runner.errors import BadInput
from model_runner.evaluation.per_token import (
    DOCUMENT_COLUMNS,
    TOKEN_COLUMNS,
    by_class,
    classes_of,
    document_rows,
    require_table_file,
    token_rows,
    write_table,
)
from model_runner.scoring import Scores
from model_runner.text_files import Example
from model_runner.texts import Window, cut_windows
from model_runner.token_texts import TokenClass
from tests.tiny_checkpoint import byte_tokenizer

TOKENIZER = byte_tokenizer()
TEXTS = {"a": "x = 1\n", "b": "  né", "c": "long, long text"}


def windows() -> list[Window]:
    examples = [Example(ExampleRef("f.jsonl", name), text) for name, text in TEXTS.items()]
    return cut_windows(examples, TOKENIZER, 8)


def scores(shift: float) -> Scores:
    """Token at position p of an example has p + shift nats; windows longest first, as they are scored."""
    order = sorted(windows(), key=lambda window: -len(window.token_ids))
    tokens = [np.array([w.offset + at + shift for at in w.target_at], np.float32) for w in order]
    return Scores(
        np.array([each.sum() for each in tokens], np.float64),
        np.array([len(each) for each in tokens], np.float64),
        tuple(w.ref for w in order),
        tuple(order),
        tuple(tokens),
    )


def rows_of(given: list[Window], plain: Scores, routed: Scores) -> list[dict]:
    return list(token_rows(given, plain, routed, TOKENIZER))


def test_a_row_per_token_in_the_order_of_the_text() -> None:
    plain, routed = scores(0), scores(-0.5)
    every = list(plain.windows)
    in_order = sorted(every, key=lambda window: (window.ref.example, window.offset))
    rows = rows_of(in_order, plain, routed)
    assert [row["position"] for row in rows if row["example"] == "a"] == [1, 2, 3, 4, 5]
    assert "".join(row["text"] for row in rows if row["example"] == "a") == TEXTS["a"][1:]
    assert [row["text"] for row in rows if row["example"] == "b"] == [" ", "n", "é", "é"]
    assert [row["class"] for row in rows if row["example"] == "a"] == [
        *("whitespace", "punctuation", "whitespace", "digits", "whitespace"),
    ]
    for row in rows:
        assert row["source"] == "f.jsonl"
        assert row["nll_plain"] == row["position"]
        assert row["change"] == -0.5
        assert row["nll_memory"] == row["position"] - 0.5


def test_a_row_per_document() -> None:
    plain, routed = scores(0), scores(1)
    in_order = sorted(plain.windows, key=lambda window: (window.ref.example, window.offset))
    rows = list(document_rows(in_order, plain, routed))
    assert [row["example"] for row in rows] == ["a", "b", "c"]
    assert rows[0]["tokens"] == 5
    assert rows[0]["nll_plain"] == pytest.approx(3)
    assert [row["change"] for row in rows] == pytest.approx([1, 1, 1])
    assert sum(row["tokens"] for row in rows) == plain.targets.sum()


def test_classes_share_tokens_and_change() -> None:
    kinds = [TokenClass.WORDS, TokenClass.DIGITS, TokenClass.WORDS, TokenClass.WHITESPACE]
    plain = np.array([1, 2, 3, 4], np.float32)
    found = by_class(kinds, plain, plain + np.array([-2, 1, 0, -1], np.float32))
    assert list(found) == ["whitespace", "digits", "words"]
    words = found["words"]
    assert (words.tokens, words.nll_plain, words.change) == (2, 2, -1)
    assert words.share_of_tokens == 0.5
    assert [scores.share_of_change for scores in found.values()] == [0.5, -0.5, 1]
    for hardly in (plain, plain + np.float32(1e-6)):
        assert by_class(kinds, plain, hardly)["words"].share_of_change is None


def test_classes_of_windows() -> None:
    [first, *_] = windows()
    assert [str(kind) for kind in classes_of([first], TOKENIZER)] == [
        *("whitespace", "punctuation", "whitespace", "digits", "whitespace"),
    ]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_files(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_runner.evaluation.per_token._ROWS_PER_GROUP", 4)
    plain, routed = scores(0), scores(-0.5)
    in_order = list(plain.windows)
    for rows, columns in (
        (rows_of(in_order, plain, routed), TOKEN_COLUMNS),
        (list(document_rows(in_order, plain, routed)), DOCUMENT_COLUMNS),
    ):
        path = tmp_path / f"x.{ending}"
        write_table(path, rows, columns)
        if ending == "parquet":
            found = pq.read_table(path).to_pylist()
        else:
            found = [json.loads(line) for line in path.read_text().splitlines()]
        assert found == rows
        assert columns.names == list(rows[0])


def test_a_file_of_no_format_is_refused() -> None:
    require_table_file("--per-token", None)
    with pytest.raises(BadInput, match=r"--per-token: got x\.csv, expected .*\.parquet or \.jsonl"):
        require_table_file("--per-token", Path("x.csv"))

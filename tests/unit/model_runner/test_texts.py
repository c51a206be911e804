"""Texts from files: formats, windows, loss masks, and errors that name file, row and field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from knnmoe.client import ExampleRef

from model_runner.errors import BadInput
from model_runner.texts import Example, Window, batched, cut_windows, read_examples, read_windows
from tests.unit.model_runner.byte_tokenizer import ByteTokenizer


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_error(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        read_windows(path, ByteTokenizer(), 8)
    return str(caught.value)


def decoded(window: Window) -> str:
    return bytes(window.token_ids).decode()


def test_jsonl_rows_become_examples(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "law.jsonl",
        {"text": "one"},
        {"text": "two", "id": "b"},
        {"prompt": "2+2=", "answer": "4", "id": 7},
        {"text": "three", "id": None},
    )
    assert list(read_examples(path)) == [
        Example(ExampleRef("law.jsonl", "1"), "one"),
        Example(ExampleRef("law.jsonl", "b"), "two"),
        Example(ExampleRef("law.jsonl", "7"), "2+2=", "4"),
        Example(ExampleRef("law.jsonl", "4"), "three"),
    ]


def test_parquet_reads_as_jsonl(tmp_path: Path) -> None:
    rows = [{"text": "eins", "id": "a"}, {"text": "zwei", "id": "b"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    jsonl(tmp_path / "t.jsonl", *rows)
    from_parquet = list(read_examples(tmp_path / "t.parquet"))
    assert [(e.ref.example, e.text) for e in from_parquet] == [("a", "eins"), ("b", "zwei")]
    assert [e.text for e in read_examples(tmp_path / "t.jsonl")] == [e.text for e in from_parquet]


def test_plain_text_is_grouped_by_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"{number} " + "x" * 1500 for number in range(7)]
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(paragraphs))
    examples = list(read_examples(path))
    assert [e.ref.example for e in examples] == ["0", "1", "2"]
    assert "\n\n".join(e.text for e in examples) == "\n\n".join(paragraphs)


def test_crlf_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    text = "ein Satz\n\nnoch ein Satz\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    plain, windows = (
        next(iter(read_examples(tmp_path / name))).text for name in ("a.txt", "b.txt")
    )
    assert plain == windows == text
    assert [e.text for e in read_examples(tmp_path / "c.jsonl")] == ["a", "b"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "t.jsonl: row 3: not JSON"),
        ("[" * 100_000, "t.jsonl: row 3: not JSON"),
        ("5", "row 3: expected an object with `text`"),
        ('{"body": "x"}', r"row 3: has ['body'], expected `text`, or `prompt` and `answer`"),
        ('{"prompt": "x"}', "row 3: has ['prompt'], expected"),
        ('{"text": 5}', "row 3: `text` is int, expected a string"),
        ('{"text": null}', "row 3: `text` is NoneType, expected a string"),
        ('{"prompt": "x", "answer": ["y"]}', "row 3: `answer` is list, expected a string"),
        ('{"text": "half a \\ud800 pair"}', "row 3: `text` holds half a surrogate pair"),
        ('{"text": "x", "id": "\\udfff"}', "row 3: `id` holds half a surrogate pair"),
        ('{"text": "x", "id": "a"}', "row 3: `id` 'a' is taken by row 1"),
        ('{"text": "x", "id": 1}', None),
        (json.dumps({"text": "x", "id": "y" * 1025}), "row 3: `id` has 1025 characters"),
        ('{"text": "x", "id": "a\\u0000b"}', "no NUL"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, message: str | None) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "good", "id": "a"}\n\n' + row + "\n")
    if message is None:
        assert len(list(read_examples(path))) == 2
    else:
        assert read_error(path).startswith(f"{path}: ")
        assert message in read_error(path)


def test_rows_without_an_id_do_not_take_anothers(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", {"text": "one", "id": "2"}, {"text": "two"})
    assert "row 2: `id` '2' is taken by row 1" in read_error(path)


def write_nothing(path: Path) -> None:
    path.write_bytes(b"")


def write_blank_lines(path: Path) -> None:
    path.write_bytes(b"\n \n\n\n\n\n")


def write_binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("write", "message"),
    [(write_nothing, "no text"), (write_blank_lines, "no text"), (write_binary, "not UTF-8 text")],
)
def test_a_file_that_holds_no_text(
    tmp_path: Path, write: Callable[[Path], None], message: str, suffix: str
) -> None:
    path = tmp_path / f"t{suffix}"
    write(path)
    expected = "not a Parquet file" if suffix == ".parquet" else message
    assert read_error(path).startswith(f"{path}: ")
    assert expected in read_error(path)


def test_a_file_that_is_no_file(tmp_path: Path) -> None:
    assert read_error(tmp_path / "gone.txt") == f"{tmp_path}/gone.txt: no such file"
    assert read_error(tmp_path) == f"{tmp_path}: is a directory, expected a file"


def test_a_truncated_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": ["a" * 100] * 100}), path)
    path.write_bytes(path.read_bytes()[:-50])
    assert "not a Parquet file" in read_error(path)


def test_windows_never_cross_examples() -> None:
    examples = [
        Example(ExampleRef("s", "a"), "abcdefgh" * 2 + "xy"),
        Example(ExampleRef("s", "b"), "0123456789"),
    ]
    windows = cut_windows(examples, ByteTokenizer(), 8)
    assert [(w.ref.example, w.offset, decoded(w)) for w in windows] == [
        ("a", 0, "abcdefgh"),
        ("a", 8, "abcdefgh"),
        ("a", 16, "xy"),
        ("b", 0, "01234567"),
        ("b", 8, "89"),
    ]
    assert all(w.first_target == 1 for w in windows)


def test_scraps_are_left_out_but_short_examples_are_not() -> None:
    examples = [
        Example(ExampleRef("s", "long"), "x" * 36),
        Example(ExampleRef("s", "short"), "ab"),
        Example(ExampleRef("s", "one token"), "a"),
    ]
    windows = cut_windows(examples, ByteTokenizer(), 32)
    assert [(w.ref.example, len(w.token_ids)) for w in windows] == [("long", 32), ("short", 2)]


def test_an_answer_alone_has_a_loss() -> None:
    example = Example(ExampleRef("s", "1"), "ask: ", "yes")
    (window,) = cut_windows([example], ByteTokenizer(bos=0), 32)
    assert decoded(window) == "\x00ask: yes"
    assert (window.first_target, window.targets, window.offset) == (6, 3, 0)


def test_a_long_prompt_loses_its_beginning() -> None:
    (window,) = cut_windows(
        [Example(ExampleRef("s", "1"), "0123456789", "yes")], ByteTokenizer(), 8
    )
    assert decoded(window) == "56789yes"
    assert (window.first_target, window.offset) == (5, 5)


def test_a_long_answer_loses_its_end_and_keeps_a_prompt_token() -> None:
    (window,) = cut_windows(
        [Example(ExampleRef("s", "1"), "ask", "0123456789")], ByteTokenizer(), 8
    )
    assert decoded(window) == "k0123456"
    assert (window.first_target, window.targets) == (1, 7)


def test_no_prompt_and_no_answer() -> None:
    no_prompt = Example(ExampleRef("s", "1"), "", "yes")
    (window,) = cut_windows([no_prompt], ByteTokenizer(), 8)
    assert (decoded(window), window.first_target) == ("yes", 1)
    with pytest.raises(BadInput, match="none with 2 tokens of text, or with an answer"):
        cut_windows([Example(ExampleRef("s", "1"), "ask", "")], ByteTokenizer(), 8)


@pytest.mark.parametrize("length", [1, 0, -3])
def test_a_window_has_two_tokens(length: int) -> None:
    with pytest.raises(BadInput, match=f"got {length}, expected 2 or more"):
        cut_windows([], ByteTokenizer(), length)


@given(st.text(max_size=200), st.integers(2, 40))
def test_windows_are_the_text_in_order(text: str, length: int) -> None:
    tokens = text.encode()
    example = Example(ExampleRef("s", "1"), text)
    if len(tokens) < 2:
        return
    windows = cut_windows([example], ByteTokenizer(), length)
    for window in windows:
        part = tokens[window.offset : window.offset + length]
        assert bytes(window.token_ids) == part
    covered = sum(len(w.token_ids) for w in windows)
    assert len(tokens) - covered < max(2, length // 4)


@given(st.lists(st.integers(2, 9), max_size=20), st.integers(1, 6))
def test_batches_hold_every_window_longest_first(lengths: list[int], size: int) -> None:
    windows = [
        Window(ExampleRef("s", str(n)), (0,) * length, 1, 0) for n, length in enumerate(lengths)
    ]
    groups = list(batched(windows, size))
    flat = [w for group in groups for w in group]
    assert sorted(flat, key=lambda w: int(w.ref.example)) == windows
    assert [len(w.token_ids) for w in flat] == sorted(lengths, reverse=True)
    assert all(len(group) == size for group in groups[:-1])

"""Files of text: what a file is, rows, ids, and errors that name file, row and field."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model_runner.errors import BadInput
from model_runner.text_files import STANDARD_INPUT, read_examples
from model_runner.texts import read_windows
from tests.unit.model_runner.byte_tokenizer import ByteTokenizer


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_error(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        read_windows(path, ByteTokenizer(), 8)
    return str(caught.value)


def contents(path: Path) -> list[tuple[str, str | None]]:
    return [(example.text, example.answer) for example in read_examples(path)]


def test_jsonl_rows_become_examples(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "law.jsonl",
        {"text": "one"},
        {"text": "two", "id": "b"},
        {"prompt": "2+2=", "answer": "4", "id": 7},
        {"text": "three", "id": None},
    )
    examples = read_examples(path)
    assert contents(path) == [("one", None), ("two", None), ("2+2=", "4"), ("three", None)]
    assert [e.name for e in examples] == ["1", "b", "7", "4"]
    assert {e.ref.source for e in examples} == {"law.jsonl"}
    digests = [e.identity.partition("#")[2] for e in examples]
    assert len(set(digests)) == 4
    assert [e.ref.example for e in examples] == [f"#{digests[0]}", "b", "7", f"#{digests[3]}"]
    assert [e.identity for e in examples[1:3]] == [f"b#{digests[1]}", f"7#{digests[2]}"]


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
    assert [e.name for e in examples] == ["0", "1", "2"]
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
        (
            '{"text": "x", "prompt": "y", "answer": "z"}',
            "row 3: has `text` as well as `prompt` and",
        ),
        ('{"text": "x", "id": ["y"]}', "row 3: `id` is list, expected a string or a number"),
        ('{"messages": "x"}', "row 3: `messages` is str, expected a list"),
        ('{"messages": ["x"]}', "row 3: message 1: is str, expected `role` and `content`"),
        ('{"messages": [{"role": "user"}]}', "message 1: `content` is NoneType, expected a string"),
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


def test_a_text_is_known_by_what_it_says(tmp_path: Path) -> None:
    one, other = {"text": "one"}, {"text": "other"}
    here, there = jsonl(tmp_path / "t.jsonl", one, other), tmp_path / "t.json"
    there.write_text(json.dumps([other, one, other, one | {"id": 2}]))
    first, second = read_examples(here), read_examples(there)
    assert [e.identity for e in second[:3]] == [first[n].identity for n in (1, 0, 1)]
    assert [e.name for e in second] == ["1", "2", "3", "2"]  # row 2, and the id of row 4
    assert second[3].ref.example == "2"
    assert len({e.identity for e in second}) == 3
    jsonl(here, one | {"id": "x"}, other | {"id": "y"})
    before = [e.identity for e in read_examples(here)]
    jsonl(here, one | {"id": "x"}, {"text": "changed", "id": "y"})
    after = read_examples(here)
    assert [e.ref.example for e in after] == ["x", "y"]
    assert (after[0].identity == before[0], after[1].identity == before[1]) == (True, False)


ROWS = [
    {"text": None, "prompt": "2+2=", "answer": "4", "id": "sum"},
    {"text": 'a, "b"\nand ü', "prompt": None, "answer": None, "id": None},
]
CSV = 'text,prompt,answer,id\n,2+2=,4,sum\n"a, ""b""\nand ü",,,\n'


def as_jsonl(path: Path) -> None:
    jsonl(path, *ROWS)


def as_array(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")


def as_csv(path: Path) -> None:
    path.write_text(CSV, encoding="utf-8")


def as_tsv(path: Path) -> None:
    path.write_text('text\tprompt\tanswer\tid\r\n\t2+2=\t4\tsum\r\n"a, ""b""\nand ü"\t\t\t\r\n')


def as_semicolons(path: Path) -> None:
    path.write_text('\ufeffid;text;prompt;answer\nsum;;2+2=;4\n;"a, ""b""\nand ü";;\n')


def as_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def zipped(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def write_zipped(path: Path) -> None:
        write(path)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return write_zipped


@pytest.mark.parametrize(
    ("name", "write"),
    [
        *((name, as_jsonl) for name in ("t.jsonl", "t.JSONL", "t.ndjson", "t.jl", "t.json", "t")),
        *((name, as_array) for name in ("t.json", "t.Json", "t.jsonl", "t.bak")),
        *((name, as_csv) for name in ("t.csv", "t.CSV", "t.txt")),
        *((name, as_semicolons) for name in ("t.csv", "t")),
        *((name, as_tsv) for name in ("t.tsv", "t.csv", "t.export")),
        *((name, as_parquet) for name in ("t.parquet", "t.PARQUET", "t.pq", "t.jsonl", "t")),
        *((name, zipped(as_jsonl)) for name in ("t.jsonl.gz", "t.JSONL.GZ", "t.jsonl", "t")),
        ("t.csv.gz", zipped(as_csv)),
        ("t.json.gz", zipped(as_array)),
    ],
)
def test_a_file_is_what_its_name_or_its_look_says(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    """Nulls beside filled fields do not matter."""
    write(tmp_path / name)
    assert contents(tmp_path / name) == [("2+2=", "4"), (ROWS[1]["text"], None)]
    assert read_examples(tmp_path / name)[0].name == "sum"


@pytest.mark.parametrize(
    "text", ["[1] In the beginning", "{\\it law}", "text\nand more", "a, b\nc"]
)
def test_what_only_resembles_rows_is_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.txt").write_text(text)
    assert contents(tmp_path / "t.txt") == [(text, None)]


def test_one_object_over_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"text": "one"}, indent=2))
    assert contents(path) == [("one", None)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b'{"text": "a"}\n{"text": ', "row 2: not JSON"),
        ("t.json", b'[{"text": "a"}, {"te', "not JSON"),
        ("t.json", b'{"rows": []}', "row 1: has ['rows'], expected `text`"),
        ("t.json", b'[{"text": 1' + b"0" * 5000 + b"}]", "not JSON"),
        ("t.csv", b"question,reply\na,b\n", "has columns ['question', 'reply'], expected a header"),
        ("t.csv", b"text,id\na,1,2\n", "row 1: has 3 fields, the header names 2"),
        ("t.csv", b'text\n"a" b\n', "line 2: not CSV"),
        ("t.csv", b'text\n"a\n', "not CSV"),
        ("t.csv", b"text,id\na,1\nb,1\n", "row 2: `id` '1' is taken by row 1"),
        ("t.parquet", b'{"text": "a"}\n', "not a Parquet file (its first bytes are b'{\"te'"),
        # The time is part of it, and of the test's name: workers have to agree
        ("t.gz", gzip.compress(b"some text", mtime=0)[:-4], "not a whole gzip file"),
        ("t.docx", b"PK\x03\x04rest", "is a zip archive or an Office document, expected text"),
        ("t.pdf", b"%PDF-1.7 text", "is a PDF document"),
        ("t.jsonl.zst", b"\x28\xb5\x2f\xfdrest", "is compressed with zstd"),
        ("t.txt", "Müller".encode("latin-1"), "not UTF-8 text"),
        ("t.txt", "Müller".encode("utf-16"), "convert it, e.g. iconv"),
        ("t.txt", b"a\x00b", "holds NUL"),
    ],
)
def test_a_file_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_error(tmp_path / name).startswith(f"{tmp_path / name}: ")
    assert message in read_error(tmp_path / name)


@pytest.mark.parametrize("kind", [pa.timestamp("ns"), pa.duration("ns"), pa.binary(), pa.int64()])
def test_columns_that_nobody_asked_for(tmp_path: Path, kind: pa.DataType) -> None:
    values = [b"\xff", b"x"] if kind == pa.binary() else [1700000000000000001, 1001]
    table = pa.table({"text": ["one", "two"], "other": pa.array(values, kind)})
    pq.write_table(table, tmp_path / "t.parquet")
    assert contents(tmp_path / "t.parquet") == [("one", None), ("two", None)]
    pq.write_table(table.select(["other"]), tmp_path / "t.parquet")
    assert "has columns ['other'], expected `text`, or" in read_error(tmp_path / "t.parquet")


def test_ids_of_a_column(tmp_path: Path) -> None:
    path, texts = tmp_path / "t.parquet", ["one", "two"]
    for ids, names in (
        (pa.array([7, None]), ["7", "2"]),
        (pa.array([1700000000000000001, 5], pa.timestamp("ns")), None),
        (pa.array([float("nan"), float("nan")]), ["1", "2"]),
        (pa.array(["", "b"]), ["1", "b"]),
    ):
        pq.write_table(pa.table({"text": texts, "id": ids}), path)
        found = [e.name for e in read_examples(path)]
        assert len(set(found)) == 2
        assert names in (None, found)


def test_conversations(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "I"}]
    jsonl(tmp_path / "t.jsonl", {"messages": turns, "prompt": "who?"})
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), tmp_path / "t.parquet")
    one, other = (read_examples(tmp_path / name) for name in ("t.jsonl", "t.parquet"))
    assert list(one[0].messages) == turns
    assert one[0].identity == other[0].identity


def test_rows_left_out_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    silent = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": ""}]
    path = jsonl(
        tmp_path / "t.jsonl",
        {"prompt": "q", "answer": ""},
        {"prompt": "q", "answer": None},
        {"prompt": "q2", "answer": " x"},
        {"text": ""},
        {"text": None},
        {"messages": silent},
        {"messages": []},
        {"prompt": "", "answer": "y"},
    )
    with caplog.at_level(logging.WARNING):
        assert contents(path) == [("q2", " x"), ("", "y")]
    [said] = [record.message for record in caplog.records]
    assert said == (
        f"{path}: 6 of 8 examples left out: 2 without a turn of the assistant, "
        "2 without an answer, 2 without text"
    )


def test_standard_input_and_pipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_jsonl(tmp_path / "t.jsonl")
    as_parquet(tmp_path / "t.parquet")
    for path in (tmp_path / "t.jsonl", tmp_path / "t.parquet"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
        [one, other] = read_examples(STANDARD_INPUT)
        assert (one.text, one.answer, one.ref.source) == ("2+2=", "4", "stdin")
        assert other.identity == read_examples(path)[1].identity
        fifo = tmp_path / f"fifo{path.suffix}"
        os.mkfifo(fifo)
        writer = threading.Thread(target=fifo.write_bytes, args=[path.read_bytes()])
        writer.start()
        assert contents(fifo) == contents(path)
        writer.join()
    reader, end = os.pipe()
    with os.fdopen(end, "wb") as pipe:
        pipe.write((tmp_path / "t.jsonl").read_bytes())
    [one, _] = read_examples(Path(f"/dev/fd/{reader}"))
    os.close(reader)
    assert one.ref.source == "pipe"

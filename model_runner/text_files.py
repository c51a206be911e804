"""Examples from files, pipes and standard input, whatever their form.

Rows of `text`, of `prompt` and `answer` (the loss counts on the answer only), or of `messages` (it counts on the
assistant's turns), each with an optional `id`, as JSON, CSV or Parquet; anything else is plain text, whose paragraphs
are grouped into examples. The name's ending says which, or the look of the file (docs/formats.md).

A text is known by what it says: a digest of it is the name of an example without an id, and in what the ids of its
entries are made of.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import logging
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from knnmoe.client import ExampleRef

from model_runner.errors import BadInput

log = logging.getLogger(__name__)

# Plain text has no examples of its own: paragraphs are grouped up to about this size.
PLAIN_TEXT_EXAMPLE_CHARACTERS = 4000
# Longest id of an example that a routing service stores.
MAX_ID_CHARACTERS = 1024
STANDARD_INPUT = Path("-")


@dataclass(frozen=True, slots=True)
class Columns:
    """What rows are read for.

    Attributes:
        forms: fields of which a row has those of one form at least.
        others: fields that are read where they are there.
        wanted: the forms in words.

    """

    forms: tuple[tuple[str, ...], ...]
    others: tuple[str, ...]
    wanted: str

    @property
    def fields(self) -> tuple[str, ...]:
        """All of them."""
        return (*(field for form in self.forms for field in form), *self.others)

    def known(self, names: Iterable[str]) -> bool:
        """Whether a table with these columns has what is wanted."""
        there = set(names)
        return any(set(form) <= there for form in self.forms)


_WANTED = "`text`, or `prompt` and `answer`, or `messages`"
_COLUMNS = Columns((("messages",), ("text",), ("prompt", "answer")), ("id",), _WANTED)
_JSON_ENDINGS, _CSV_ENDINGS = (".jsonl", ".ndjson", ".jl", ".json"), (".csv", ".tsv")
_LOOKS_LIKE_JSON = re.compile(r'\s*\[?\s*\{\s*"[^"\n]*"\s*:')
_PARQUET, _GZIP = b"PAR1", b"\x1f\x8b"
# What begins like this is no text, whatever its name says.
_REFUSED = {
    b"PK\x03\x04": "a zip archive or an Office document",
    b"%PDF": "a PDF document",
    b"{\\rtf": "an RTF document",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "an SQLite database",
}
ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Example:
    """One document, one prompt with its answer, or one conversation.

    Attributes:
        text: the document, or the prompt before the answer; empty for a conversation.
        answer: the loss counts on it only.
        messages: turns with `role` and `content`; the loss counts on the assistant's only, unless their `weight` is 0.
        identity: what the ids of its entries are made of; empty: the example's name.
        name: what its file calls it: its id, or the number of its row; empty: the example's name.

    """

    ref: ExampleRef
    text: str
    answer: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    identity: str = ""
    name: str = ""


def read_examples(path: Path) -> list[Example]:
    """Examples of a file, a pipe or (`-`) standard input, in order; the source's name is the file's.

    Rows without an answer or a text are left out; a warning says how many. Raises BadInput naming file, row and field.
    """
    found = _content(path, _COLUMNS)
    return _plain_examples(path, found) if isinstance(found, str) else _from_rows(path, found)


def read_rows(path: Path, columns: Columns) -> list[tuple[int, Mapping[str, Any]]]:
    """Rows of a file of JSON, CSV or Parquet with their numbers, whatever their schema.

    Fields that nobody asked for may be there. Raises BadInput naming the file, and the row that lacks a form.
    """
    found = _content(path, columns)
    if isinstance(found, str):
        raise BadInput(
            f"{path}: is plain text, expected JSON, CSV or Parquet with {columns.wanted}"
        )
    for number, row in found:
        if not isinstance(row, dict) or not columns.known(
            k for k, v in row.items() if v is not None
        ):
            has = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise BadInput(f"{path}: row {number}: has {has}, expected {columns.wanted}")
    return found


def examples_of(rows: Iterable[Mapping[str, Any]], source: str) -> list[Example]:
    """Examples of rows as a file named `source` would hold them. Raises BadInput naming source, row and field."""
    if not source or Path(source).name != source:
        raise BadInput(f"source: got {source!r}, expected a name without /")
    return _from_rows(Path(source), enumerate(rows, 1))


def say_left_out(source: str, left_out: Counter[str], total: int) -> None:
    """Warns of examples that are left out, by reason."""
    if number := left_out.total():
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
        log.warning("%s: %d of %d examples left out: %s", source, number, total, why)


def _opened(path: Path) -> IO[bytes]:
    """A file to seek in. What cannot is read to its end."""
    if path == STANDARD_INPUT:
        return io.BytesIO(sys.stdin.buffer.read())
    return path.open("rb") if path.is_file() else io.BytesIO(path.read_bytes())


def _source_name(path: Path) -> str:
    if path == STANDARD_INPUT:
        return "stdin"
    # What a shell makes of <(command).
    return "pipe" if str(path).startswith(("/dev/fd/", "/proc/")) else path.name


def _content(path: Path, columns: Columns) -> list[tuple[int, Any]] | str:
    """Rows with their numbers, or plain text. Raises BadInput."""
    if path != STANDARD_INPUT and not path.exists():
        raise BadInput(f"{path}: no such file")
    if path.is_dir():
        raise BadInput(f"{path}: is a directory, expected a file")
    try:
        with closing(_opened(path)) as file:
            found = _rows_or_text(path, file, columns)
            return found if isinstance(found, str) else list(found)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error})") from error


def _rows_or_text(path: Path, file: IO[bytes], columns: Columns) -> Iterable[tuple[int, Any]] | str:
    """By what the file is: its first bytes first, then its name's ending, then its look."""
    head = file.read(16)
    file.seek(0)
    if head.startswith(_GZIP):
        file = io.BytesIO(_unpacked(path, file))
        head = file.getvalue()[:16]
    for magic, what in _REFUSED.items():
        if head.startswith(magic):
            raise BadInput(f"{path}: is {what}, expected text, JSON, CSV or Parquet")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    ending = next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), "")
    if head.startswith(_PARQUET):
        return _parquet_rows(path, file, columns)
    if ending == ".parquet":
        raise BadInput(f"{path}: not a Parquet file (its first bytes are {head[:4]!r})")
    text = _decoded(path, file.read())
    if ending in _JSON_ENDINGS or (ending not in _CSV_ENDINGS and _LOOKS_LIKE_JSON.match(text)):
        return _json_rows(path, text)
    delimiter = _delimiter(text, ending, columns)
    if ending in _CSV_ENDINGS or delimiter is not None:
        return _csv_rows(path, text, delimiter or ",", columns)
    return text


def _unpacked(path: Path, file: IO[bytes]) -> bytes:
    try:
        return gzip.decompress(file.read())
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: not a whole gzip file ({error})") from error


def _decoded(path: Path, data: bytes) -> str:
    """Text whose lines end with LF. Raises BadInput unless it is UTF-8 without NUL."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path}: not UTF-8 text ({error}); convert it, e.g. iconv -f ISO-8859-1 -t UTF-8"
        ) from error
    if "\0" in text:
        raise BadInput(
            f"{path}: holds NUL, as binary files do; expected text, JSON, CSV or Parquet"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Of an array, of one object, or of a line each."""
    start = text.lstrip()
    if start.startswith("["):
        yield from enumerate(_json(f"{path}", start), 1)
        return
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if lines and start.startswith("{") and lines[0][1].rstrip()[-1] in "{,":
        yield 1, _json(f"{path}", start)  # one object over several lines
        return
    for number, line in lines:
        yield number, _json(f"{path}: row {number}", line)


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON ({error})") from error


def _parquet_rows(path: Path, file: IO[bytes], columns: Columns) -> Iterator[tuple[int, Any]]:
    """Columns that nobody asks for are not read: some hold what Python cannot."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
        names = [name for name in columns.fields if name in parquet.schema_arrow.names]
        if not columns.known(names):
            has = parquet.schema_arrow.names
            raise BadInput(f"{path}: has columns {has}, expected {columns.wanted}")
        table = parquet.read(columns=names)
        if "id" in names and not pa.types.is_floating(table.schema.field("id").type):
            at = table.schema.get_field_index("id")
            table = table.set_column(at, "id", table.column(at).cast(pa.string()))
        rows = table.to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise BadInput(f"{path}: not a Parquet file of {columns.wanted} ({error})") from error
    yield from enumerate(rows, 1)


def _delimiter(text: str, ending: str, columns: Columns) -> str | None:
    """Of a CSV file whose header names the columns that are read, two at least unless its name says what it is."""
    header = text.lstrip("\n").partition("\n")[0]
    for delimiter in ",;\t":
        names = [name.strip(' "') for name in header.split(delimiter)]
        if columns.known(names) and (len(names) > 1 or ending in _CSV_ENDINGS):
            return delimiter
    return None


def _csv_rows(path: Path, text: str, delimiter: str, columns: Columns) -> Iterator[tuple[int, Any]]:
    """Fields of the header's names; an empty one is none."""
    csv.field_size_limit(len(text) + 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise BadInput(f"{path}: line {reader.line_num}: not CSV ({error})") from error
    names = [name.strip() for name in rows[0]] if rows else []
    if rows and not columns.known(names):
        raise BadInput(f"{path}: has columns {names}, expected a header with {columns.wanted}")
    for number, row in enumerate(rows[1:], 1):
        if len(row) != len(names):
            raise BadInput(
                f"{path}: row {number}: has {len(row)} fields, the header names {len(names)}"
            )
        yield number, {name: value or None for name, value in zip(names, row, strict=True)}


def _from_rows(path: Path, rows: Iterable[tuple[int, Any]]) -> list[Example]:
    source, examples, left_out = _source_name(path), list[Example](), Counter[str]()
    row_of_id: dict[str, int] = {}
    for number, row in rows:
        where = f"{path}: row {number}"
        if not isinstance(row, dict):
            raise BadInput(f"{where}: expected an object with {_WANTED}")
        given = {field: row[field] for field in _COLUMNS.fields if row.get(field) is not None}
        form = _form_of(row, given, where)
        name = _id_of(given, where)
        if name and name in row_of_id:
            raise BadInput(
                f"{where}: `id` {name!r} is taken by row {row_of_id[name]}; entries are distinguished by it"
            )
        if name:
            row_of_id[name] = number
        content = {field: _checked(given, field, where) for field in form}
        if missing := _missing(content):
            left_out[missing] += 1
        else:
            examples.append(_example(source, name, number, content))
    say_left_out(str(path), left_out, len(examples) + left_out.total())
    return examples


def _form_of(row: Mapping[str, Any], given: Mapping[str, Any], where: str) -> Sequence[str]:
    """The fields that make the example. Nulls beside filled ones do not matter; a row of nulls is of any form."""
    forms = [form for form in _COLUMNS.forms if set(form) <= given.keys()]
    forms = forms or [form for form in _COLUMNS.forms if set(form) <= row.keys()][-1:]
    if len(forms) > 1:
        both = " as well as ".join(" and ".join(f"`{f}`" for f in form) for form in forms)
        raise BadInput(f"{where}: has {both}, expected one of them")
    if not forms:
        raise BadInput(f"{where}: has {sorted(row)}, expected {_WANTED}")
    return forms[0]


def _missing(content: Mapping[str, Any]) -> str:
    """What an example lacks, if anything."""
    if "messages" in content:
        turns: Sequence[Mapping[str, Any]] = content["messages"] or ()
        asked = bool(turns) and turns[-1]["role"] != ASSISTANT  # to be answered by the model
        spoken = any(turn["role"] == ASSISTANT and turn["content"] for turn in turns)
        return "" if asked or spoken else "without a turn of the assistant"
    if "text" in content:
        return "" if content["text"] else "without text"
    return "" if content["answer"] and content["prompt"] is not None else "without an answer"


def _checked(given: Mapping[str, Any], field: str, where: str) -> Any:
    """The field's value, None when it is not given. Raises BadInput unless it is a string or, of messages, turns."""
    value = given.get(field)
    if value is None:
        return None
    if field == "messages":
        return _turns(value, where)
    if not isinstance(value, str):
        raise BadInput(f"{where}: `{field}` is {type(value).__name__}, expected a string")
    _require_unicode(value, f"{where}: `{field}`")
    return value


def _turns(messages: Any, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list):
        raise BadInput(f"{where}: `messages` is {type(messages).__name__}, expected a list")
    turns = []
    for number, turn in enumerate(messages, 1):
        at = f"{where}: message {number}"
        if not isinstance(turn, dict):
            raise BadInput(f"{at}: is {type(turn).__name__}, expected `role` and `content`")
        for field in ("role", "content"):
            if not isinstance(turn.get(field), str):
                got = type(turn.get(field)).__name__
                raise BadInput(f"{at}: `{field}` is {got}, expected a string")
            _require_unicode(turn[field], f"{at}: `{field}`")
        if turn.get("weight", 1) not in (0, 1):
            raise BadInput(f"{at}: `weight` is {turn['weight']!r}, expected 0 (no loss) or 1")
        turns.append({field: value for field, value in turn.items() if value is not None})
    return tuple(turns)


def _example(source: str, name: str, number: int, content: Mapping[str, Any]) -> Example:
    """name: the row's id, empty when it has none."""
    digest = hashlib.blake2b(
        json.dumps(content, sort_keys=True, default=str).encode(), digest_size=8
    ).hexdigest()
    return Example(
        ExampleRef(source, name or f"#{digest}"),
        content.get("text", content.get("prompt", "")),
        content.get("answer"),
        content.get("messages", ()),
        f"{name}#{digest}",
        name or str(number),
    )


def _id_of(given: Mapping[str, Any], where: str) -> str:
    """The row's id; empty when it has none."""
    value = given.get("id", "")
    if not isinstance(value, str | int | float):
        raise BadInput(f"{where}: `id` is {type(value).__name__}, expected a string or a number")
    name = "" if value != value else str(value)
    if len(name) > MAX_ID_CHARACTERS or "\x00" in name:
        raise BadInput(
            f"{where}: `id` has {len(name)} characters, "
            f"expected at most {MAX_ID_CHARACTERS} and no NUL"
        )
    _require_unicode(name, f"{where}: `id`")
    return name


def _require_unicode(value: str, where: str) -> None:
    """JSON can spell halves of surrogate pairs, which neither tokenizers nor messages take."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{where} holds half a surrogate pair ({error})") from error


def _plain_examples(path: Path, text: str) -> list[Example]:
    source, examples = _source_name(path), list[Example]()
    group, size = list[str](), 0

    def close_group() -> None:
        content = {"text": "\n\n".join(group)}
        examples.append(_example(source, "", len(examples), content))
        group.clear()

    for paragraph in text.split("\n\n"):
        group.append(paragraph)
        size += len(paragraph)
        if size >= PLAIN_TEXT_EXAMPLE_CHARACTERS:
            close_group()
            size = 0
    if "".join(group).strip():
        close_group()
    return examples

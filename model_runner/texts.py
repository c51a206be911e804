"""Texts from files, cut into windows of tokens: reference, dev and test data in one form.

Formats, by suffix: .jsonl and .parquet with rows of `text`, or of `prompt` and `answer` (the loss counts on the answer
only), each with an optional `id` of its own; anything else is plain text, whose paragraphs are grouped into examples.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from knnmoe.client import ExampleRef
from torch import Tensor

from model_runner.errors import BadInput

# Plain text has no examples of its own: paragraphs are grouped up to about this size.
PLAIN_TEXT_EXAMPLE_CHARACTERS = 4000
# What a text leaves over after its full windows is left out below this share of one.
SHORTEST_WINDOW_SHARE = 0.25
# Longest id of an example that a routing service stores.
MAX_ID_CHARACTERS = 1024


@dataclass(frozen=True, slots=True)
class Example:
    """One document, or one prompt with its answer."""

    ref: ExampleRef
    text: str
    # Set: the loss counts on it only, and `text` is the prompt before it.
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that a model reads in one go.

    Attributes:
        token_ids: n of them.
        first_target: index of the first token whose loss counts, 1 or more.
        offset: position of token 0 within the example.

    """

    ref: ExampleRef
    token_ids: tuple[int, ...]
    first_target: int
    offset: int

    @property
    def targets(self) -> int:
        """Tokens whose loss counts."""
        return len(self.token_ids) - self.first_target


def read_examples(path: Path) -> Iterator[Example]:
    """Examples of a file, in order; the source's name is the file's. Raises BadInput naming file, row and field."""
    if not path.is_file():
        what = "is a directory, expected a file" if path.is_dir() else "no such file"
        raise BadInput(f"{path}: {what}")
    try:
        if path.suffix in (".jsonl", ".ndjson"):
            yield from _rows_to_examples(path, _json_rows(path))
        elif path.suffix == ".parquet":
            yield from _rows_to_examples(path, _parquet_rows(path))
        else:
            yield from _plain_examples(path)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error})") from error
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error})") from error


def cut_windows(examples: Iterable[Example], tokenizer: Any, length: int) -> list[Window]:
    """Windows of up to `length` tokens, in order; they never cross examples. Raises BadInput when none results."""
    if length < 2:
        raise BadInput(f"window length: got {length}, expected 2 or more tokens")
    every = list(examples)
    windows = [w for example in every for w in _windows_of(example, tokenizer, length)]
    if not windows:
        raise BadInput(
            f"{len(every)} example(s), none with 2 tokens of text, or with an answer"
            if every
            else "holds no text"
        )
    return windows


def read_windows(path: Path, tokenizer: Any, length: int) -> list[Window]:
    """read_examples, then cut_windows; errors name the file."""
    try:
        return cut_windows(read_examples(path), tokenizer, length)
    except BadInput as error:
        raise BadInput(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error


def _windows_of(example: Example, tokenizer: Any, length: int) -> Iterator[Window]:
    if example.answer is not None:
        yield from _answer_window(example, example.answer, tokenizer, length)
        return
    ids = tokenizer(example.text)["input_ids"]
    shortest_rest = max(2, int(length * SHORTEST_WINDOW_SHARE))
    for offset in range(0, len(ids), length):
        part = tuple(ids[offset : offset + length])
        if len(part) >= (shortest_rest if offset else 2):
            yield Window(example.ref, part, 1, offset)


def _answer_window(example: Example, answer: str, tokenizer: Any, length: int) -> Iterator[Window]:
    """Prompt and answer; the prompt's beginning is cut off when both do not fit."""
    prompt = tokenizer(example.text)["input_ids"]
    tail = tokenizer(answer, add_special_tokens=False)["input_ids"][: length - 1]
    cut = max(0, len(prompt) + len(tail) - length)
    ids = (*prompt[cut:], *tail)
    first_target = max(1, len(prompt) - cut)
    if len(ids) > first_target:
        yield Window(example.ref, ids, first_target, cut)


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise BadInput(f"{path}: row {number}: not JSON ({error})") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except pa.ArrowException as error:
        raise BadInput(f"{path}: not a Parquet file ({error})") from error
    yield from enumerate(rows, 1)


def _rows_to_examples(path: Path, rows: Iterable[tuple[int, Any]]) -> Iterator[Example]:
    row_of_id: dict[str, int] = {}
    for number, row in rows:
        where = f"{path}: row {number}"
        if not isinstance(row, dict):
            raise BadInput(f"{where}: expected an object with `text`, or `prompt` and `answer`")
        name = _id_of(row, number, where)
        if name in row_of_id:
            raise BadInput(
                f"{where}: `id` {name!r} is taken by row {row_of_id[name]}; entries are told apart by it"
            )
        row_of_id[name] = number
        ref = ExampleRef(path.name, name)
        if "text" in row:
            yield Example(ref, _text_of(row, "text", where))
        elif "prompt" in row and "answer" in row:
            yield Example(ref, _text_of(row, "prompt", where), _text_of(row, "answer", where))
        else:
            raise BadInput(f"{where}: has {sorted(row)}, expected `text`, or `prompt` and `answer`")


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise BadInput(f"{where}: `{field}` is {type(value).__name__}, expected a string")
    _require_unicode(value, field, where)
    return value


def _id_of(row: dict[str, Any], number: int, where: str) -> str:
    """The row's id; its number when it has none."""
    value = row.get("id")
    name = str(number if value is None else value)
    if len(name) > MAX_ID_CHARACTERS or "\x00" in name:
        raise BadInput(
            f"{where}: `id` has {len(name)} characters, "
            f"expected at most {MAX_ID_CHARACTERS} and no NUL"
        )
    _require_unicode(name, "id", where)
    return name


def _require_unicode(value: str, field: str, where: str) -> None:
    """JSON can spell halves of surrogate pairs, which neither tokenizers nor messages take."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{where}: `{field}` holds half a surrogate pair ({error})") from error


def _plain_examples(path: Path) -> Iterator[Example]:
    number, group, size = 0, list[str](), 0
    for paragraph in path.read_text(encoding="utf-8-sig").split("\n\n"):
        group.append(paragraph)
        size += len(paragraph)
        if size >= PLAIN_TEXT_EXAMPLE_CHARACTERS:
            yield Example(ExampleRef(path.name, str(number)), "\n\n".join(group))
            number, group, size = number + 1, [], 0
    if "".join(group).strip():
        yield Example(ExampleRef(path.name, str(number)), "\n\n".join(group))


def batched(windows: Sequence[Window], size: int) -> Iterator[list[Window]]:
    """Batches of windows of similar length: longest first, so that memory runs out at once or never."""
    ordered = sorted(windows, key=lambda w: -len(w.token_ids))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


@dataclass(frozen=True, slots=True)
class Batch:
    """B windows, padded on the right to S tokens.

    Attributes:
        input_ids: [B, S] int64.
        attention_mask: [B, S] int64, 0 on padding.
        predicts: [B, S] bool: the token after this one has a loss that counts.

    """

    windows: tuple[Window, ...]
    input_ids: Tensor
    attention_mask: Tensor
    predicts: Tensor


def make_batch(windows: Sequence[Window], device: torch.device) -> Batch:
    """Pads with token 0, which the attention mask hides."""
    longest = max(len(w.token_ids) for w in windows)
    input_ids = torch.zeros(len(windows), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    predicts = torch.zeros(len(windows), longest, dtype=torch.bool)
    for row, window in enumerate(windows):
        n = len(window.token_ids)
        input_ids[row, :n] = torch.tensor(window.token_ids)
        mask[row, :n] = 1
        predicts[row, window.first_target - 1 : n - 1] = True
    return Batch(tuple(windows), input_ids.to(device), mask.to(device), predicts.to(device))


def token_nll(logits: Tensor, batch: Batch) -> Tensor:
    """Negative log-likelihood in nats [B, S] of each token's successor; 0 where `predicts` is False.

    logits: [B, S, V], any float dtype; the loss is taken in f32.
    """
    targets = batch.input_ids[:, 1:]
    flat = logits[:, :-1].float().flatten(0, 1)
    nll = F.cross_entropy(flat, targets.flatten(), reduction="none").view_as(targets)
    return F.pad(nll, (0, 1)).where(batch.predicts, 0.0)

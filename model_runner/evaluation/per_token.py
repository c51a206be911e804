"""Scores with and without a memory, token by token: by class of token, by document, and as files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model_runner.errors import BadInput
from model_runner.scoring import F32, Scores
from model_runner.texts import Window
from model_runner.token_texts import TokenClass, TokenTexts

_ENDINGS = (".parquet", ".jsonl")
_ROWS_PER_GROUP = 1 << 16
# Nats per token over all of them: of less, which is nothing in four digits, classes have no share worth a name.
LEAST_CHANGE = 5e-5
_LOSSES = [(name, pa.float64()) for name in ("nll_plain", "nll_memory", "change")]
_NAMES = [(name, pa.string()) for name in ("source", "example", "name")]
TOKEN_COLUMNS = pa.schema(
    [
        *_NAMES,
        ("position", pa.uint32()),
        ("token", pa.int32()),
        ("text", pa.string()),
        ("class", pa.string()),
        *_LOSSES,
    ]
)
DOCUMENT_COLUMNS = pa.schema([*_NAMES, ("tokens", pa.uint32()), *_LOSSES])


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Tokens of one class.

    Attributes:
        nll_plain, nll_memory, change: nats per token of the class.
        share_of_tokens: of all.
        share_of_change: of the sum of all changes; above 1 where other classes take back; None where that sum
            is less than LEAST_CHANGE per token.

    """

    tokens: int
    nll_plain: float
    nll_memory: float
    change: float
    share_of_tokens: float
    share_of_change: float | None


def classes_of(windows: Iterable[Window], tokenizer: Any) -> list[TokenClass]:
    """The class of each target, window after window."""
    return [TokenClass.of(text) for _, _, text in _targets(windows, tokenizer)]


def by_class(classes: Sequence[TokenClass], plain: F32, routed: F32) -> dict[str, ClassScores]:
    """The classes that there are, in the order of TokenClass; plain, routed: f32 [n] of the n tokens, in nats."""
    found, total = {}, float(np.sum(routed - plain, dtype=np.float64))
    of_token = np.array(classes, dtype=object)
    for kind in TokenClass:
        if not len(rows := np.flatnonzero(of_token == kind)):
            continue
        before, after = (float(each[rows].sum(dtype=np.float64)) for each in (plain, routed))
        count, change = len(rows), after - before
        found[str(kind)] = ClassScores(
            count,
            before / count,
            after / count,
            change / count,
            count / len(of_token),
            change / total if abs(total) >= LEAST_CHANGE * len(of_token) else None,
        )
    return found


def token_rows(
    windows: Sequence[Window], plain: Scores, routed: Scores, tokenizer: Any
) -> Iterator[dict[str, Any]]:
    """A row per token with a loss; windows: those that were scored, in the order of the text."""
    for window, before, after in _in_order(windows, plain, routed):
        targets = _targets([window], tokenizer)
        for (_, at, text), one, other in zip(targets, before, after, strict=True):
            yield {
                **_names_of(window),
                "position": window.offset + at,
                "token": window.token_ids[at],
                "text": text,
                "class": str(TokenClass.of(text)),
                **_losses_of(one, other),
            }


def document_rows(
    windows: Sequence[Window], plain: Scores, routed: Scores
) -> Iterator[dict[str, Any]]:
    """A row per example, with the mean loss of its tokens; windows: as of token_rows."""
    for _, group in groupby(_in_order(windows, plain, routed), key=lambda each: each[0].ref):
        windows, before, after = zip(*group, strict=True)
        means = (np.concatenate(each).mean(dtype=np.float64) for each in (before, after))
        tokens = sum(window.targets for window in windows)
        yield {**_names_of(windows[0]), "tokens": tokens, **_losses_of(*means)}


def require_table_file(option: str, path: Path | None) -> None:
    """Raises BadInput unless the name's ending says a format."""
    if path is not None and path.suffix not in _ENDINGS:
        raise BadInput(
            f"{option}: got {path}, expected a name that ends in {' or '.join(_ENDINGS)}"
        )


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], columns: pa.Schema) -> None:
    """As Parquet or JSON lines, as the name's ending says. Raises OSError."""
    if path.suffix == ".jsonl":
        with path.open("w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return
    every = iter(rows)
    with pq.ParquetWriter(path, columns, compression="zstd") as writer:
        while group := list(islice(every, _ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=columns))


def class_table(found: Mapping[str, ClassScores]) -> dict[str, dict[str, Any]]:
    """For JSON."""
    return {name: asdict(scores) for name, scores in found.items()}


def _in_order(
    windows: Sequence[Window], plain: Scores, routed: Scores
) -> Iterator[tuple[Window, F32, F32]]:
    """Windows with the losses of their targets."""
    columns = zip(plain.windows, plain.token_nll, routed.token_nll, strict=True)
    losses = {id(window): (before, after) for window, before, after in columns}
    for window in windows:
        yield (window, *losses[id(window)])


def _targets(windows: Iterable[Window], tokenizer: Any) -> Iterator[tuple[Window, int, str]]:
    for window in windows:
        texts = TokenTexts.of(window.token_ids, tokenizer)
        for at in window.target_at:
            yield window, at, texts.token(at)


def _names_of(window: Window) -> dict[str, str]:
    return {
        "source": window.ref.source,
        "example": window.ref.example,
        "name": window.name or window.ref.example,
    }


def _losses_of(plain: np.floating[Any], routed: np.floating[Any]) -> dict[str, float]:
    return {
        "nll_plain": float(plain),
        "nll_memory": float(routed),
        "change": float(routed) - float(plain),
    }

"""Entries as JSON lines: one object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from typing_extensions import override

from router_service.arrays import F32, Entries, Provenance
from router_service.errors import shorten
from router_service.transfer import entry_fields as fields
from router_service.transfer.endpoints import Batch, EntryShape
from router_service.transfer.entry_fields import (
    SNIPPET_FIELDS,
    EntryReader,
    EntryWriter,
    by_layer,
)

_LINES_PER_BATCH = 256
_F32_MAX = float(np.finfo(np.float32).max)
# The line of an entry, and its layer, id, key, value and provenance.
_Row = tuple[int, int, int, F32, F32, Provenance]


class JsonlReader(EntryReader):
    """Checks each line as it is read; counting them is a pass of its own."""

    def __init__(self, path: Path, shape: EntryShape, layer: int | None) -> None:
        super().__init__(path, shape, layer)
        with path.open("rb") as file:
            self.entries = sum(1 for line in file if line.strip())

    @override
    def read(self) -> Iterator[Batch]:
        waiting: list[_Row] = []
        with self.path.open("rb") as file:
            for line, text in enumerate(file, 1):
                if text.strip():
                    waiting.append(self._row(line, text))
                if len(waiting) == _LINES_PER_BATCH:
                    yield from _batches_of(waiting)
                    waiting = []
        if waiting:
            yield from _batches_of(waiting)

    @override
    def place(self, layer: int, row: int) -> str:
        return f"line {row}"

    def _row(self, line: int, text: bytes) -> _Row:
        with self.errors_at(f"line {line}"):
            row = json.loads(text, parse_constant=_refuse_constant)
            if not isinstance(row, dict):
                raise ValueError("expected a JSON object")
            fields.check_names(row, self._shape)
            origin = fields.provenance_of(row)
            layer, number = fields.layer_of(row, self._layer), fields.id_of(row, origin)
            key = _vector("key", row["key"], self._shape.hidden_size, "hidden_size")
            value = _value_of(row, self._shape)
        return line, layer, number, key, value, origin


class JsonlWriter(EntryWriter):
    """Writes each entry as it comes; there is no place for metadata."""

    def __init__(self, path: Path, shape: EntryShape, metadata: Mapping[str, str]) -> None:
        super().__init__(path, shape, metadata)
        self._file = path.open("w")

    @override
    def append(self, layer: int, entries: Entries) -> None:
        columns = fields.columns_of(layer, entries, self._shape)
        lists = (each if isinstance(each, list) else each.tolist() for each in columns.values())
        for row in zip(*lists, strict=True):
            named = zip(columns, row, strict=True)
            # A memory without snippets is written as it was before there were any.
            given = {name: value for name, value in named if value or name not in SNIPPET_FIELDS}
            self._file.write(json.dumps(given) + "\n")

    @override
    def close(self) -> None:
        self._file.close()


def _batches_of(rows: list[_Row]) -> Iterator[Batch]:
    lines, layers, ids, keys, values, origins = zip(*rows, strict=True)
    entries = Entries(np.array(ids, np.uint64), np.stack(keys), np.stack(values), origins)
    return by_layer(layers, entries, lines)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number; expected finite numbers")


def _value_of(row: Mapping[str, Any], shape: EntryShape) -> F32:
    """The value row [W]."""
    if shape.kind.blends_logits:
        name = fields.dense_field(shape.kind)
        return _vector(name, row[name], shape.num_experts, "num_experts")
    if not isinstance(row["experts"], list) or len(row["experts"]) != shape.top_k:
        raise ValueError(f"experts: got {_size(row['experts'])}, expected {shape.top_k} (top_k)")
    experts = [
        fields.whole(f"experts[{i}]", expert, 0, shape.num_experts - 1)
        for i, expert in enumerate(row["experts"])
    ]
    weights = _vector("weights", row["weights"], shape.top_k, "top_k")
    return np.concatenate([np.asarray(experts, dtype=np.float32), weights])


def _vector(name: str, value: Any, width: int, of: str) -> F32:
    """A list of `width` finite numbers as f32."""
    if not isinstance(value, list) or len(value) != width:
        raise ValueError(f"{name}: got {_size(value)}, expected {width} numbers ({of})")
    for index, item in enumerate(value):
        if type(item) is not float and type(item) is not int:
            raise ValueError(f"{name}[{index}]: got {shorten(item)}, expected a number")
        if not -_F32_MAX <= item <= _F32_MAX:
            raise ValueError(
                f"{name}[{index}]: got {shorten(item)}, expected a finite number of f32"
            )
    return np.asarray(value, dtype=np.float32)


def _size(value: Any) -> str:
    return f"{len(value)}" if isinstance(value, list) else shorten(value, 40)

"""Entries as JSON lines: one object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from typing_extensions import override

from router_service.arrays import F32, Entries, Provenance
from router_service.transfer import entry_fields as fields
from router_service.transfer.endpoints import Batch, EntryShape
from router_service.transfer.entry_fields import EntryReader, EntryWriter, by_layer

_LINES_PER_BATCH = 256
# The line of an entry, and its layer, id, key, value and provenance.
_Row = tuple[int, int, int, F32, F32, Provenance]


class JsonlReader(EntryReader):
    """Checks each line as it is read; counting them is a pass of its own."""

    def __init__(self, path: Path, shape: EntryShape, default_layer: int | None) -> None:
        super().__init__(path, shape)
        self._default_layer = default_layer
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
            layer, number = fields.layer_of(row, self._default_layer), fields.id_of(row, origin)
            key = fields.vector("key", row["key"], self._shape.hidden_size, "hidden_size")
            value = fields.value_of(row, self._shape)
        return line, layer, number, key, value, origin


class JsonlWriter(EntryWriter):
    """Writes each entry as it comes; there is no place for metadata."""

    def __init__(self, path: Path, shape: EntryShape, _metadata: Mapping[str, str]) -> None:
        self._file = path.open("w")
        self._shape = shape

    @override
    def append(self, layer: int, entries: Entries) -> None:
        columns = {"key": entries.keys, **fields.value_columns(entries.values, self._shape)}
        for number, origin in enumerate(entries.provenance):
            row: dict[str, Any] = {"id": int(entries.ids[number]), "layer": layer}
            row |= {name: column[number].tolist() for name, column in columns.items()}
            self._file.write(json.dumps(row | asdict(origin)) + "\n")

    @override
    def close(self) -> None:
        self._file.close()


def _batches_of(rows: list[_Row]) -> Iterator[Batch]:
    lines, layers, ids, keys, values, origins = zip(*rows, strict=True)
    entries = Entries(np.array(ids, np.uint64), np.stack(keys), np.stack(values), origins)
    return by_layer(layers, entries, lines)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number; expected finite numbers")

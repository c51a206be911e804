"""Entries as JSON lines: one object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from router_service.arrays import F32, Entries, Provenance
from router_service.cli.entry_files import fields
from router_service.cli.entry_files.batches import EntryBatch, EntryShape, FileError, by_layer
from router_service.memories.settings import Kind

_LINES_PER_BATCH = 256


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    layer: int
    id: int
    key: F32
    value: F32
    provenance: Provenance


class JsonlReader:
    """See EntryReader."""

    def __init__(self, path: Path, shape: EntryShape, default_layer: int | None) -> None:
        self.path = path
        self._shape, self._default_layer = shape, default_layer
        with path.open("rb") as file:
            self.total = sum(1 for line in file if line.strip())

    def batches(self) -> Iterator[EntryBatch]:
        """See EntryReader.batches."""
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

    def place(self, layer: int, row: int) -> str:
        """See EntryReader.place."""
        return f"line {row}"

    def _row(self, line: int, text: bytes) -> _Row:
        try:
            row = json.loads(text, parse_constant=_refuse_constant)
            return self._checked(line, row)
        except RecursionError:
            raise FileError(self.path, f"line {line}", "nested too deeply") from None
        except ValueError as error:
            raise FileError(self.path, f"line {line}", str(error)) from error

    def _checked(self, line: int, row: Any) -> _Row:
        if not isinstance(row, dict):
            raise ValueError("expected a JSON object")
        fields.check_names(row, self._shape.kind)
        origin = fields.provenance_of(row)
        return _Row(
            line,
            fields.layer_of(row, self._default_layer),
            fields.id_of(row, origin),
            fields.vector("key", row["key"], self._shape.hidden_size, "hidden_size"),
            fields.value_of(row, self._shape),
            origin,
        )


class JsonlWriter:
    """See EntryWriter."""

    def __init__(self, path: Path, shape: EntryShape) -> None:
        self._file = path.open("w")
        self._shape = shape

    def write(self, layer: int, entries: Entries) -> None:
        """See EntryWriter.write."""
        for number, origin in enumerate(entries.provenance):
            row = {
                "id": int(entries.ids[number]),
                "layer": layer,
                "key": entries.keys[number].tolist(),
            }
            row |= self._value(entries.values[number]) | asdict(origin)
            self._file.write(json.dumps(row) + "\n")

    def finish(self) -> None:
        """See EntryWriter.finish."""
        self.close()

    def close(self) -> None:
        """See EntryWriter.close."""
        self._file.close()

    def _value(self, value: F32) -> dict[str, Any]:
        if self._shape.kind is Kind.LOGIT_DELTA:
            return {"value": value.tolist()}
        half = self._shape.top_k
        return {"experts": value[:half].astype(int).tolist(), "weights": value[half:].tolist()}


def _batches_of(rows: list[_Row]) -> Iterator[EntryBatch]:
    entries = Entries(
        np.array([row.id for row in rows], dtype=np.uint64),
        np.stack([row.key for row in rows]),
        np.stack([row.value for row in rows]),
        [row.provenance for row in rows],
    )
    return by_layer([row.layer for row in rows], entries, [row.line for row in rows])


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number; expected finite numbers")

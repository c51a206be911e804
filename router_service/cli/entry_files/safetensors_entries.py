"""Entries as safetensors: `layers.N.ids`, `.keys` and `.values`, or `.experts` and `.weights`, per layer N.

Provenance is the JSON text `layers.N.provenance` of the file's metadata: one list per field, each with n items.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from router_service.arrays import F32, U64, Entries, Provenance
from router_service.cli.entry_files import fields
from router_service.cli.entry_files.batches import (
    EntryBatch,
    EntryShape,
    FileError,
    first_not_finite,
)
from router_service.cli.entry_files.tensor_file import TensorFile
from router_service.memories.settings import Kind

_NAME = re.compile(r"layers\.(\d{1,5})\.(ids|keys|values|experts|weights)")


class SafetensorsReader:
    """See EntryReader."""

    def __init__(self, path: Path, shape: EntryShape, only_layer: int | None) -> None:
        self.path = path
        self._shape = shape
        self._file = TensorFile(path)
        found = sorted({self._layer_of(name) for name in self._file.tensors})
        self._layers = [n for n in found if only_layer is None or n == only_layer]
        for layer in self._layers:
            self._check_shapes(layer)
        self.total = sum(self._count(layer) for layer in self._layers)

    def batches(self) -> Iterator[EntryBatch]:
        """See EntryReader.batches."""
        size = self._shape.batch_entries
        for layer in self._layers:
            origins = self._provenance(layer)
            for start in range(0, self._count(layer), size):
                stop = min(start + size, self._count(layer))
                yield self._batch(layer, start, stop, origins)

    def place(self, layer: int, row: int) -> str:
        """See EntryReader.place."""
        return f"layers.{layer}, row {row}"

    def _batch(
        self, layer: int, start: int, stop: int, origins: Sequence[dict[str, Any]]
    ) -> EntryBatch:
        entries = Entries(
            self._ids(layer, start, stop, origins),
            self._matrix(layer, "keys", start, stop),
            self._values(layer, start, stop),
            [fields.provenance_of(origin) for origin in origins[start:stop]]
            or [Provenance()] * (stop - start),
        )
        return EntryBatch(layer, entries, range(start + 1, stop + 1))

    def _values(self, layer: int, start: int, stop: int) -> F32:
        if self._shape.kind is Kind.LOGIT_DELTA:
            return self._matrix(layer, "values", start, stop)
        experts = self._file.rows(f"layers.{layer}.experts", start, stop)
        wrong = np.argwhere((experts < 0) | (experts >= self._shape.num_experts))
        if len(wrong):
            row, column = wrong[0]
            raise self._error(
                layer,
                f"experts[{start + row}][{column}]: got {experts[row, column]}, expected 0 to "
                f"{self._shape.num_experts - 1}",
            )
        weights = self._matrix(layer, "weights", start, stop)
        return np.concatenate([experts.astype(np.float32), weights], axis=1)

    def _matrix(self, layer: int, name: str, start: int, stop: int) -> F32:
        rows = self._file.rows(f"layers.{layer}.{name}", start, stop)
        with np.errstate(over="ignore"):  # found below, as infinity
            matrix: F32 = rows.astype(np.float32)
        broken = first_not_finite(matrix)
        if broken is not None:
            row, column = broken
            got = rows[row, column]
            raise self._error(
                layer,
                f"{name}[{start + row}][{column}]: got {got}, expected a finite number of f32",
            )
        return matrix

    def _ids(self, layer: int, start: int, stop: int, origins: Sequence[dict[str, Any]]) -> U64:
        if f"layers.{layer}.ids" in self._file.tensors:
            ids = self._file.rows(f"layers.{layer}.ids", start, stop)
            if (ids < 0).any():
                raise self._error(layer, f"ids: got {ids[ids < 0][0]}, expected 0 or more")
            return ids.astype(np.uint64)
        made = []
        for row in range(start, stop):
            origin = origins[row] if origins else {}
            try:
                made.append(fields.id_of(origin, fields.provenance_of(origin)))
            except ValueError as error:
                raise FileError(self.path, self.place(layer, row + 1), str(error)) from error
        return np.array(made, dtype=np.uint64)

    def _provenance(self, layer: int) -> list[dict[str, Any]]:
        """One object per entry, each checked; none when the file holds no provenance of the layer."""
        name = f"layers.{layer}.provenance"
        text = self._file.metadata.get(name)
        if text is None:
            return []
        try:
            rows = _rows_of(json.loads(text), self._count(layer))
            for number, row in enumerate(rows, 1):
                _check_origin(number, row)
        except (ValueError, RecursionError) as error:
            raise FileError(self.path, f"metadata {name}", str(error)) from error
        return rows

    def _layer_of(self, name: str) -> int:
        found = _NAME.fullmatch(name)
        wanted = {
            "ids",
            "keys",
            *(f"{f}s" if f == "value" else f for f in fields.value_fields(self._shape.kind)),
        }
        if found is None or found[2] not in wanted:
            names = ", ".join(f"layers.N.{field}" for field in sorted(wanted))
            raise FileError(
                self.path, name, f"unknown tensor, expected {names} ({self._shape.kind} memory)"
            )
        return int(found[1])

    def _check_shapes(self, layer: int) -> None:
        shape = self._shape
        widths = {"keys": (shape.hidden_size, "hidden_size")}
        if shape.kind is Kind.LOGIT_DELTA:
            widths["values"] = (shape.num_experts, "num_experts")
        else:
            widths |= {"experts": (shape.top_k, "top_k"), "weights": (shape.top_k, "top_k")}
        for name, (width, of) in widths.items():
            self._check_shape(layer, name, (self._count(layer), width), f"[n, {of}]")
        if f"layers.{layer}.ids" in self._file.tensors:
            self._check_shape(layer, "ids", (self._count(layer),), "[n]")

    def _check_shape(self, layer: int, name: str, wanted: tuple[int, ...], of: str) -> None:
        info = self._file.tensors.get(f"layers.{layer}.{name}")
        if info is None:
            raise self._error(layer, f"{name}: missing")
        if info.shape != wanted:
            raise self._error(
                layer, f"{name}: got shape {list(info.shape)}, expected {list(wanted)} ({of})"
            )
        if name in ("ids", "experts") and info.dtype[0] not in "IU":
            raise self._error(layer, f"{name}: got {info.dtype}, expected whole numbers")

    def _count(self, layer: int) -> int:
        info = self._file.tensors.get(f"layers.{layer}.keys")
        if info is None or not info.shape:
            raise self._error(layer, "keys: missing, expected [n, hidden_size]")
        return info.shape[0]

    def _error(self, layer: int, problem: str) -> FileError:
        return FileError(self.path, "", f"layers.{layer}.{problem}")


def _rows_of(columns: Any, count: int) -> list[dict[str, Any]]:
    """Columns as rows. Raises ValueError."""
    if not isinstance(columns, dict):
        raise ValueError("expected an object with one list per field")
    for name, items in columns.items():
        if name not in fields.PROVENANCE_FIELDS:
            raise ValueError(
                f"{name}: unknown field, expected {', '.join(fields.PROVENANCE_FIELDS)}"
            )
        if not isinstance(items, list) or len(items) != count:
            raise ValueError(f"{name}: expected a list of {count} items, one per entry")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _check_origin(number: int, row: dict[str, Any]) -> None:
    try:
        fields.provenance_of(row)
    except ValueError as error:
        raise ValueError(f"entry {number}: {error}") from error

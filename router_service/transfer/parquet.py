"""Entries as Parquet: one row per entry, keys and values as lists of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from typing_extensions import override

from router_service.arrays import F32, AnyArray, Entries, Provenance
from router_service.memories.settings import Kind
from router_service.transfer import entry_fields as fields
from router_service.transfer.endpoints import Batch, EntryShape
from router_service.transfer.entry_fields import EntryReader, EntryWriter, FileError, by_layer

_ROWS_PER_BATCH = 1024
_SCALARS = ("id", "layer", *fields.PROVENANCE_FIELDS)


class _BadRow(ValueError):
    """A row of a batch (counted from 0) that cannot be used."""

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(problem)
        self.row = row


class ParquetReader(EntryReader):
    """Columns of the wrong type are refused when the file is opened, lists of the wrong length row by row."""

    def __init__(self, path: Path, shape: EntryShape, default_layer: int | None) -> None:
        self.path = path
        self._shape, self._default_layer = shape, default_layer
        try:
            self._file = pq.ParquetFile(path, pre_buffer=False)  # a file may be larger than RAM
            fields.check_names(dict.fromkeys(self._file.schema_arrow.names, True), shape)
            _check_lists(self._file.schema_arrow, shape)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise FileError(path, "", f"not a Parquet file of entries: {error}") from error
        self.total = self._file.metadata.num_rows

    @override
    def batches(self) -> Iterator[Batch]:
        first = 1
        size = min(_ROWS_PER_BATCH, self._shape.batch_entries)
        for batch in self._read(size):
            try:
                layers, entries = self._entries(batch)
            except _BadRow as error:
                raise FileError(self.path, f"row {first + error.row}", str(error)) from error
            except ValueError as error:
                raise FileError(self.path, "", str(error)) from error
            yield from by_layer(layers, entries, range(first, first + len(layers)))
            first += len(layers)

    @override
    def place(self, layer: int, row: int) -> str:
        return f"row {row}"

    def _read(self, size: int) -> Iterator[pa.RecordBatch]:
        try:
            yield from (batch for batch in self._file.iter_batches(size) if batch.num_rows)
        except (pa.ArrowException, OSError) as error:
            raise FileError(self.path, "", f"damaged Parquet file: {error}") from error

    def _entries(self, batch: pa.RecordBatch) -> tuple[list[int], Entries]:
        names = [name for name in _SCALARS if name in batch.schema.names]
        rows = batch.select(names).to_pylist() if names else [{}] * batch.num_rows
        layers, ids, origins = [], [], []
        for number, row in enumerate(rows):
            try:
                origins.append(fields.provenance_of(row))
                layers.append(fields.layer_of(row, self._default_layer))
                ids.append(fields.id_of(row, origins[-1]))
            except ValueError as error:
                raise _BadRow(number, str(error)) from error
        keys = matrix("key", batch.column("key"), self._shape.hidden_size, "hidden_size")
        return layers, Entries(np.array(ids, dtype=np.uint64), keys, self._values(batch), origins)

    def _values(self, batch: pa.RecordBatch) -> F32:
        columns = {
            name: matrix(name, batch.column(name), width, of)
            for name, (width, of) in fields.widths(self._shape).items()
            if name != "key"
        }
        if self._shape.kind is Kind.ASSIGNMENT:
            experts = columns["experts"]
            if wrong := fields.first(fields.not_experts(experts, self._shape)):
                raise _BadRow(
                    wrong[0],
                    f"experts[{wrong[1]}]: got {experts[wrong]:g}, expected a whole number from 0 to "
                    f"{self._shape.num_experts - 1}",
                )
        return np.concatenate(list(columns.values()), axis=1)


def matrix(name: str, column: pa.Array, width: int, of: str) -> F32:
    """A column of lists of `width` finite numbers as f32 [n, width]. Raises _BadRow, or ValueError on a wrong type."""
    _require_numbers(name, column.type)
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(lengths != width)
    if len(wrong):
        got = "null" if lengths[wrong[0]] < 0 else str(lengths[wrong[0]])
        raise _BadRow(int(wrong[0]), f"{name}: got {got}, expected {width} numbers ({of})")
    flat: AnyArray = column.flatten().to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):  # found below, as infinity
        numbers = flat.astype(np.float32).reshape(-1, width)
    if broken := fields.first(~np.isfinite(numbers)):
        got = str(flat.reshape(-1, width)[broken])
        raise _BadRow(broken[0], f"{name}[{broken[1]}]: got {got}, expected a finite number of f32")
    return numbers


class ParquetWriter(EntryWriter):
    """Writes entries as they come, compressed; `metadata` becomes the file's own."""

    def __init__(self, path: Path, shape: EntryShape, metadata: Mapping[str, str]) -> None:
        self._shape = shape
        schema = schema_of(shape).with_metadata(dict(metadata))
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")

    @override
    def write(self, layer: int, entries: Entries) -> None:
        values = fields.value_columns(entries.values, self._shape)
        columns: dict[str, Any] = {
            "id": entries.ids,
            "layer": np.full(len(entries), layer, dtype=np.uint32),
            "key": _lists(entries.keys),
            **{name: _lists(rows) for name, rows in values.items()},
            **_provenance_columns(entries.provenance),
        }
        self._writer.write_table(pa.table(columns, schema=schema_of(self._shape)))

    @override
    def close(self) -> None:
        self._writer.close()


def schema_of(shape: EntryShape) -> pa.Schema:
    """Columns of an exported file."""
    lists = [
        (name, pa.list_(pa.int32() if name == "experts" else pa.float32(), width))
        for name, (width, _) in fields.widths(shape).items()
    ]
    return pa.schema(
        [
            ("id", pa.uint64()),
            ("layer", pa.uint32()),
            *lists,
            ("source", pa.string()),
            ("example", pa.string()),
            ("position", pa.uint32()),
            ("token", pa.int32()),
            ("gain", pa.float32()),
            ("created_unix_ms", pa.uint64()),
        ]
    )


def _lists(rows: AnyArray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def _provenance_columns(origins: Sequence[Provenance]) -> dict[str, list[Any]]:
    rows = [asdict(origin) for origin in origins]
    return {field.name: [row[field.name] for row in rows] for field in dataclass_fields(Provenance)}


def _check_lists(schema: pa.Schema, shape: EntryShape) -> None:
    """Raises ValueError when the types alone say that no row can be used; lists of any length are seen row by row."""
    for name, (width, of) in fields.widths(shape).items():
        kind = schema.field(name).type
        _require_numbers(name, kind)
        if pa.types.is_fixed_size_list(kind) and kind.list_size != width:
            raise ValueError(f"{name}: got {kind.list_size}, expected {width} numbers ({of})")


def _require_numbers(name: str, kind: pa.DataType) -> None:
    if not (_is_list(kind) and _is_number(kind.value_type)):
        raise ValueError(f"{name}: got {kind}, expected a list of numbers")


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def metadata_of(path: Path) -> dict[str, str]:
    """The file's own key-value metadata. Raises FileError."""
    try:
        pairs: dict[bytes, bytes] = pq.read_schema(path).metadata or {}
        return {key.decode(): text.decode() for key, text in pairs.items()}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise FileError(path, "", f"not a Parquet file of entries: {error}") from error

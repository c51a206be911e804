"""Entries as Parquet: one row per entry, keys and values as lists of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from typing_extensions import override

from router_service.arrays import F32, AnyArray, Entries
from router_service.transfer import entry_fields as fields
from router_service.transfer.endpoints import Batch, EntryShape
from router_service.transfer.entry_fields import EntryReader, EntryWriter, FileError, by_layer

_ROWS_PER_BATCH = 1024
_SCALARS = ("id", "layer", *fields.PROVENANCE_FIELDS)


class ParquetReader(EntryReader):
    """Columns of the wrong type are refused when the file is opened, lists of the wrong length row by row."""

    def __init__(self, path: Path, shape: EntryShape, layer: int | None) -> None:
        super().__init__(path, shape, layer)
        with _errors_of(path):
            self._file = pq.ParquetFile(path, pre_buffer=False)  # a file may be larger than RAM
            fields.check_names(dict.fromkeys(self._file.schema_arrow.names, True), shape)
            _check_lists(self._file.schema_arrow, shape)
        self.entries = self._file.metadata.num_rows

    @staticmethod
    @override
    def metadata_of(path: Path) -> dict[str, str]:
        with _errors_of(path):
            pairs: dict[bytes, bytes] = pq.read_schema(path).metadata or {}
            return {key.decode(): text.decode() for key, text in pairs.items()}

    @override
    def read(self) -> Iterator[Batch]:
        first = 1
        for piece in self._pieces(min(_ROWS_PER_BATCH, self._shape.batch_entries)):
            with self.errors_at(""):
                layers, entries = self._entries(piece, first)
            yield from by_layer(layers, entries, range(first, first + len(layers)))
            first += len(layers)

    @override
    def place(self, layer: int, row: int) -> str:
        return f"row {row}"

    def _pieces(self, size: int) -> Iterator[pa.RecordBatch]:
        with _errors_of(self.path, "damaged Parquet file"):
            yield from (batch for batch in self._file.iter_batches(size) if batch.num_rows)

    def _entries(self, piece: pa.RecordBatch, first: int) -> tuple[list[int], Entries]:
        names = [name for name in _SCALARS if name in piece.schema.names]
        rows = piece.select(names).to_pylist() if names else [{}] * piece.num_rows
        layers, ids, origins = [], [], []
        for number, row in enumerate(rows, first):
            with self.errors_at(f"row {number}"):
                origins.append(fields.provenance_of(row))
                layers.append(fields.layer_of(row, self._layer))
                ids.append(fields.id_of(row, origins[-1]))
        keys, *values = (
            self._matrix(name, piece.column(name), first) for name in fields.widths(self._shape)
        )
        values_of = np.concatenate(values, axis=1)
        return layers, Entries(np.array(ids, dtype=np.uint64), keys, values_of, origins)

    def _matrix(self, name: str, column: pa.Array, first: int) -> F32:
        """A column of lists of finite numbers as f32 [n, width]."""
        width, of = fields.widths(self._shape)[name]
        lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != width)
        if len(wrong):
            got = "null" if lengths[wrong[0]] < 0 else lengths[wrong[0]]
            problem = f"{name}: got {got}, expected {width} numbers ({of})"
            raise FileError(self.path, f"row {first + wrong[0]}", problem)
        flat: AnyArray = column.flatten().to_numpy(zero_copy_only=False)

        def error(row: int, index: int, problem: str) -> FileError:
            return FileError(self.path, f"row {first + row}", f"{name}[{index}]: {problem}")

        return fields.numbers_of(name, flat.reshape(-1, width), self._shape, error)


class ParquetWriter(EntryWriter):
    """Writes entries as they come, compressed; `metadata` becomes the file's own."""

    def __init__(self, path: Path, shape: EntryShape, metadata: Mapping[str, str]) -> None:
        super().__init__(path, shape, metadata)
        self._schema = schema_of(shape).with_metadata(dict(metadata))
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")

    @override
    def append(self, layer: int, entries: Entries) -> None:
        columns = fields.columns_of(layer, entries, self._shape)
        arrays = {name: _array(column) for name, column in columns.items()}
        self._writer.write_table(pa.table(arrays, schema=self._schema))

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
            ("snippet", pa.string()),
            ("token_start", pa.uint32()),
            ("token_end", pa.uint32()),
        ]
    )


def _array(column: AnyArray | list[Any]) -> Any:
    if isinstance(column, list) or column.ndim == 1:
        return column
    return pa.FixedSizeListArray.from_arrays(pa.array(column.ravel()), column.shape[1])


def _check_lists(schema: pa.Schema, shape: EntryShape) -> None:
    """Raises ValueError when the types alone say that no row can be used; lists of any length are seen row by row."""
    for name, (width, of) in fields.widths(shape).items():
        kind = schema.field(name).type
        if not (_is_list(kind) and _is_number(kind.value_type)):
            raise ValueError(f"{name}: got {kind}, expected a list of numbers")
        if pa.types.is_fixed_size_list(kind) and kind.list_size != width:
            raise ValueError(f"{name}: got {kind.list_size}, expected {width} numbers ({of})")


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


@contextmanager
def _errors_of(path: Path, problem: str = "not a Parquet file of entries") -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise FileError(path, "", f"{problem}: {error}") from error

"""Entries as safetensors: `layers.N.ids`, `.keys` and `.values`, `.logits`, or `.experts` and `.weights`, per layer N.

Provenance is the JSON text `layers.N.provenance` of the file's metadata: one list per field, each with n items.

The library reads headers and writes files. Its NumPy reader knows no bf16, so rows are read here, from the places that
the header says; its writer takes whole tensors, so columns wait in files without names that are mapped into memory: of
200,000 entries of 320 numbers (244 MiB) written, 12 MiB were in RAM, and the rest in pages that the kernel takes back.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from knnmoe.tensors import widen_bf16
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from typing_extensions import override

from router_service.arrays import F32, U64, AnyArray, Entries, Provenance
from router_service.transfer import entry_fields as fields
from router_service.transfer.endpoints import Batch, EntryShape
from router_service.transfer.entry_fields import EntryReader, EntryWriter, FileError

_FORMATS = "knnmoe-entries-"
FORMAT = f"{_FORMATS}1"
# Of the library, which does not read a longer one.
MAX_HEADER_BYTES = 100_000_000
_NAME = re.compile(r"layers\.(\d{1,5})\.(ids|keys|values|logits|experts|weights)")
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}  # fmt: skip
# The tensor that holds a field, and the type that it is written in.
_TENSORS = {
    "id": ("ids", "<u8"),
    "key": ("keys", "<f4"),
    "value": ("values", "<f4"),
    "logits": ("logits", "<f4"),
    "experts": ("experts", "<i4"),
    "weights": ("weights", "<f4"),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's type and where its bytes are in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class TensorFile:
    """Tensors by name, and the file's metadata."""

    def __init__(self, path: Path) -> None:
        """Raises FileError on a file that is not whole or contradicts itself."""
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        try:
            with path.open("rb") as file:
                offset = 8 + int.from_bytes(file.read(8), "little")
            with safe_open(path, framework="numpy") as header:
                self.metadata: dict[str, str] = header.metadata() or {}
                for name in header.offset_keys():  # one begins where another ends
                    tensor = header.get_slice(name)
                    dtype, shape = str(tensor.get_dtype()), tuple(tensor.get_shape())
                    if dtype not in _DTYPES:
                        raise ValueError(f"{name}: dtype {dtype}, not one of {', '.join(_DTYPES)}")
                    self.tensors[name] = TensorInfo(dtype, shape, offset)
                    offset += prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
        except (OSError, ValueError, SafetensorError) as error:
            raise FileError(path, "", f"not a safetensors file: {error}") from error

    def rows(self, name: str, start: int, stop: int) -> AnyArray:
        """Rows [start, stop) of a tensor, read from disk; bf16 as f32."""
        info = self.tensors[name]
        if not prod(info.shape):
            return np.empty((max(0, stop - start), *info.shape[1:]), dtype=np.float32)
        mapped: AnyArray = np.memmap(
            self.path, dtype=_DTYPES[info.dtype], mode="r", offset=info.offset, shape=info.shape
        )
        part = np.array(mapped[start:stop])
        return widen_bf16(part) if info.dtype == "BF16" else part


class SafetensorsReader(EntryReader):
    """Tensors of the wrong name, type or shape are refused when the file is opened, numbers as they are read."""

    def __init__(self, path: Path, shape: EntryShape, layer: int | None) -> None:
        super().__init__(path, shape, layer)
        self._file = TensorFile(path)
        stated = self._file.metadata.get("format", "")
        if stated.startswith(_FORMATS) and stated != FORMAT:
            problem = f"got {stated!r}, this version reads {FORMAT!r}; export it again as .jsonl"
            raise FileError(path, "metadata format", problem)
        found = sorted({self._layer_of(name) for name in self._file.tensors})
        self._layers = [number for number in found if layer in (None, number)]
        for number in self._layers:
            self._check_shapes(number)
            self.entries += self._count(number)

    @staticmethod
    @override
    def metadata_of(path: Path) -> dict[str, str]:
        return TensorFile(path).metadata

    @override
    def read(self) -> Iterator[Batch]:
        size = self._shape.batch_entries
        for layer in self._layers:
            columns, count = self._provenance(layer), self._count(layer)
            for start in range(0, count, size):
                stop = min(start + size, count)
                parts = [items[start:stop] for items in columns.values()]
                rows = [dict(zip(columns, row, strict=True)) for row in zip(*parts, strict=True)]
                yield self._batch(layer, start, stop, rows or [{}] * (stop - start))

    @override
    def place(self, layer: int, row: int) -> str:
        return f"layers.{layer}, row {row}"

    def _batch(self, layer: int, start: int, stop: int, rows: Sequence[dict[str, Any]]) -> Batch:
        keys, *values = (
            self._numbers(layer, field, start, stop) for field in fields.widths(self._shape)
        )
        origins = []
        for number, row in enumerate(rows, start + 1):
            with self.errors_at(f"metadata layers.{layer}.provenance: entry {number}"):
                origins.append(fields.provenance_of(row))
        ids = self._ids(layer, start, rows, origins)
        entries = Entries(ids, keys, np.concatenate(values, axis=1), origins)
        return Batch(layer, entries, range(start + 1, stop + 1))

    def _numbers(self, layer: int, field: str, start: int, stop: int) -> F32:
        name, _ = _TENSORS[field]

        def error(row: int, column: int, problem: str) -> FileError:
            return self._error(layer, f"{name}[{start + row}][{column}]: {problem}")

        rows = self._file.rows(f"layers.{layer}.{name}", start, stop)
        return fields.numbers_of(field, rows, self._shape, error)

    def _ids(
        self, layer: int, start: int, rows: Sequence[dict[str, Any]], origins: Sequence[Provenance]
    ) -> U64:
        name = f"layers.{layer}.ids"
        if name in self._file.tensors:
            ids = self._file.rows(name, start, start + len(rows))
            if (ids < 0).any():
                raise self._error(layer, f"ids: got {ids[ids < 0][0]}, expected 0 or more")
            return ids.astype(np.uint64)
        made = []
        for number, (row, origin) in enumerate(zip(rows, origins, strict=True), start + 1):
            with self.errors_at(self.place(layer, number)):
                made.append(fields.id_of(row, origin))
        return np.array(made, dtype=np.uint64)

    def _provenance(self, layer: int) -> dict[str, list[Any]]:
        """Lists by field; none when the file holds no provenance of the layer."""
        name = f"layers.{layer}.provenance"
        with self.errors_at(f"metadata {name}"):
            columns: Any = json.loads(self._file.metadata.get(name, "{}"))
            _check_columns(columns, self._count(layer))
        return columns

    def _layer_of(self, name: str) -> int:
        found = _NAME.fullmatch(name)
        wanted = {_TENSORS[field][0] for field in ("id", *fields.widths(self._shape))}
        if found is None or found[2] not in wanted:
            names = ", ".join(f"layers.N.{field}" for field in sorted(wanted))
            raise FileError(
                self.path, name, f"unknown tensor, expected {names} ({self._shape.kind} memory)"
            )
        return int(found[1])

    def _check_shapes(self, layer: int) -> None:
        count, prefix = self._count(layer), f"layers.{layer}."
        wanted: dict[str, tuple[tuple[int, ...], str]] = {
            _TENSORS[field][0]: ((count, width), f"[n, {of}]")
            for field, (width, of) in fields.widths(self._shape).items()
        }
        if f"{prefix}ids" in self._file.tensors:
            wanted["ids"] = ((count,), "[n]")
        for name, (shape, of) in wanted.items():
            info = self._file.tensors.get(f"{prefix}{name}")
            if info is None:
                raise self._error(layer, f"{name}: missing")
            if info.shape != shape:
                got = f"got shape {list(info.shape)}, expected {list(shape)} ({of})"
                raise self._error(layer, f"{name}: {got}")
            if name in ("ids", "experts") and info.dtype[0] not in "IU":
                raise self._error(layer, f"{name}: got {info.dtype}, expected whole numbers")

    def _count(self, layer: int) -> int:
        info = self._file.tensors.get(f"layers.{layer}.keys")
        if info is None or not info.shape:
            raise self._error(layer, "keys: missing, expected [n, hidden_size]")
        return info.shape[0]

    def _error(self, layer: int, problem: str) -> FileError:
        return FileError(self.path, "", f"layers.{layer}.{problem}")


def _check_columns(columns: Any, count: int) -> None:
    if not isinstance(columns, dict):
        raise ValueError("expected an object with one list per field")
    for name, items in columns.items():
        if name not in fields.PROVENANCE_FIELDS:
            raise ValueError(
                f"{name}: unknown field, expected {', '.join(fields.PROVENANCE_FIELDS)}"
            )
        if not isinstance(items, list) or len(items) != count:
            raise ValueError(f"{name}: expected a list of {count} items, one per entry")


class SafetensorsWriter(EntryWriter):
    """Takes twice the file's size on disk until finish() returns, and RAM for the provenance only."""

    def __init__(self, path: Path, shape: EntryShape, metadata: Mapping[str, str]) -> None:
        super().__init__(path, shape, metadata)
        self._metadata = {"format": FORMAT, **metadata}
        self._files = ExitStack()
        path.touch()  # a directory that takes no file is refused before anything is read
        self._columns = {
            name: self._files.enter_context(tempfile.TemporaryFile(dir=path.parent))  # noqa: SIM115  # closed by the stack
            for name in ("id", *fields.widths(shape))
        }
        self._rows: Counter[int] = Counter()  # by layer, in the order in which they came
        self._origins: dict[int, dict[str, list[str]]] = {}
        self._origin_bytes = 0

    @override
    def append(self, layer: int, entries: Entries) -> None:
        self._rows[layer] += len(entries)
        columns = fields.columns_of(layer, entries, self._shape)
        for name, file in self._columns.items():
            file.write(np.ascontiguousarray(columns[name], _TENSORS[name][1]).data)
        lists = self._origins.setdefault(layer, {name: [] for name in fields.PROVENANCE_FIELDS})
        for name, parts in lists.items():
            parts += map(json.dumps, columns[name])
            if name not in fields.SNIPPET_FIELDS or any(columns[name]):
                self._origin_bytes += sum(2 + len(part) for part in parts[-len(entries) :])
        self._require_header(self._origin_bytes)

    @override
    def finish(self) -> None:
        metadata = dict(self._metadata)
        for layer, lists in self._origins.items():
            has_snippets = any(part != '""' for part in lists["snippet"])
            columns = (
                f'"{name}": [{", ".join(parts)}]'
                for name, parts in lists.items()
                if has_snippets or name not in fields.SNIPPET_FIELDS
            )
            metadata[f"layers.{layer}.provenance"] = "{" + ", ".join(columns) + "}"
        self._require_header(len(json.dumps(metadata)))
        mode = self._path.stat().st_mode
        try:
            save_file(self._tensors(), self._path, metadata)
        except SafetensorError as error:
            raise FileError(self._path, "", str(error)) from error
        self._path.chmod(mode)  # the library makes files that only their owner reads
        self.close()

    @override
    def close(self) -> None:
        self._files.close()

    def _tensors(self) -> dict[str, AnyArray]:
        """Every layer's part of every column, mapped."""
        tensors: dict[str, AnyArray] = {}
        for field, column in self._columns.items() if self._rows else ():
            column.flush()
            name, dtype = _TENSORS[field]
            mapped: AnyArray = np.memmap(column, dtype, mode="r")
            mapped = mapped.reshape(self._rows.total(), -1) if field != "id" else mapped
            start = 0
            for layer, count in self._rows.items():
                tensors[f"layers.{layer}.{name}"] = mapped[start : start + count]
                start += count
        return tensors

    def _require_header(self, header_bytes: int) -> None:
        if header_bytes > MAX_HEADER_BYTES:
            raise FileError(
                self._path,
                "",
                f"the provenance does not fit in a header of {MAX_HEADER_BYTES} bytes; a large memory needs Parquet, "
                "and so does a smaller one that has snippets, e.g. FILE.parquet",
            )

"""Entries to a safetensors file. The header comes first and needs every size, so columns wait in files of their own."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from router_service.arrays import AnyArray, Entries
from router_service.cli.entry_files import fields
from router_service.cli.entry_files.batches import EntryShape, FileError
from router_service.cli.entry_files.tensor_file import MAX_HEADER_BYTES
from router_service.memories.settings import Kind

FORMAT = "knnmoe-entries-1"
_DTYPES = {np.dtype("<u8"): "U64", np.dtype("<i4"): "I32", np.dtype("<f4"): "F32"}


class _Column:
    """One field of every layer, layer after layer, in a file without a name."""

    def __init__(self, directory: Path, files: ExitStack) -> None:
        self._file = files.enter_context(tempfile.TemporaryFile(dir=directory))  # noqa: SIM115  # closed by the stack
        self._rows: dict[int, int] = {}
        self._dtype, self._row_shape = np.dtype("<f4"), tuple[int, ...]()

    def append(self, layer: int, rows: AnyArray) -> None:
        self._dtype, self._row_shape = rows.dtype.newbyteorder("<"), rows.shape[1:]
        self._rows[layer] = self._rows.get(layer, 0) + len(rows)
        self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).data)

    def tensors(self, field: str, offset: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Header entries, the bytes beginning at `offset`."""
        for layer, count in self._rows.items():
            shape = [count, *self._row_shape]
            end = offset + int(np.prod(shape)) * self._dtype.itemsize
            entry = {"dtype": _DTYPES[self._dtype], "shape": shape, "data_offsets": [offset, end]}
            yield f"layers.{layer}.{field}", entry
            offset = end

    def copy_to(self, file: Any) -> None:
        self._file.seek(0)
        shutil.copyfileobj(self._file, file, 1 << 20)


class SafetensorsWriter:
    """See EntryWriter. Takes twice the file's size on disk until finish() returns, and RAM for the provenance only."""

    def __init__(self, path: Path, shape: EntryShape, metadata: Mapping[str, str]) -> None:
        self._path, self._shape = path, shape
        self._metadata = {"format": FORMAT, **metadata}
        self._files = ExitStack()
        # Ids first: tensors then begin at multiples of their items' sizes.
        names = ("ids", "keys", *(_TENSOR_OF.get(f, f) for f in fields.value_fields(shape.kind)))
        self._columns = {name: _Column(path.parent, self._files) for name in names}
        self._origins: dict[int, dict[str, list[str]]] = {}
        self._origin_bytes = 0
        self._file = self._files.enter_context(path.open("wb"))

    def write(self, layer: int, entries: Entries) -> None:
        """See EntryWriter.write. Raises FileError when the header cannot hold the provenance."""
        self._columns["ids"].append(layer, entries.ids)
        self._columns["keys"].append(layer, entries.keys)
        for name, rows in self._values(entries.values):
            self._columns[name].append(layer, rows)
        lists = self._origins.setdefault(layer, {name: [] for name in fields.PROVENANCE_FIELDS})
        origins = [asdict(origin) for origin in entries.provenance]
        for name, parts in lists.items():
            parts += [json.dumps(origin[name]) for origin in origins]
            self._origin_bytes += sum(2 + len(part) for part in parts[-len(origins) :])
        self._require_header(self._origin_bytes)

    def finish(self) -> None:
        """See EntryWriter.finish."""
        header = self._header()
        self._require_header(len(header))
        self._file.write(len(header).to_bytes(8, "little") + header)
        for column in self._columns.values():
            column.copy_to(self._file)
        self.close()

    def close(self) -> None:
        """See EntryWriter.close."""
        self._files.close()

    def _values(self, values: AnyArray) -> Iterator[tuple[str, AnyArray]]:
        if self._shape.kind is Kind.LOGIT_DELTA:
            yield "values", values
            return
        half = self._shape.top_k
        yield "experts", values[:, :half].astype(np.int32)
        yield "weights", values[:, half:]

    def _header(self) -> bytes:
        """JSON, padded so that the tensors begin at a multiple of 8."""
        metadata = dict(self._metadata)
        for layer, lists in self._origins.items():
            columns = (f'"{name}": [{", ".join(parts)}]' for name, parts in lists.items())
            metadata[f"layers.{layer}.provenance"] = "{" + ", ".join(columns) + "}"
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for field, column in self._columns.items():
            for name, entry in column.tensors(field, end):
                header[name] = entry
                end = entry["data_offsets"][1]
        text = json.dumps(header, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)

    def _require_header(self, header_bytes: int) -> None:
        if header_bytes > MAX_HEADER_BYTES:
            raise FileError(
                self._path,
                "",
                f"the provenance does not fit in a header of {MAX_HEADER_BYTES} bytes; a large memory needs Parquet, "
                "e.g. FILE.parquet",
            )


_TENSOR_OF = {"value": "values"}

"""The safetensors container, read piece by piece: the library's NumPy reader knows no bf16 and reads no rows of one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from knnmoe.tensors import widen_bf16

from router_service.arrays import AnyArray
from router_service.cli.entry_files.batches import FileError

MAX_HEADER_BYTES = 100_000_000
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}  # fmt: skip


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
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                if not 0 < size <= min(MAX_HEADER_BYTES, path.stat().st_size - 8):
                    raise ValueError(f"header of {size} bytes in a file of {path.stat().st_size}")
                header = json.loads(file.read(size))
            self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
            self._start = 8 + size
            self.tensors = {name: self._info(name, entry) for name, entry in header.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
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

    def _info(self, name: str, entry: Any) -> TensorInfo:
        first, last = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        if dtype not in _DTYPES:
            raise ValueError(f"{name}: dtype {dtype}, expected one of {', '.join(_DTYPES)}")
        if not all(type(number) is int and number >= 0 for number in (first, last, *shape)):
            raise ValueError(f"{name}: shape or offsets are no counts")
        if last - first != prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
            raise ValueError(f"{name}: {last - first} bytes for shape {list(shape)} of {dtype}")
        if self._start + last > self.path.stat().st_size:
            raise ValueError(f"{name}: the file ends before the tensor does")
        return TensorInfo(dtype, shape, self._start + first)

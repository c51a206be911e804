"""safetensors files of entries, and errors that name the file, the tensor and the row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from knnmoe.entry_ids import entry_id
from safetensors.numpy import save_file

from router_service.arrays import Provenance
from router_service.transfer.entry_fields import FileError
from router_service.transfer.safetensors import TensorFile
from tests.unit.router_service.transfer.entry_rows import (
    error_of,
    read_batches,
)


def _tensors(n: int = 2, **changes: Any) -> dict[str, Any]:
    tensors = {
        "layers.1.ids": np.arange(n, dtype=np.int64),
        "layers.1.keys": np.ones((n, 3), np.float16),
        "layers.1.values": np.ones((n, 4), np.float64),
    }
    changed = {f"layers.1.{name}": value for name, value in changes.items()}
    return {name: value for name, value in (tensors | changed).items() if value is not None}


def _safetensors(tmp_path: Path, tensors: dict[str, Any], **metadata: str) -> Path:
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata or None)
    return tmp_path / "x.safetensors"


def test_safetensors_of_other_dtypes(tmp_path: Path) -> None:
    [batch] = read_batches(_safetensors(tmp_path, _tensors()))
    assert batch.layer == 1
    assert batch.entries.keys.dtype == np.float32
    assert batch.entries.provenance == [Provenance()] * 2


def test_safetensors_in_bf16(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    bits = (np.arange(6, dtype=np.float32).view(np.uint32) >> 16).astype("<u2")
    values = np.ones((2, 4), "<f4")
    header = {
        "layers.0.keys": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "layers.0.values": {"dtype": "F32", "shape": [2, 4], "data_offsets": [12, 44]},
        "__metadata__": {"layers.0.provenance": json.dumps(
            {"source": ["a", "a"], "example": ["b", "b"], "position": [0, 1]}
        )},
    }  # fmt: skip
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bits.tobytes() + values.tobytes())
    [batch] = read_batches(path)
    assert batch.entries.keys.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert batch.entries.ids.tolist() == [entry_id("a", "b", 0), entry_id("a", "b", 1)]


BAD_TENSORS = {
    "no keys": (_tensors(keys=None), "layers.1.keys: missing"),
    "no values": (_tensors(values=None), "layers.1.values: missing"),
    "narrow": (_tensors(keys=np.ones((2, 2))), "layers.1.keys: got shape [2, 2], expected [2, 3]"),
    "fewer": (
        _tensors(values=np.ones((1, 4))),
        "layers.1.values: got shape [1, 4], expected [2, 4]",
    ),
    "ids": (
        _tensors(ids=np.zeros((2, 1), np.int64)),
        "layers.1.ids: got shape [2, 1], expected [2]",
    ),
    "float ids": (_tensors(ids=np.zeros(2)), "layers.1.ids: got F64, expected whole numbers"),
    "id -1": (_tensors(ids=np.array([3, -1])), "layers.1.ids: got -1"),
    "no ids": (_tensors(ids=None), "layers.1, row 1: id: missing"),
    "NaN": (_tensors(keys=np.array([[1, 2, 3], [1, np.nan, 3]])), "layers.1.keys[1][1]: got nan"),
    "unknown": (
        _tensors(extra=np.ones(2)),
        "layers.1.extra: unknown tensor, expected layers.N.ids",
    ),
    "other kind": (_tensors(experts=np.ones((2, 2), np.int32)), "layers.1.experts: unknown tensor"),
}


@pytest.mark.parametrize(("tensors", "message"), BAD_TENSORS.values(), ids=list(BAD_TENSORS))
def test_bad_tensors(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    assert error_of(_safetensors(tmp_path, tensors)).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "metadata layers.1.provenance: Expecting"),
        ("[]", "metadata layers.1.provenance: expected an object"),
        ('{"source": ["a"]}', "metadata layers.1.provenance: source: expected a list of 2 items"),
        ('{"sauce": ["a", "b"]}', "metadata layers.1.provenance: sauce: unknown field"),
        ('{"position": [0, -1]}', "metadata layers.1.provenance: entry 2: position: got -1"),
    ],
)
def test_bad_provenance(tmp_path: Path, text: str, message: str) -> None:
    path = _safetensors(tmp_path, _tensors(), **{"layers.1.provenance": text})
    assert error_of(path).startswith(message)


def _damaged() -> Iterator[tuple[str, bytes]]:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    size = len(header).to_bytes(8, "little")
    yield "empty", b""
    yield "short", b"1234"
    yield "header longer than the file", (1 << 40).to_bytes(8, "little") + b"{}"
    yield "no JSON", (4).to_bytes(8, "little") + b"abcd"
    yield "no object", (2).to_bytes(8, "little") + b"[]"
    yield "no data", size + header
    yield "wrong size", size + header.replace(b"[2]", b"[3]") + bytes(8)
    yield "unknown dtype", size + header.replace(b"F32", b"F99") + bytes(8)
    yield (
        "negative shape",
        (len(header) + 1).to_bytes(8, "little") + header.replace(b"[2]", b"[-2]") + bytes(8),
    )
    yield "no offsets", (10).to_bytes(8, "little") + b'{"a": {}}  '


@pytest.mark.parametrize("data", [d for _, d in _damaged()], ids=[n for n, _ in _damaged()])
def test_damaged_safetensors(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(FileError, match="not a safetensors file"):
        TensorFile(path)

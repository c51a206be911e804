"""Packed tensors on the wire, as NumPy arrays.

Decoding is a view over the message's bytes (bf16 excepted: NumPy has no bf16, so it is widened to f32); encoding
copies once, into the message.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnmoe.v1.types_pb2 import (
    DTYPE_BF16,
    DTYPE_F16,
    DTYPE_F32,
    DTYPE_I8,
    DTYPE_I32,
    DTYPE_U8,
    DTYPE_U64,
    Dtype,
    Tensor,
)

Array = NDArray[Any]

_NUMPY_OF: dict[Dtype, np.dtype[Any]] = {
    DTYPE_F32: np.dtype("<f4"),
    DTYPE_F16: np.dtype("<f2"),
    DTYPE_BF16: np.dtype("<u2"),
    DTYPE_I32: np.dtype("<i4"),
    DTYPE_U64: np.dtype("<u8"),
    DTYPE_U8: np.dtype("u1"),
    DTYPE_I8: np.dtype("i1"),
}
_WIRE_OF = {dtype: wire for wire, dtype in _NUMPY_OF.items() if wire != DTYPE_BF16}
FLOATS = frozenset({DTYPE_F32, DTYPE_F16, DTYPE_BF16})
MAX_DIMENSIONS = 4


class TensorError(ValueError):
    """A packed tensor contradicts itself."""


def dtype_name(wire: int) -> str:
    """Short name of a wire dtype, for messages: `f32`, or `unknown(9)`."""
    if wire not in Dtype.values():
        return f"unknown({wire})"
    return Dtype.Name(wire).removeprefix("DTYPE_").lower()


def to_tensor(array: Array, *, bf16: bool = False) -> Tensor:
    """Packs an array (f32, f16, i32, u64, u8 or i8; `bf16` rounds f32 to bf16). Raises TensorError on other dtypes."""
    packed = Tensor()
    pack(packed, array, bf16=bf16)
    return packed


def pack(tensor: Tensor, array: Array, *, bf16: bool = False) -> None:
    """to_tensor() into an empty message, e.g. the field of another: setting a field to a message copies its data."""
    wire = DTYPE_BF16 if bf16 else _wire_of(array.dtype)
    bits = _round_to_bf16(array.astype(np.float32, copy=False)) if bf16 else array
    tensor.dtype = wire
    tensor.shape.extend(array.shape)
    tensor.data = bits.astype(_NUMPY_OF[wire], copy=False).tobytes()


def _wire_of(dtype: np.dtype[Any]) -> Dtype:
    wire = _WIRE_OF.get(dtype) or _WIRE_OF.get(dtype.newbyteorder("<"))
    if wire is None:
        raise TensorError(f"no wire dtype for {dtype}")
    return wire


def to_array(tensor: Tensor) -> Array:
    """The array of a tensor: a read-only view (bf16: a new f32 array). Raises TensorError as to_bits()."""
    array = to_bits(tensor)
    return widen_bf16(array) if tensor.dtype == DTYPE_BF16 else array


def to_bits(tensor: Tensor) -> Array:
    """The array of a tensor, a read-only view; of bf16 its bits in u16.

    Raises TensorError when the dtype is unknown, the shape has more than 4 dimensions, or the byte count is not
    prod(shape) * itemsize.
    """
    dtype = _NUMPY_OF.get(tensor.dtype)
    if dtype is None:
        raise TensorError(
            f"dtype {dtype_name(tensor.dtype)}, expected one of f32, f16, bf16, i32, u64, u8"
        )
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise TensorError(f"{len(tensor.shape)} dimensions, expected at most {MAX_DIMENSIONS}")
    shape, data = tuple(tensor.shape), tensor.data  # a copy each time it is read
    expected = prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise TensorError(
            f"{len(data)} bytes, expected {expected} for shape {list(shape)} of {dtype_name(tensor.dtype)}"
        )
    try:
        return np.frombuffer(data, dtype=dtype).reshape(shape)
    except ValueError as error:  # no elements, yet dimensions beyond what NumPy can address
        raise TensorError(f"shape {list(shape)}, expected smaller dimensions") from error


def widen_bf16(bits: Array) -> Array:
    """f32 of bf16 bits in u16."""
    wide = bits.astype(np.uint32)
    return np.left_shift(wide, 16, out=wide).view(np.float32)


def _round_to_bf16(array: Array) -> Array:
    """Round to nearest even, as torch does; NaN stays NaN."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    nan = np.isnan(array)
    return np.where(nan, np.uint16(0x7FC0), rounded) if nan.any() else rounded

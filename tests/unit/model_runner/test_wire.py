"""Torch tensors on the wire and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from knnmoe import tensors
from knnmoe.fingerprint import ModelFingerprint
from knnmoe.v1.types_pb2 import DTYPE_BF16, DTYPE_F16, DTYPE_F32, DTYPE_I32, DTYPE_U8
from knnmoe.v1.types_pb2 import Tensor as WireTensor
from torch import Tensor

from model_runner.architectures import Assignment
from model_runner.errors import BadInput
from model_runner.wire import (
    decode_assignment,
    decode_floats,
    decode_tensor,
    encode_assignment,
    encode_floats,
)

WIRE_DTYPES = [
    (torch.float32, DTYPE_F32),
    (torch.float16, DTYPE_F16),
    (torch.bfloat16, DTYPE_BF16),
]


def assert_same(one: Tensor, other: Tensor) -> None:
    """The same dtype, shape and bits."""
    assert one.dtype == other.dtype
    assert torch.equal(one, other)
    assert torch.equal(one.signbit(), other.signbit())


@pytest.mark.parametrize(("dtype", "wire_dtype"), WIRE_DTYPES)
@given(
    rows=st.integers(0, 4),
    columns=st.integers(0, 5),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 99),
)
def test_floats_come_back_bit_for_bit(
    dtype: torch.dtype, wire_dtype: int, rows: int, columns: int, exponent: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(rows, columns, generator=generator) * 10.0**exponent).to(dtype)
    message = encode_floats(tensor)
    assert message.dtype == wire_dtype
    assert_same(decode_floats(message), tensor)


@pytest.mark.parametrize("dtype", [dtype for dtype, _ in WIRE_DTYPES])
def test_extreme_floats_come_back(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    values = [0.0, -0.0, limits.max, limits.min, limits.tiny, limits.smallest_normal / 2]
    tensor = torch.tensor([[*values, torch.inf, -torch.inf]], dtype=dtype)
    assert_same(decode_floats(encode_floats(tensor)), tensor)
    assert decode_floats(encode_floats(torch.full((1, 1), torch.nan, dtype=dtype))).isnan().all()


def test_doubles_travel_as_f32() -> None:
    tensor = torch.tensor([[0.1, 1e300]], dtype=torch.float64)
    assert_same(decode_floats(encode_floats(tensor)), tensor.float())


def test_views_travel_as_what_they_show() -> None:
    tensor = torch.arange(24.0).reshape(4, 6)
    column = torch.arange(3.0)[:, None].expand(3, 1)
    for view in (tensor.T, tensor[:, ::2], tensor[1:3], tensor[:1].expand(3, 6), column):
        assert_same(decode_floats(encode_floats(view)), view)
    needs_gradient = tensor.clone().requires_grad_()
    assert_same(decode_floats(encode_floats(needs_gradient)), tensor)


def test_what_comes_back_can_be_written_to() -> None:
    message = encode_floats(torch.zeros(2, 2))
    decode_floats(message)[0, 0] = 5
    assert not decode_floats(message).any()


@pytest.mark.parametrize("dtype", [dtype for dtype, _ in WIRE_DTYPES])
def test_an_assignment_comes_back(dtype: torch.dtype) -> None:
    given_one = Assignment(torch.rand(3, 2).to(dtype), torch.tensor([[0, 7], [3, 3], [2, 1]]))
    message = encode_assignment(given_one)
    assert message.experts.dtype == DTYPE_I32
    back = decode_assignment(message)
    assert_same(back.weights, given_one.weights)
    assert_same(back.experts, given_one.experts)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (WireTensor(dtype=DTYPE_F32, shape=[2, 2], data=b"\0" * 15), "15 bytes, expected 16"),
        (WireTensor(dtype=DTYPE_BF16, shape=[2, 2], data=b"\0" * 9), "9 bytes, expected 8"),
        (WireTensor(dtype=DTYPE_U8, shape=[1], data=b"\0"), "dtype u8"),
        (WireTensor(shape=[1], data=b"\0"), "dtype unspecified"),
        (WireTensor(dtype=DTYPE_F16, shape=[1] * 5, data=b"\0\0"), "5 dimensions"),
    ],
)
def test_a_malformed_reply_is_named(message: WireTensor, says: str) -> None:
    with pytest.raises(BadInput, match="a reply of the sidecar") as caught:
        decode_floats(message)
    assert says in str(caught.value)


def test_experts_are_integers() -> None:
    message = encode_assignment(Assignment(torch.rand(1, 2), torch.tensor([[0, 1]])))
    message.experts.CopyFrom(encode_floats(torch.rand(1, 2)))
    with pytest.raises(BadInput, match="dtype f32"):
        decode_assignment(message)


def test_a_tensor_of_the_dtypes_asked_for() -> None:
    flags = torch.tensor([0, 2, 1], dtype=torch.uint8)
    message = tensors.to_tensor(flags.numpy())
    assert_same(decode_tensor(message, DTYPE_U8), flags)
    with pytest.raises(BadInput, match="dtype u8"):
        decode_tensor(message, DTYPE_F32, DTYPE_I32)


def test_a_fingerprint_field_by_field() -> None:
    message = ModelFingerprint("olmoe", 4, 32, 8, 2, "abc").message()
    fields = {descriptor.name: value for descriptor, value in message.ListFields()}
    assert fields == {
        "architecture": "olmoe",
        "num_layers": 4,
        "hidden_size": 32,
        "num_experts": 8,
        "top_k": 2,
        "router_hash": "abc",
    }

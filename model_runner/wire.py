"""Torch tensors on the wire. bf16 travels as it is; everything else goes through `knnmoe.tensors`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from knnmoe import tensors
from knnmoe.v1 import types_pb2
from knnmoe.v1.types_pb2 import DTYPE_BF16, DTYPE_F16, DTYPE_F32, DTYPE_I32, SparseAssignment
from knnmoe.v1.types_pb2 import Tensor as WireTensor
from torch import Tensor

from model_runner.architectures.families import Assignment
from model_runner.errors import BadInput

_FLOATS = {torch.float32: DTYPE_F32, torch.float16: DTYPE_F16, torch.bfloat16: DTYPE_BF16}


def encode_floats(tensor: Tensor) -> WireTensor:
    """A float tensor in its own dtype (f64 as f32), copied to the host once."""
    if tensor.dtype not in _FLOATS:
        tensor = tensor.float()
    host = tensor.detach().cpu()
    bits = host.view(torch.int16) if host.dtype == torch.bfloat16 else host  # NumPy has no bf16
    return WireTensor(dtype=_FLOATS[host.dtype], shape=host.shape, data=bits.numpy().tobytes())


def encode_by_layer(tensors_by_layer: Mapping[int, Tensor]) -> dict[int, WireTensor]:
    """A float tensor per layer, as encode_floats."""
    return {layer: encode_floats(tensor) for layer, tensor in tensors_by_layer.items()}


def decode_floats(message: WireTensor) -> Tensor:
    """A float tensor on the host, in the dtype of the message. Raises BadInput on a malformed one."""
    tensor = decode_tensor(message, *tensors.FLOATS)
    return tensor.view(torch.bfloat16) if message.dtype == DTYPE_BF16 else tensor


def decode_as_sent(message: WireTensor) -> Tensor:
    """A tensor on the host in the dtype of the message. Raises BadInput on a malformed one."""
    tensor = decode_tensor(message, message.dtype)
    return tensor.view(torch.bfloat16) if message.dtype == DTYPE_BF16 else tensor


def encode_assignment(assignment: Assignment) -> SparseAssignment:
    """Experts as i32, weights in their own dtype."""
    experts = assignment.experts.detach().to("cpu", torch.int32).contiguous().numpy()
    return SparseAssignment(
        experts=tensors.to_tensor(experts), weights=encode_floats(assignment.weights)
    )


def decode_assignment(message: SparseAssignment) -> Assignment:
    """Experts as int64, weights in the dtype of the message. Raises BadInput on a malformed one."""
    experts = decode_tensor(message.experts, DTYPE_I32).long()
    return Assignment(decode_floats(message.weights), experts)


def decode_tensor(message: WireTensor, *dtypes: types_pb2.Dtype) -> Tensor:
    """A tensor on the host, of bf16 the bits in int16. Raises BadInput on a malformed one or another dtype."""
    if message.dtype not in dtypes:
        raise BadInput(f"a reply of the sidecar: dtype {tensors.dtype_name(message.dtype)}")
    try:
        bits = tensors.to_bits(message)
        # torch has no u16. A copy, for what is read may not be written; torch.tensor() takes ten times as long
        return torch.from_numpy(
            (bits.view(np.int16) if message.dtype == DTYPE_BF16 else bits).copy()
        )
    except tensors.TensorError as error:
        raise BadInput(f"a reply of the sidecar: {error}") from error

"""A faster experts computation for training on a CPU, for the same function as Transformers' own.

Token copies are sorted by expert and every expert's rows padded to a multiple of 256: oneDNN
compiles a bfloat16 kernel per matrix shape, so shapes have to repeat from step to step.
"""

import ctypes
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

PADDED_EXPERTS = "padded_bfloat16"
_ROW_MULTIPLE = 256
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def register_padded_experts() -> None:
    """Make `PADDED_EXPERTS` a value of a config's experts implementation."""
    ALL_EXPERTS_FUNCTIONS.register(PADDED_EXPERTS, padded_experts)


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory: training otherwise made 100,000 page faults a second."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
        libc.mallopt(_M_TOP_PAD, 256 << 20)


def padded_experts(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' outputs, computed in bfloat16.

    `hidden` is [tokens, hidden], `chosen` int64 [tokens, k], `weights` [tokens, k]; the result has
    the shape and dtype of `hidden`. `experts` is a module with Transformers' stacked weights.
    """
    tokens, k = chosen.shape
    slots, rows, counts = _slots(chosen, experts.num_experts)
    with torch.autocast(hidden.device.type, enabled=False):
        copies = hidden.bfloat16().repeat_interleave(k, dim=0)
        inputs = _ToSlots.apply(copies, rows, slots)  # type: ignore[no-untyped-call]
        raised = _per_expert(inputs, experts, "gate_up_proj", counts)
        outputs = _per_expert(experts._apply_gate(raised), experts, "down_proj", counts)
        gathered = _FromSlots.apply(outputs, slots)  # type: ignore[no-untyped-call]
        combined = torch.bmm(weights.bfloat16().unsqueeze(1), gathered.view(tokens, k, -1))
    return combined.squeeze(1).to(hidden.dtype)


def _slots(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Lay the token copies out by expert.

    Returns the slot of each copy [tokens * k], the copy in each slot [slots] (copy 0 in padding),
    and the number of slots of each expert.
    """
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts)
    padded = (counts + _ROW_MULTIPLE - 1) // _ROW_MULTIPLE * _ROW_MULTIPLE
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    ordered_slots = torch.arange(len(flat), device=flat.device) + shift[flat[order]]
    slots = torch.empty_like(order).index_copy_(0, order, ordered_slots)
    rows = order.new_zeros(int(padded.sum())).index_copy_(0, ordered_slots, order)
    return slots, rows, padded.tolist()


def _per_expert(inputs: Tensor, experts: Any, name: str, counts: list[int]) -> Tensor:
    """Multiply each expert's rows of [slots, in] by its own matrix, and add its bias where it has one."""
    weights = getattr(experts, name).bfloat16()
    matrices = (weights if experts.is_transposed else weights.mT).unbind(0)
    parts = torch.split_with_sizes(inputs, counts)
    products = [part @ matrix for part, matrix in zip(parts, matrices, strict=True)]
    if experts.has_bias:
        biases = getattr(experts, f"{name}_bias").bfloat16().unbind(0)
        products = [product + bias for product, bias in zip(products, biases, strict=True)]
    return torch.cat(products)


class _ToSlots(torch.autograd.Function):
    """Gathers rows into slots; a plain gather's gradient would be a slow scattered sum."""

    @staticmethod
    def forward(ctx: Any, copies: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return copies.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return gradients[0].index_select(0, slots), None, None


class _FromSlots(torch.autograd.Function):
    """Gathers each copy's row from its slot; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.slot_count = len(outputs)
        return outputs.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        (gradient,) = gradients
        spread = gradient.new_zeros(ctx.slot_count, gradient.shape[1])
        return spread.index_copy_(0, slots, gradient), None

"""The loss as a function of every router's logits, and its gradient in one pass.

Paper: section on building the memory; r starts at the router's own logits and moves against the
gradient of -log p(y_t | prefix). The gradient of all layers comes from one forward and one
backward pass, the layer's key (its router input) from the same pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from model_runner.architectures.decoder import decoder_of
from model_runner.architectures.discovery import find_router_sites
from model_runner.errors import BadInput, UnsupportedModel
from model_runner.logit_tap import LogitTap
from model_runner.memory_builder.layer_trace import CallRecorder, LayerTrace, Scope
from model_runner.memory_builder.straight_through import (
    straight_through as straight_through_experts,
)

__all__ = ["LayerTrace", "router_gradients"]

LossFunction = Callable[[Tensor], Tensor]

_KEY_VALUE_PROJECTIONS = frozenset(
    {
        "k_proj",
        "v_proj",
        "kv_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
        "v_proj_current",
        "v_proj_delayed",
    }
)


def router_gradients(
    model: nn.Module,
    input_ids: Tensor,
    loss_fn: LossFunction,
    *,
    attention_mask: Tensor | None = None,
    straight_through: bool = False,
    detach_kv: bool = False,
    scope: Scope = "leaf",
) -> list[LayerTrace]:
    """Gradients of the loss with respect to each MoE layer's router logits.

    The model's parameters stay as they are and accumulate no gradient. Within a `RouterHooks`
    context with a `Logits` policy, trace and gradient are those of the logits that the policy
    chose, which is what boosting needs; with scope "live" the policy cuts the router's own path.

    Memory grows with T times the experts that run; `straight_through` runs all N. Experts set to
    `batched_mm` copy their weights per token, so they run as `grouped_mm` here.

    Args:
        model: a Mixture-of-Experts causal LM in eval mode.
        input_ids: `[B, S]` int64.
        loss_fn: maps logits `[B, S, V]` to a scalar sum (a mean would divide the gradient by the
            token count).
        attention_mask: `[B, S]`, 0 on padding.
        straight_through: experts that were not chosen get a gradient too (see that module).
            The output equals the plain one up to the rounding of the experts' sum.
        detach_kv: cut the gradient at the K and V projections, so that each token's gradient is
            (nearly) of its own loss only: cosine 0.88 to 0.97 to the exact one. A token's
            attention to itself is cut too; recurrent layers (Mamba, short convolutions) are not.
        scope: "leaf" holds the routers of later layers fixed, which is what replaying stored
            assignments does; "live" lets the gradient pass through them.

    Returns:
        One trace per MoE layer, in layer order.

    Raises:
        UnsupportedModel: no routers; or `detach_kv` and no K/V projections to cut at.
        HookBypassed: some router was not called.
        BadInput: an unknown scope, a loss that is not a scalar, or torch.inference_mode.

    """
    if scope not in ("leaf", "live"):
        raise BadInput(f'scope is "leaf" or "live", not {scope!r}')
    if torch.is_inference_mode_enabled():
        raise BadInput("gradients cannot be taken under torch.inference_mode()")
    recorder = CallRecorder(scope)
    sites = find_router_sites(model)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_frozen(model))
        stack.enter_context(_memory_lean_experts(model))
        stack.enter_context(LogitTap(model, recorder.tap, sites))
        stack.enter_context(recorder.recording(sites))
        if straight_through:
            stack.enter_context(straight_through_experts(sites, recorder.logits))
        if detach_kv:
            stack.enter_context(_detached_keys_values(model))
        output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        # Read before the backward pass: gradient checkpointing runs the routers again in it.
        calls = recorder.calls(sites)
        gradients = _gradients(loss_fn(output.logits), [call.leaf for call in calls])
    return [
        call.trace(gradient, input_ids.shape)
        for call, gradient in zip(calls, gradients, strict=True)
    ]


def _gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if loss.dim() != 0:
        raise BadInput(f"loss_fn must give a scalar, got shape {list(loss.shape)}")
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of `model` requires a gradient until the block is left."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _memory_lean_experts(model: nn.Module) -> Iterator[None]:
    """`batched_mm` experts, which copy weights per token, run as `grouped_mm`."""
    get_implementation = getattr(model, "get_experts_implementation", None)
    before = get_implementation() if callable(get_implementation) else {}
    set_implementation: Any = getattr(model, "set_experts_implementation", None)
    if "batched_mm" not in before.values():
        yield
        return
    set_implementation(
        {part: "grouped_mm" if used == "batched_mm" else used for part, used in before.items()}
    )
    try:
        yield
    finally:
        set_implementation(before)


@contextmanager
def _detached_keys_values(model: nn.Module) -> Iterator[None]:
    """The outputs of the K and V projections carry no gradient until the block is left."""
    projections = [
        module
        for name, module in decoder_of(model).named_modules()
        if name.rpartition(".")[2] in _KEY_VALUE_PROJECTIONS
    ]
    if not projections:
        raise UnsupportedModel(f"{type(model).__name__}: no K/V projections to detach")
    with ExitStack() as stack:
        for module in projections:
            handle = module.register_forward_hook(lambda _module, _args, output: output.detach())
            stack.callback(handle.remove)
        yield

"""The gradient of a loss with respect to every router's logits, and what each router saw on the way.

`router_gradients` runs the frozen model once, with a point to differentiate at under each router's logits. By default
only the chosen experts have a gradient; with `straight_through` all of them do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model_runner.architectures.discovery import decoder_of, find_router_sites
from model_runner.architectures.families import Assignment, RouterArgs, RouterKwargs, RouterSite
from model_runner.errors import BadInput, HookBypassed, UnsupportedModel
from model_runner.logit_tap import Forward, LogitTap, wrapped_forward

Scope = Literal["leaf", "live"]
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


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """What one MoE layer saw in a pass, and how the loss depends on its logits.

    Attributes:
        site: the router.
        router_input: `[B, S, d]` in the model's dtype: the key.
        router_logits: `[B, S, num_logits]` raw logits, in the dtype that the router made them.
        gradient: `[B, S, num_logits]` of the summed loss, in the same dtype. Exactly zero where
            the loss does not reach: each sequence's last token, and padding.
        router_args: positional arguments of the router's call, for `family_assignment`.
        router_kwargs: keyword arguments of the same call.

    """

    site: RouterSite
    router_input: Tensor
    router_logits: Tensor
    gradient: Tensor
    router_args: RouterArgs
    router_kwargs: RouterKwargs


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
        straight_through: experts that were not chosen get a gradient too (straight_through_experts).
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
        call.trace(site, gradient, input_ids.shape)
        for site, call, gradient in zip(sites, calls, gradients, strict=True)
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


@dataclass(slots=True)
class RecordedCall:
    """One router's call.

    Attributes:
        leaf: `[T, num_logits]`, what the gradient is taken with respect to.
        logits: `[T, num_logits]`, what the router went on with, attached to the graph.
        args: positional arguments of the call; None until its assignment was made.
        kwargs: keyword arguments of the call.

    """

    leaf: Tensor
    logits: Tensor
    args: RouterArgs | None = None
    kwargs: RouterKwargs = field(default_factory=dict)

    def trace(self, site: RouterSite, gradient: Tensor, batch_shape: torch.Size) -> LayerTrace:
        """With its gradient `[T, num_logits]`, unflattened to batch_shape = (B, S)."""
        args = self.args or ()
        return LayerTrace(
            site=site,
            router_input=site.router_input(args, self.kwargs).detach().reshape(*batch_shape, -1),
            router_logits=self.logits.detach().reshape(*batch_shape, -1),
            gradient=gradient.reshape(*batch_shape, -1),
            router_args=tuple(_detached(value) for value in args),
            router_kwargs={name: _detached(value) for name, value in self.kwargs.items()},
        )


class CallRecorder:
    """Records the last call of each router; its `tap` goes into a `LogitTap`.

    Args:
        scope: "leaf" replaces the logits by a copy with no history; "live" adds a zero to them.

    """

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._calls: dict[int, RecordedCall] = {}

    def tap(self, site: RouterSite, logits: Tensor) -> Tensor:
        """The logits `[T, num_logits]` with a differentiable leaf in or under them."""
        if self._scope == "leaf":
            leaf = standing_in = logits.detach().clone().requires_grad_()
        else:
            leaf = torch.zeros_like(logits).requires_grad_()
            standing_in = logits + leaf
        self._calls[site.layer] = RecordedCall(leaf, standing_in)
        return standing_in

    @contextmanager
    def recording(self, sites: tuple[RouterSite, ...]) -> Iterator[None]:
        """Keeps the routers' arguments until the block is left."""

        def on_output(layer: int, args: RouterArgs, kwargs: RouterKwargs, _output: Any) -> None:
            self._calls[layer].args, self._calls[layer].kwargs = args, kwargs

        with ExitStack() as stack:
            for site in sites:
                for handle in site.family.attach(site, functools.partial(on_output, site.layer)):
                    stack.callback(handle.remove)
            yield

    def logits(self, site: RouterSite) -> Tensor:
        """The logits `[T, num_logits]` that the router went on with, attached to the graph."""
        return self._calls[site.layer].logits

    def calls(self, sites: tuple[RouterSite, ...]) -> list[RecordedCall]:
        """The last call of each router. Raises HookBypassed when some router was not called."""
        last = [(site, self._calls.get(site.layer)) for site in sites]
        missed = [site.name for site, call in last if call is None or call.args is None]
        if missed:
            raise HookBypassed(missed)
        return [call for _, call in last if call is not None]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


@contextmanager
def straight_through_experts(
    sites: Sequence[RouterSite], logits_of: Callable[[RouterSite], Tensor]
) -> Iterator[None]:
    """All experts of every site run until the block is left, those that were not chosen with weight zero.

    In families that renormalise over the chosen k, only those k logits have a gradient, so a step can demote an expert
    but never promote one. Here all N experts run, with the weights

        sparse + unselected * (p - stop_gradient(p))

    whose value is the sparse assignment's and whose gradient reaches every logit. p is the family's own score of each
    expert (softmax or sigmoid of the logits) in the family's own scale.

    It cannot help llama4, whose scores multiply an expert's input: at score zero a gated expert's output and its
    derivative are both zero.

    Args:
        sites: the routers.
        logits_of: the logits `[T, num_logits]` that the site's last call used, attached to the
            graph that the gradient is taken in.

    """
    scores: dict[int, Score] = {}
    with ExitStack() as stack:
        for site in sites:
            watch = functools.partial(_watched, site, scores)
            stack.enter_context(wrapped_forward(site.router, watch))
            densify = functools.partial(_densified, site, scores, logits_of)
            for handle in site.family.attach(site, densify):
                stack.callback(handle.remove)
        yield


def _watched(site: RouterSite, scores: dict[int, Score], forward: Forward) -> Forward:
    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        with _ScoreWatch() as watch:
            output = forward(*args, **kwargs)
        # deepseek_v4 and inkling2 name theirs (sqrt of softplus); it is a parameter-free module.
        own: Score | None = getattr(site.router, "score_fn", None)
        scores[site.layer] = own or watch.score or _softmax
        return output

    return watched


def _densified(
    site: RouterSite,
    scores: dict[int, Score],
    logits_of: Callable[[RouterSite], Tensor],
    args: RouterArgs,
    kwargs: RouterKwargs,
    output: Any,
) -> Any:
    _, weights, experts = site.family.read(output)
    score = scores[site.layer](logits_of(site).float())[:, : site.num_experts]
    return site.family.write(output, dense_assignment(weights, experts, score))


def dense_assignment(weights: Tensor, experts: Tensor, score: Tensor) -> Assignment:
    """The same mixture over all N experts, with a gradient for each of them.

    Args:
        weights: `[T, k]` of the sparse assignment, attached to the graph.
        experts: `[T, k]` int64.
        score: `[T, N]` the family's score of each expert, attached to the graph.

    Returns:
        weights `[T, N]` of the dtype of `weights`, experts `[T, N]` int64 = 0..N-1.

    """
    in_scale = score * _scale(weights, experts, score)
    dense = torch.zeros_like(score, dtype=weights.dtype).scatter_add(1, experts, weights)
    gradient_only = (in_scale - in_scale.detach()).to(weights.dtype)
    unselected = (dense == 0).to(weights.dtype)
    expert_ids = torch.arange(score.shape[1], device=experts.device).expand_as(score)
    return Assignment(dense + unselected * gradient_only, expert_ids)


def _scale(weights: Tensor, experts: Tensor, score: Tensor) -> Tensor:
    """What one unit of score weighs `[T, 1]`: renormalisation and scaling, held fixed."""
    chosen_score = score.detach().gather(1, experts).sum(-1, keepdim=True)
    ratio = weights.detach().float().sum(-1, keepdim=True) / chosen_score
    # zaya's "skip" choice has no weight at all, which says nothing about the scale.
    return torch.where(ratio > 0, ratio, torch.ones_like(ratio))


Score = Callable[[Tensor], Tensor]


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


_SCORES: dict[Any, Score] = {
    torch.softmax: _softmax,
    F.softmax: _softmax,
    Tensor.softmax: _softmax,
    torch.sigmoid: torch.sigmoid,
    F.sigmoid: torch.sigmoid,
    Tensor.sigmoid: torch.sigmoid,
    F.logsigmoid: torch.sigmoid,
}


class _ScoreWatch(TorchFunctionMode):
    """Notes which scoring function a router calls first."""

    def __init__(self) -> None:
        super().__init__()
        self.score: Score | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self.score is None:
            self.score = _SCORES.get(func)
        return func(*args, **(kwargs or {}))

"""A router's site, and how each family's routers are hooked, read, overwritten, and run again with other logits.

One generic family serves nearly every model of transformers v5; dbrx, jetmoe, llama4 and longcat differ from it in a
method or two. A router is left to do everything that comes after its logits (bias, groups, top-k, scale), so that what
it makes of other logits is the family's own assignment, bit for bit. Nothing here patches or forks a model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from model_runner.errors import BadInput, UnsupportedModel

RouterArgs = tuple[Any, ...]
RouterKwargs = Mapping[str, Any]
Function = TypeVar("Function", bound=Callable[..., Any])
OnOutput = Callable[[RouterArgs, RouterKwargs, Any], Any]
"""`(args, kwargs, output) -> output | None`: sees a router's call; None leaves its output alone."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which experts each token uses, and how strongly.

    Attributes:
        weights: `[T, k']` in the family's own scale, any floating dtype.
        experts: `[T, k']` integer expert ids; a repeated id adds its weights up.

    """

    weights: Tensor
    experts: Tensor


class RouterOutput(NamedTuple):
    """A router's output, read.

    Attributes:
        router_logits: `[T, num_logits]` as the router returned them (see `returns_raw_logits`).
        weights: `[T, k]` in the family's own scale.
        experts: `[T, k]` int64.

    """

    router_logits: Tensor
    weights: Tensor
    experts: Tensor


@dataclass(frozen=True, slots=True)
class RouterSite:
    """One MoE layer's router.

    Attributes:
        layer: 0..L-1 over the MoE layers, in the order in which they run.
        name: dotted path of the router below the model.
        router: the module that makes the logits.
        experts: the module that the assignment goes to; None where a family has no single one.
        num_experts: experts that an assignment may name.
        num_logits: width of the raw logits. It is `num_experts` but for zaya (one more, its
            "skip" class cannot be named) and inkling (more, the shared experts' gates).
            Longcat's zero-computation experts count in both numbers: they can be named.
        top_k: experts per token of the model's own router.
        hidden_size: d, the width of the router's input.
        logit_map: which of the router's linear maps of width num_logits makes the logits, the
            last; more than 1 only where an inner layer happens to be as wide.
        family: how this site is hooked.

    """

    layer: int
    name: str
    router: nn.Module = field(repr=False)
    experts: nn.Module | None = field(repr=False)
    num_experts: int
    num_logits: int
    top_k: int
    hidden_size: int
    logit_map: int = field(repr=False)
    family: Family = field(repr=False, compare=False)

    def router_input(self, args: RouterArgs, kwargs: RouterKwargs) -> Tensor:
        """The hidden states `[T, d]` in a router's call, tokens row-major over (B, S)."""
        hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
        return hidden_states.reshape(-1, hidden_states.shape[-1])


@dataclass(frozen=True, slots=True)
class Family:
    """How a router is hooked, read and overwritten: one whose output starts with logits, weights and experts.

    Or with experts, weights and logits: granitemoe and aria before transformers 5.21.

    An `output` is what the family's router returns; `attach` may give another, as long as `read` and `write` take it.

    Attributes:
        returns_raw_logits: False where the first item is something else: probabilities
            (gemma4), soft-capped logits (laguna), the routed experts' logits only (inkling), weights (longcat).

    """

    returns_raw_logits: bool = True

    def attach(self, site: RouterSite, on_output: OnOutput) -> list[RemovableHandle]:
        """Calls `on_output` after each call of the router."""
        hook = site.router.register_forward_hook(
            lambda _router, args, kwargs, output: on_output(args, kwargs, output), with_kwargs=True
        )
        return [hook]

    def read(self, output: Any) -> RouterOutput:
        """The first three items of the output."""
        first, weights, third, *_ = output
        logits, experts = (first, third) if first.is_floating_point() else (third, first)
        return RouterOutput(logits, weights, experts)

    def write(self, output: Any, assignment: Assignment) -> Any:
        """The output with another assignment."""
        first, _, third, *rest = output
        if first.is_floating_point():
            return (first, assignment.weights, assignment.experts, *rest)
        return (assignment.experts, assignment.weights, third, *rest)

    def reassign(
        self, site: RouterSite, logits: Tensor, args: RouterArgs, kwargs: RouterKwargs
    ) -> Any:
        """Runs the router again, past its hooks, with `logits [T, num_logits]` for its own.

        `args` and `kwargs` are those of the router's own call: some routers need more than the
        hidden states (a bias, token ids, the previous router's states).
        """
        if args and type(args[0]) is Tensor:
            swap = _LogitSwap(site, logits)
            output = site.router.forward(_Carrier.of(args[0], swap), *args[1:], **kwargs)
            if swap.maps_to_go <= 0 and _is_plain(output):
                return output
        with swapped_logits(site, logits):  # whatever the logits are made of
            return site.router.forward(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class DbrxFamily(Family):
    """The router gives logits only; its block makes the assignment (DbrxFFN in modeling_dbrx.py).

    The experts' call is where the assignment can be replaced; logits and router input are kept from the router's call
    before it. An output is, as in the generic family, `(logits, weights, experts)`.

    Attributes:
        block: the DbrxFFN around router and experts.

    """

    block: Any = field(kw_only=True)

    @override
    def attach(self, site: RouterSite, on_output: OnOutput) -> list[RemovableHandle]:
        """Calls `on_output` before each call of the experts."""
        if site.experts is None:
            raise UnsupportedModel(f"{site.name}: a dbrx block without experts")
        here = threading.local()  # threads may run the model at the same time

        @uncompiled
        def after_router(*call: Any) -> None:
            here.last_call = call

        @uncompiled
        def before_experts(_experts: nn.Module, args: tuple[Any, ...]) -> Any:
            hidden_states, experts, weights = args
            router_args, router_kwargs, logits = here.last_call
            output = on_output(router_args, router_kwargs, (logits, weights, experts))
            return None if output is None else (hidden_states, output[2], output[1])

        # Not super(): a dataclass with slots is another class than the one that super() means.
        router_hook = Family.attach(self, site, after_router)
        return [*router_hook, site.experts.register_forward_pre_hook(before_experts)]

    @override
    def reassign(
        self, site: RouterSite, logits: Tensor, args: RouterArgs, kwargs: RouterKwargs
    ) -> Any:
        """Lets the block assign `logits`, once the router has cast them (and any tap seen them)."""
        chosen = Family.reassign(self, site, logits, args, kwargs)
        weights, experts = self._assigned(site.router_input(args, kwargs), chosen)
        return (chosen, weights, experts)

    def _assigned(self, _hidden_states: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The block's weights and experts."""
        weights, experts = self.block.route_tokens_to_experts(logits)
        return weights, experts


class LinearRouterFamily(DbrxFamily):
    """As dbrx, with a block that says experts before weights: jamba before transformers 5.21."""

    @override
    def _assigned(self, hidden_states: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        experts, weights = self.block.route_tokens_to_experts(hidden_states, logits)
        return weights, experts


class JetMoeFamily(Family):
    """Output: `(pair_order [T*k], token [T*k], weight [T*k], pairs per expert, logits [T, N])`."""

    @override
    def read(self, output: Any) -> RouterOutput:
        """The pairs in token order again."""
        pair_order, _, sorted_weights, pairs_per_expert, logits = output
        tokens = logits.shape[0]
        expert_ids = torch.arange(len(pairs_per_expert), device=logits.device)
        counts = torch.tensor(pairs_per_expert, device=logits.device)
        sorted_experts = expert_ids.repeat_interleave(counts)
        weights = torch.empty_like(sorted_weights).scatter(0, pair_order, sorted_weights)
        experts = torch.empty_like(sorted_experts).scatter(0, pair_order, sorted_experts)
        return RouterOutput(logits, weights.reshape(tokens, -1), experts.reshape(tokens, -1))

    @override
    def write(self, output: Any, assignment: Assignment) -> Any:
        """The pairs of another assignment, sorted by expert."""
        logits, slots = output[-1], assignment.experts.shape[1]
        flat_experts = assignment.experts.flatten()
        pair_order = flat_experts.sort(0)[1]  # the router's own call, so that ties fall alike
        token = pair_order.div(slots, rounding_mode="trunc")
        pairs_per_expert = flat_experts.bincount(minlength=len(output[3])).tolist()
        return pair_order, token, assignment.weights.flatten()[pair_order], pairs_per_expert, logits


@dataclass(frozen=True, slots=True)
class Llama4Family(Family):
    """Attributes: top_k: experts per token, to turn dense scores into k slots."""

    top_k: int = field(kw_only=True)

    @override
    def read(self, output: Any) -> RouterOutput:
        """The k scores that are not zero."""
        scores, logits = output
        experts = logits.topk(self.top_k, dim=1).indices  # the router's own call
        return RouterOutput(logits, scores.gather(1, experts), experts)

    @override
    def write(self, output: Any, assignment: Assignment) -> Any:
        """Scores that are zero but for the assignment's experts."""
        scores, logits = output
        dense = torch.zeros_like(scores)
        return dense.scatter_add(1, assignment.experts, assignment.weights), logits


class LongcatFlashFamily(Family):
    """The generic family, with a second slot of weight zero where there is only one.

    Before transformers 5.19 the output is weights and experts alone, so its logits are never read from it.
    """

    @override
    def read(self, output: Any) -> RouterOutput:
        """The last two items of the output."""
        *_, weights, experts = output
        return RouterOutput(output[0], weights, experts)

    @override
    def write(self, output: Any, assignment: Assignment) -> Any:
        """As the generic family, with at least two slots."""
        weights, experts = assignment.weights, assignment.experts
        if experts.shape[1] == 1:
            weights = torch.cat([weights, torch.zeros_like(weights)], -1)
            experts = torch.cat([experts, experts], -1)
        return (*output[:-2], weights, experts)


def uncompiled(function: Function, *, recursive: bool = True) -> Function:
    """`function`, left out of torch.compile, which loses what is written to a thread's own state.

    recursive: so is what it calls.
    """
    disable: Any = (
        torch.compiler.disable
    )  # imports torch's compiler, as every model of transformers does
    return cast("Function", disable(function, recursive=recursive))


# kolibri1 uses torch.mm with an fp32 output on GPUs, every other router F.linear.
_LINEAR_MAPS = frozenset({F.linear, torch.mm, torch.matmul, torch.Tensor.mm, torch.Tensor.matmul})


@contextmanager
def swapped_logits(site: RouterSite, swap: Callable[[Tensor], Tensor] | Tensor) -> Iterator[None]:
    """Within it, `swap` maps the logits of the site's router to those that it goes on with, or is these.

    Args:
        site: the router about to run, once; its weights are not read.
        swap: gets and gives `[T, num_logits]`; its result is cast to the router's own dtype. With a tensor the
            router's own logits are not computed, where that can be left out: it is half of a router's time.

    Raises:
        UnsupportedModel: on leaving, when no linear map of this width was computed.
        BadInput: when `swap` gives another shape.

    """
    mode = _LogitSwap(site, swap)
    with mode:
        yield
    if mode.maps_to_go > 0:
        raise UnsupportedModel(
            f"{site.name} computed no linear map of width {site.num_logits}: "
            "its logits cannot be replaced"
        )


class _LogitSwap(TorchFunctionMode):
    """Attributes: maps_to_go: linear maps of the logits' width that are still to come."""

    def __init__(self, site: RouterSite, swap: Callable[[Tensor], Tensor] | Tensor) -> None:
        super().__init__()
        self._site = site
        self._num_logits = site.num_logits
        self._swap = swap
        self.maps_to_go = site.logit_map

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: RouterKwargs) -> Any:
        """What the router goes on with in place of `func(*args, **kwargs)`."""
        if func is F.linear and isinstance(self._swap, Tensor) and self._is_last(args):
            self.maps_to_go = 0
            return self._fitted(self._swap, args[0], (*args[0].shape[:-1], self._num_logits))
        result = func(*args, **kwargs)
        if func in _LINEAR_MAPS and result.shape[-1] == self._num_logits:
            self.maps_to_go -= 1
            if self.maps_to_go == 0:
                return self._swapped(result)
        return result

    def _is_last(self, args: tuple[Any, ...]) -> bool:
        """Whether this linear map makes the logits, in the dtype of its input as it is without autocast."""
        return (
            self.maps_to_go == 1
            and len(args) > 1
            and args[1].shape[0] == self._num_logits
            and not torch.is_autocast_enabled(args[0].device.type)
        )

    def _swapped(self, result: Tensor) -> Tensor:
        swap = self._swap
        logits = swap if isinstance(swap, Tensor) else swap(result.reshape(-1, self._num_logits))
        return self._fitted(logits, result, result.shape)

    def _fitted(self, swapped: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        if swapped.shape == shape and swapped.dtype == like.dtype and swapped.device == like.device:
            return swapped
        expected = prod(shape[:-1]), self._num_logits
        if swapped.shape != expected:
            raise BadInput(
                f"router logits of {self._site.name} must be {expected}, got {tuple(swapped.shape)}"
            )
        return swapped.to(device=like.device, dtype=like.dtype).reshape(shape)


class _Carrier(Tensor):
    """A router's input, and what is made of it until the logits are: calls on it are shown to a `_LogitSwap`.

    A mode sees what the router does with its logits too, and doubles its time: 124 us of a token's, 53 so (2026-11-28).
    """

    swap: _LogitSwap

    @classmethod
    def of(cls, tensor: Tensor, swap: _LogitSwap) -> _Carrier:
        """The same numbers, carried."""
        carrier = tensor.as_subclass(cls)
        carrier.swap = swap
        return carrier

    @classmethod
    @override
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            swap = next((each.swap for each in args if isinstance(each, cls)), None)
            if swap is None or swap.maps_to_go <= 0:
                return func(*args, **kwargs)
            result = swap.call(func, args, kwargs)
            if swap.maps_to_go > 0 and isinstance(result, Tensor):
                return cls.of(result, swap)
            return result


def _is_plain(output: Any) -> bool:
    """Whether nothing in a router's output is carried."""
    parts = output if isinstance(output, tuple | list) else (output,)
    return not any(isinstance(part, _Carrier) for part in parts)

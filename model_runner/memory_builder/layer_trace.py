"""Keep what each router saw in a forward pass, with a point to differentiate at under its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from model_runner.architectures.site import RouterArgs, RouterKwargs, RouterSite
from model_runner.errors import HookBypassed

__all__ = ["CallRecorder", "LayerTrace", "RecordedCall", "Scope"]

Scope = Literal["leaf", "live"]


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


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One router's call.

    Attributes:
        site: the router.
        leaf: `[T, num_logits]`, what the gradient is taken with respect to.
        logits: `[T, num_logits]`, what the router went on with, attached to the graph.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    """

    site: RouterSite
    leaf: Tensor
    logits: Tensor
    args: RouterArgs
    kwargs: RouterKwargs

    def trace(self, gradient: Tensor, batch_shape: torch.Size) -> LayerTrace:
        """With its gradient `[T, num_logits]`, unflattened to batch_shape = (B, S)."""
        router_input = self.site.router_input(self.args, self.kwargs)
        return LayerTrace(
            site=self.site,
            router_input=router_input.detach().reshape(*batch_shape, -1),
            router_logits=self.logits.detach().reshape(*batch_shape, -1),
            gradient=gradient.reshape(*batch_shape, -1),
            router_args=tuple(_detached(value) for value in self.args),
            router_kwargs={name: _detached(value) for name, value in self.kwargs.items()},
        )


class CallRecorder:
    """Records the last call of each router; its `tap` goes into a `LogitTap`.

    Args:
        scope: "leaf" replaces the logits by a copy with no history; "live" adds a zero to them.

    """

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._leaf_and_logits: dict[int, tuple[Tensor, Tensor]] = {}
        self._arguments: dict[int, tuple[RouterArgs, RouterKwargs]] = {}

    def tap(self, site: RouterSite, logits: Tensor) -> Tensor:
        """The logits `[T, num_logits]` with a differentiable leaf in or under them."""
        if self._scope == "leaf":
            leaf = logits.detach().clone().requires_grad_()
            standing_in = leaf
        else:
            leaf = torch.zeros_like(logits).requires_grad_()
            standing_in = logits + leaf
        self._leaf_and_logits[site.layer] = leaf, standing_in
        return standing_in

    @contextmanager
    def recording(self, sites: tuple[RouterSite, ...]) -> Iterator[None]:
        """Keeps the routers' arguments until the block is left."""
        with ExitStack() as stack:
            for site in sites:
                for handle in site.family.attach(site, self._on_output(site)):
                    stack.callback(handle.remove)
            yield

    def _on_output(self, site: RouterSite) -> Callable[[RouterArgs, RouterKwargs, Any], None]:
        def on_output(args: RouterArgs, kwargs: RouterKwargs, output: Any) -> None:
            self._arguments[site.layer] = args, kwargs

        return on_output

    def logits(self, site: RouterSite) -> Tensor:
        """The logits `[T, num_logits]` that the router went on with, attached to the graph."""
        return self._leaf_and_logits[site.layer][1]

    def calls(self, sites: tuple[RouterSite, ...]) -> list[RecordedCall]:
        """The last call of each router.

        Raises:
            HookBypassed: some router was not called.

        """
        missed = [site.name for site in sites if site.layer not in self._arguments]
        if missed:
            raise HookBypassed(missed)
        return [
            RecordedCall(site, *self._leaf_and_logits[site.layer], *self._arguments[site.layer])
            for site in sites
        ]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value

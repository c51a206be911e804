"""dbrx: the router gives logits only, its block makes the assignment.

Source: transformers/models/dbrx/modeling_dbrx.py, DbrxFFN. The experts' call is where the
assignment can be replaced; logits and router input are kept from the router's call before it.
An output is, as in the generic family, `(logits, weights, experts)`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from model_runner.architectures.generic import GenericFamily
from model_runner.architectures.site import (
    Assignment,
    OnOutput,
    RouterArgs,
    RouterKwargs,
    RouterOutput,
    RouterSite,
)
from model_runner.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class DbrxFamily(GenericFamily):
    """Attributes: block: the DbrxFFN around router and experts."""

    block: Any = field(kw_only=True)

    def attach(self, site: RouterSite, on_output: OnOutput) -> list[RemovableHandle]:
        """Calls `on_output` before each call of the experts."""
        if site.experts is None:
            raise UnsupportedModel(f"{site.name}: a dbrx block without experts")
        last_call: list[Any] = []

        def after_router(*call: Any) -> None:
            last_call[:] = call

        def before_experts(_experts: nn.Module, args: tuple[Any, ...]) -> Any:
            hidden_states, experts, weights = args
            router_args, router_kwargs, logits = last_call
            output = on_output(router_args, router_kwargs, (logits, weights, experts))
            return None if output is None else (hidden_states, output[2], output[1])

        router_hook = GenericFamily.attach(self, site, after_router)
        return [*router_hook, site.experts.register_forward_pre_hook(before_experts)]

    def reassign(
        self, site: RouterSite, logits: Tensor, args: RouterArgs, kwargs: RouterKwargs
    ) -> Any:
        """Lets the block assign `logits`, once the router has cast them (and any tap seen them)."""
        chosen = GenericFamily.reassign(self, site, logits, args, kwargs)
        weights, experts = self.block.route_tokens_to_experts(chosen)
        return (chosen, weights, experts)


class JetMoeFamily(GenericFamily):
    """Output: `(pair_order [T*k], token [T*k], weight [T*k], pairs per expert, logits [T, N])`."""

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

    def write(self, output: Any, assignment: Assignment) -> Any:
        """The pairs of another assignment, sorted by expert."""
        logits, slots = output[-1], assignment.experts.shape[1]
        flat_experts = assignment.experts.flatten()
        pair_order = flat_experts.sort(0)[1]  # the router's own call, so that ties fall alike
        token = pair_order.div(slots, rounding_mode="trunc")
        pairs_per_expert = flat_experts.bincount(minlength=len(output[3])).tolist()
        return pair_order, token, assignment.weights.flatten()[pair_order], pairs_per_expert, logits


@dataclass(frozen=True, slots=True)
class Llama4Family(GenericFamily):
    """Attributes: top_k: experts per token, to turn dense scores into k slots."""

    top_k: int = field(kw_only=True)

    def read(self, output: Any) -> RouterOutput:
        """The k scores that are not zero."""
        scores, logits = output
        experts = logits.topk(self.top_k, dim=1).indices  # the router's own call
        return RouterOutput(logits, scores.gather(1, experts), experts)

    def write(self, output: Any, assignment: Assignment) -> Any:
        """Scores that are zero but for the assignment's experts."""
        scores, logits = output
        dense = torch.zeros_like(scores)
        return dense.scatter_add(1, assignment.experts, assignment.weights), logits


class LongcatFlashFamily(GenericFamily):
    """The generic family, with a second slot of weight zero where there is only one."""

    def write(self, output: Any, assignment: Assignment) -> Any:
        """As the generic family, with at least two slots."""
        weights, experts = assignment.weights, assignment.experts
        if experts.shape[1] == 1:
            weights = torch.cat([weights, torch.zeros_like(weights)], -1)
            experts = torch.cat([experts, experts], -1)
        return (output[0], weights, experts, *output[3:])

"""dbrx: the router gives logits only, its block makes the assignment.

Source: transformers/models/dbrx/modeling_dbrx.py, DbrxFFN. The experts' call is where the
assignment can be replaced; logits and router input are kept from the router's call before it.
An output is, as in the generic family, `(logits, weights, experts)`.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from model_runner.architectures.generic import GenericFamily
from model_runner.architectures.site import OnOutput, RouterArgs, RouterKwargs, RouterSite
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

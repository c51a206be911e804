"""Routers that return `(logits, weights, experts, ...)`: nearly every family of transformers v5.

The block does `_, weights, experts, *rest = self.gate(x)` and `self.experts(x, experts, weights)`
(transformers/models/olmoe/modeling_olmoe.py, OlmoeSparseMoeBlock), so that a forward hook on the
router is enough, for any number of experts per token.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from model_runner.architectures.logit_swap import swapped_logits
from model_runner.architectures.site import (
    Assignment,
    OnOutput,
    RouterArgs,
    RouterKwargs,
    RouterOutput,
    RouterSite,
)


@dataclass(frozen=True, slots=True)
class GenericFamily:
    """A router whose output tuple starts with logits, weights and experts.

    Attributes:
        returns_raw_logits: False where the first item is something else: probabilities
            (gemma4), soft-capped logits (laguna), the routed experts' logits only (inkling).

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
        logits, weights, experts, *_ = output
        return RouterOutput(logits, weights, experts)

    def write(self, output: Any, assignment: Assignment) -> Any:
        """The output with another second and third item."""
        logits, _, _, *rest = output
        return (logits, assignment.weights, assignment.experts, *rest)

    def reassign(
        self, site: RouterSite, logits: Tensor, args: RouterArgs, kwargs: RouterKwargs
    ) -> Any:
        """Runs the router again, past its hooks, with `logits [T, num_logits]` for its own.

        `args` and `kwargs` are those of the router's own call: some routers need more than the
        hidden states (a bias, token ids, the previous router's states).
        """
        with swapped_logits(site, lambda _own: logits):
            return site.router.forward(*args, **kwargs)

"""The words that the hooks and the families share: a router's site, its output, an assignment.

Nothing here knows a particular family; `Family` is what each of them implements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

RouterArgs = tuple[Any, ...]
RouterKwargs = Mapping[str, Any]
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


class Family(Protocol):
    """How one family's routers are hooked, read and overwritten."""

    @property
    def returns_raw_logits(self) -> bool:
        """Whether `read` gives the logits just as the router's last linear map made them."""

    def attach(self, site: RouterSite, on_output: OnOutput) -> list[RemovableHandle]:
        """Calls `on_output` at each routing decision of the site, until the handles go."""

    def read(self, output: Any) -> RouterOutput:
        """The assignment in a router's output."""

    def write(self, output: Any, assignment: Assignment) -> Any:
        """The same output with another assignment, of the dtypes that `read` gave."""

    def reassign(
        self, site: RouterSite, logits: Tensor, args: RouterArgs, kwargs: RouterKwargs
    ) -> Any:
        """The output that the family's own code makes of `logits [T, num_logits]`."""


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

"""Replace what a router's last linear map computes, while its own code runs.

A router is left to do everything that comes after its logits (bias, groups, top-k, scale), so
that whatever it makes of other logits is the family's own assignment, bit for bit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from model_runner.architectures.site import (
    Assignment,
    OnOutput,
    RouterArgs,
    RouterKwargs,
    RouterOutput,
    RouterSite,
)
from model_runner.errors import BadInput, UnsupportedModel

# kolibri1 uses torch.mm with an fp32 output on GPUs, every other router F.linear.
_LINEAR_MAPS = frozenset({F.linear, torch.mm, torch.matmul, torch.Tensor.mm, torch.Tensor.matmul})


@contextmanager
def swapped_logits(site: RouterSite, swap: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, `swap` maps the logits of the site's router to those that it goes on with.

    Args:
        site: the router about to run, once; its weights are not read.
        swap: gets and gives `[T, num_logits]`; its result is cast to the router's own dtype.

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

    def __init__(self, site: RouterSite, swap: Callable[[Tensor], Tensor]) -> None:
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
        result = func(*args, **(kwargs or {}))
        if func in _LINEAR_MAPS and result.shape[-1] == self._num_logits:
            self.maps_to_go -= 1
            if self.maps_to_go == 0:
                return self._swapped(result)
        return result

    def _swapped(self, result: Tensor) -> Tensor:
        logits = result.reshape(-1, self._num_logits)
        swapped = self._swap(logits)
        if swapped.shape != logits.shape:
            raise BadInput(
                f"router logits of {self._site.name} must be {tuple(logits.shape)}, "
                f"got {tuple(swapped.shape)}"
            )
        return swapped.to(device=result.device, dtype=result.dtype).reshape(result.shape)


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

"""Replace what a router's last linear map computes, while its own code runs.

A router is left to do everything that comes after its logits (bias, groups, top-k, scale), so
that whatever it makes of other logits is the family's own assignment, bit for bit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model_runner.architectures.site import RouterSite
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

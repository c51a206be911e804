"""Replace what a router's last linear map computes, while its own code runs.

A router is left to do everything that comes after its logits (bias, groups, top-k, scale), so
that whatever it makes of other logits is the family's own assignment, bit for bit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model_runner.errors import BadInput, UnsupportedModel

# kolibri1 uses torch.mm with an fp32 output on GPUs, every other router F.linear.
_LINEAR_MAPS = frozenset({F.linear, torch.mm, torch.matmul, torch.Tensor.mm, torch.Tensor.matmul})


@contextmanager
def swapped_logits(
    router: nn.Module, num_logits: int, swap: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Within it, `swap` maps a router's logits to those that it goes on with.

    Args:
        router: the module about to run, once; only its name and its weights' shapes are used.
        num_logits: width of the logits.
        swap: gets and gives `[T, num_logits]`; its result is cast to the router's own dtype.

    Raises:
        UnsupportedModel: on leaving, when no linear map of this width was computed.
        BadInput: when `swap` gives another shape.

    """
    mode = _LogitSwap(router, num_logits, swap)
    with mode:
        yield
    if mode.maps_to_go > 0:
        raise UnsupportedModel(
            f"{type(router).__name__} computed no linear map of width {num_logits}: "
            "its logits cannot be replaced"
        )


class _LogitSwap(TorchFunctionMode):
    """Attributes: maps_to_go: linear maps of the logits' width that are still to come."""

    def __init__(
        self, router: nn.Module, num_logits: int, swap: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self._router = router
        self._num_logits = num_logits
        self._swap = swap
        # An inner layer of a router's MLP may happen to be as wide as the logits: the last counts.
        self.maps_to_go = max(1, _maps_of_width(router.parameters(), num_logits))

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
                f"router logits of {type(self._router).__name__} must be "
                f"{tuple(logits.shape)}, got {tuple(swapped.shape)}"
            )
        return swapped.to(device=result.device, dtype=result.dtype).reshape(result.shape)


def _maps_of_width(parameters: Iterable[Tensor], width: int) -> int:
    # Shapes only: under offloading the weights themselves are on the meta device.
    return sum(weight.dim() == 2 and weight.shape[0] == width for weight in parameters)

"""The one operation that vLLM's compiler and its CUDA graphs see of a lookup: `knn_moe::route_(x, logits!, layer)`.

It is in place and stands before vLLM's own operation of the layer: that one returns a fresh tensor, so that nothing can
be put behind it in a graph that is replayed. Outside of a forward pass of real requests (profiling, warm-up) it does
nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

NAME = "knn_moe::route_"


class Pass(Protocol):
    """A forward pass that is running."""

    def route(self, layer: int, router_input: Tensor, router_logits: Tensor) -> None:
        """Replaces rows of router_logits [T, N] in place; router_input [T, d]. Never raises."""
        ...


class _Here(threading.local):
    running: Pass | None = None


_here = _Here()


@contextmanager
def running(forward_pass: Pass) -> Iterator[None]:
    """Within it the operation is answered by `forward_pass`, in this thread."""
    _here.running = forward_pass
    try:
        yield
    finally:
        _here.running = None


def _route(router_input: Tensor, router_logits: Tensor, layer: int) -> None:
    if _here.running is not None:
        _here.running.route(layer, router_input, router_logits)


def _fake(router_input: Tensor, router_logits: Tensor, layer: int) -> None:
    return None


_library: Any = torch.library.Library("knn_moe", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("route_(Tensor router_input, Tensor(a!) router_logits, int layer) -> ()")
_library.impl("route_", _route, "CompositeExplicitAutograd")
_library._register_fake("route_", _fake)


def route(router_input: Tensor, router_logits: Tensor, layer: int) -> None:
    """The operation."""
    torch.ops.knn_moe.route_(router_input, router_logits, layer)

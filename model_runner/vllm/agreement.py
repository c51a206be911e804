"""Ranks of a tensor-parallel group route alike: the first one asks, and gives what it wrote to the others.

The logits are broadcast, not the reply: so a fallback, a version and rounding are the same on every rank, and one of
them keeps replicas.
"""

from __future__ import annotations

from torch import Tensor
from vllm.distributed import get_tp_group


class Agreement:
    """Of this process's tensor-parallel group. Attributes: asks: whether this rank reads the memories."""

    def __init__(self) -> None:
        self._group = get_tp_group()
        self.asks = self._group.rank_in_group == 0

    def share(self, router_logits: Tensor) -> None:
        """Router logits [T, N], contiguous, become those of the rank that asks. Every rank calls it."""
        if self._group.world_size > 1:
            self._group.broadcast(router_logits, src=0)

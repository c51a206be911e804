"""Assignments said in router logits, for families in which that is exact, so that every kernel runs them.

Where a family's routing is a softmax over the k largest logits (or one over all, scaled to sum 1 over these k), weights
of k experts are their logarithms as logits, and a number far below for the others. Without that scaling the rest of the
mass would have to lie on experts that stay below the k, which is not always to be had: such families are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model_runner.architectures.families import Assignment

# exp(FLOOR - x) is 0 in f32 for every x that a kept expert can have, and f16 can hold it.
FLOOR = -10_000.0


def own_assignment(router_logits: Tensor, top_k: int) -> Assignment:
    """What such a family makes of logits [T, N]: softmax over the k largest; f32 weights, int64 experts [T, k]."""
    largest, experts = router_logits.float().topk(top_k, dim=-1)
    return Assignment(largest.softmax(-1), experts)


def as_logits(blended: Assignment, own_logits: Tensor, answered: Tensor) -> Tensor:
    """Logits [T, N] of which such a family makes `blended` [T, k], whose weights sum to 1; own where not answered [T].

    Experts of a token are distinct; one of weight 0 gets none.
    """
    experts = blended.experts.to(own_logits.device)
    logs = blended.weights.to(own_logits.device, torch.float32).log().clamp_min_(FLOOR)
    logits = torch.full_like(own_logits, FLOOR).scatter_(1, experts, logs.to(own_logits))
    return torch.where(answered.to(own_logits.device).unsqueeze(1), logits, own_logits)

"""From a gradient to the value of an entry. Pure functions of a LayerTrace; T = B*S tokens, N logits.

The paper's recipe steps the logits against the gradient and stores the family's assignment of the result. Ours stores a
bounded step itself, a logit delta, and leaves the averaging to the lookup (docs/experiments.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from model_runner.architectures.site import Assignment
from model_runner.errors import BadInput
from model_runner.logit_tap import family_assignment
from model_runner.memory_builder.objective import LayerTrace


class Kind(StrEnum):
    """What is stored."""

    ASSIGNMENT = "assignment"
    LOGIT_DELTA = "logit_delta"


class Norm(StrEnum):
    """How long a step is, from the gradient g of a token."""

    RAW = "raw"  # g
    UNIT = "unit"  # g / |g|
    SOFT = "soft"  # 1.5 g / (|g| + m / 2), m = the layer's median |g|: unit steps but for small gradients


class Direction(StrEnum):
    """Where a step goes: all but DESCENT are controls."""

    DESCENT = "descent"
    ASCENT = "ascent"
    RANDOM = "random"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an entry's value is made.

    Attributes:
        step_size: eta of the stored step; 1 for logit deltas, whose eta belongs to the memory's settings.
        shuffled: values are dealt out to other keys of the same batch (a control).
        seed: of random directions and shuffles.

    """

    kind: Kind
    norm: Norm
    step_size: float
    direction: Direction = Direction.DESCENT
    shuffled: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.step_size < float("inf"):
            raise BadInput(f"step size: got {self.step_size}, expected a number of 0 or more")


PAPER = Recipe(Kind.ASSIGNMENT, Norm.RAW, step_size=2.0)
RECOMMENDED = Recipe(Kind.LOGIT_DELTA, Norm.SOFT, step_size=1.0)
RECIPES = {"paper": PAPER, "recommended": RECOMMENDED}

CONTROLS = {
    "control_eta0": replace(PAPER, direction=Direction.NONE),
    "control_random": replace(PAPER, direction=Direction.RANDOM),
    "control_negated": replace(PAPER, direction=Direction.ASCENT),
    "control_shuffled": replace(PAPER, shuffled=True),
}

_TINY = 1e-12


def step(
    gradient: Tensor, recipe: Recipe, median_norm: float, generator: torch.Generator
) -> Tensor:
    """The change of logits [T, N] in f32 that a recipe makes of gradients [T, N]; finite, also for zero gradients."""
    g = gradient.float()
    norms = g.norm(dim=-1, keepdim=True)
    if recipe.direction is Direction.NONE:
        return torch.zeros_like(g)
    if recipe.direction is Direction.RANDOM:
        noise = torch.randn(g.shape, generator=generator).to(g.device)
        g = noise / noise.norm(dim=-1, keepdim=True) * norms
    if recipe.norm is Norm.UNIT:
        g = g / norms.clamp_min(_TINY)
    elif recipe.norm is Norm.SOFT:
        g = 1.5 * g / (norms + 0.5 * median_norm).clamp_min(_TINY)
    sign = 1.0 if recipe.direction is Direction.ASCENT else -1.0
    return sign * recipe.step_size * g


def assignment_values(trace: LayerTrace, logits: Tensor) -> Assignment:
    """The family's own assignment of logits [T, N]: what an assignment memory stores."""
    with torch.no_grad():
        found = family_assignment(
            trace.site, logits.to(trace.router_logits.dtype), trace.router_args, trace.router_kwargs
        )
    return Assignment(found.weights.float(), found.experts)


def entry_values(
    trace: LayerTrace, recipe: Recipe, median_norm: float, kept: Tensor, generator: torch.Generator
) -> Assignment | Tensor:
    """Values of the kept tokens ([n] row numbers): an assignment [n, k], or logit deltas [n, N] in f32."""
    change = step(trace.gradient.flatten(0, 1), recipe, median_norm, generator)
    order = kept
    if recipe.shuffled:
        order = kept[torch.randperm(len(kept), generator=generator).to(kept.device)]
    if recipe.kind is Kind.LOGIT_DELTA:
        return change[order]
    target = trace.router_logits.flatten(0, 1).float() + change
    values = assignment_values(trace, target)
    return Assignment(values.weights[order], values.experts[order])

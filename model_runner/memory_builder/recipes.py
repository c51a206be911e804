"""From a gradient to the value of an entry, and the named ways to do it: the paper's (arXiv 2601.02144), `recommended`.

Values are pure functions of a LayerTrace; T = B*S tokens, N logits.

The paper's recipe steps the logits against the gradient and stores the family's assignment of the result (`paper`), or,
as its version 2 can be read, the result itself (`paper-v2`). Ours stores a bounded step itself, a logit delta, and
leaves the averaging to the lookup (docs/experiments.md); `boosted` goes over the reference again with the memory on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from knnmoe.v1.types_pb2 import (
    MEMORY_KIND_ASSIGNMENT,
    MEMORY_KIND_LOGIT_DELTA,
    MEMORY_KIND_LOGITS,
    MemorySettings,
)
from torch import Tensor

from model_runner.architectures.families import Assignment
from model_runner.errors import BadInput
from model_runner.logit_tap import family_assignment
from model_runner.memory_builder.objective import LayerTrace
from model_runner.router_hooks import Logits


class Kind(StrEnum):
    """What is stored."""

    ASSIGNMENT = "assignment"
    LOGIT_DELTA = "logit_delta"
    LOGITS = "logits"


# Of n entries: an assignment [n, k], logits [n, N], or logit deltas [n, N].
Values = Assignment | Logits | Tensor


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

    def altered(self, norm: str | None, step_size: float | None) -> Recipe:
        """With another norm or step size, where one is given."""
        return replace(
            self,
            norm=self.norm if norm is None else Norm(norm),
            step_size=self.step_size if step_size is None else step_size,
        )


PAPER = Recipe(Kind.ASSIGNMENT, Norm.RAW, step_size=2.0)
# Of version 2's step size nothing is known: as in `paper`.
PAPER_V2 = replace(PAPER, kind=Kind.LOGITS)
RECOMMENDED = Recipe(Kind.LOGIT_DELTA, Norm.SOFT, step_size=1.0)

# eta of logit-delta memories by depth: a large step in the first layer harms, later ones bear more than 1
# (measured: docs/experiments.md).
RECOMMENDED_STEP_SIZE = 2.25
# With null entries, which keep harm down: gain less ten times the harm is largest on dev (docs/experiments.md).
SILENCED_STEP_SIZE = 3.0
_FIRST_LAYER, _EARLY_LAYERS, _LATE_LAYERS = 0.5, 1.0, 1.3

_WIRE_KINDS = {
    Kind.ASSIGNMENT: MEMORY_KIND_ASSIGNMENT,
    Kind.LOGIT_DELTA: MEMORY_KIND_LOGIT_DELTA,
    Kind.LOGITS: MEMORY_KIND_LOGITS,
}


@dataclass(frozen=True, slots=True)
class Preset:
    """How a memory is made and read.

    Attributes:
        recipe: of values.
        lambda0: the similarity at the median distance.
        rounds: of boosting at most.
        step_size: eta of logit deltas in a memory that has null entries.

    """

    name: str
    recipe: Recipe
    lambda0: float
    rounds: int = 0
    step_size: float = RECOMMENDED_STEP_SIZE

    def settings(self, num_layers: int, *, null_entries: bool = False) -> MemorySettings:
        """Settings of a new memory for a model of `num_layers` MoE layers; gamma is calibrated later."""
        settings = MemorySettings(preset=self.name, kind=_WIRE_KINDS[self.recipe.kind])
        if self.recipe.kind is Kind.LOGIT_DELTA:
            eta = self.step_size if null_entries else RECOMMENDED_STEP_SIZE
            settings.step_size.extend(step_sizes(num_layers, eta))
        return settings


def step_sizes(num_layers: int, eta: float = RECOMMENDED_STEP_SIZE) -> list[float]:
    """Eta per layer: half in the first, once in the first third of the others, 1.3 times after it."""
    early = 1 + max(1, round((num_layers - 1) / 3)) if num_layers > 1 else 1
    return [
        eta * (_FIRST_LAYER if layer == 0 else _EARLY_LAYERS if layer < early else _LATE_LAYERS)
        for layer in range(num_layers)
    ]


PRESETS = {
    "paper": Preset("paper", PAPER, lambda0=0.9),
    "paper-v2": Preset("paper-v2", PAPER_V2, lambda0=0.9),
    "recommended": Preset("recommended", RECOMMENDED, lambda0=0.3, step_size=SILENCED_STEP_SIZE),
    "boosted": Preset("boosted", RECOMMENDED, lambda0=0.5, rounds=6),
}


CONTROLS = {
    "control_eta0": replace(PAPER, direction=Direction.NONE),
    "control_random": replace(PAPER, direction=Direction.RANDOM),
    "control_negated": replace(PAPER, direction=Direction.ASCENT),
    "control_shuffled": replace(PAPER, shuffled=True),
}


def recipe_of(memory: str, settings: MemorySettings) -> Recipe:
    """The recipe of the memory's preset; that of its kind's preset when its own makes another kind."""
    if settings.preset not in PRESETS:
        raise BadInput(
            f"memory {memory!r} has preset {settings.preset!r}, expected {' or '.join(PRESETS)}"
        )
    recipe = PRESETS[settings.preset].recipe
    recipes = {_WIRE_KINDS[each.recipe.kind]: each.recipe for each in PRESETS.values()}
    return recipe if _WIRE_KINDS[recipe.kind] == settings.kind else recipes[settings.kind]


# Keeps a zero gradient from dividing by zero; far below any norm that a float32 pass gives.
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
) -> Values:
    """Values of the kept tokens ([n] row numbers), those with N numbers in f32."""
    change = step(trace.gradient.flatten(0, 1), recipe, median_norm, generator)
    order = kept
    if recipe.shuffled:
        order = kept[torch.randperm(len(kept), generator=generator).to(kept.device)]
    if recipe.kind is Kind.LOGIT_DELTA:
        return change[order]
    target = trace.router_logits.flatten(0, 1).float() + change
    if recipe.kind is Kind.LOGITS:
        return Logits(target[order])
    values = assignment_values(trace, target)
    return Assignment(values.weights[order], values.experts[order])

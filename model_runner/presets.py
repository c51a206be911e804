"""The two named ways to build and read a memory: `paper` (arXiv 2601.02144) and `recommended` (ours)."""

from __future__ import annotations

from dataclasses import dataclass

from knnmoe.v1.types_pb2 import (
    MEMORY_KIND_ASSIGNMENT,
    MEMORY_KIND_LOGIT_DELTA,
    MemorySettings,
)

from model_runner.memory_builder.recipes import PAPER, RECOMMENDED, Kind, Recipe

# eta of logit-delta memories by depth: a large step in the first layer harms, later ones bear more than 1.
RECOMMENDED_STEP_SIZE = 2.25
_FIRST_LAYER, _EARLY_LAYERS, _LATE_LAYERS = 0.5, 1.0, 1.3


_WIRE_KINDS = {
    Kind.ASSIGNMENT: MEMORY_KIND_ASSIGNMENT,
    Kind.LOGIT_DELTA: MEMORY_KIND_LOGIT_DELTA,
}


@dataclass(frozen=True, slots=True)
class Preset:
    """How values are made, how they are read, and the similarity at the median distance."""

    name: str
    recipe: Recipe
    lambda0: float

    def settings(self, num_layers: int) -> MemorySettings:
        """Settings of a new memory for a model of `num_layers` MoE layers; gamma is calibrated later."""
        settings = MemorySettings(preset=self.name, kind=_WIRE_KINDS[self.recipe.kind])
        if self.name == "recommended":
            settings.step_size.extend(step_sizes(num_layers))
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
    "recommended": Preset("recommended", RECOMMENDED, lambda0=0.3),
}

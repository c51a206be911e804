"""The two named presets."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import get_args

import pytest
from knnmoe.v1.types_pb2 import (
    MEMORY_KIND_ASSIGNMENT,
    MEMORY_KIND_LOGIT_DELTA,
    MEMORY_KIND_LOGITS,
)

from model_runner.cli import options
from model_runner.memory_builder.recipes import (
    PAPER,
    PAPER_V2,
    PRESETS,
    RECOMMENDED,
    Norm,
    step_sizes,
)


def test_step_sizes_of_the_measured_depth() -> None:
    assert step_sizes(4) == [2.25 * factor for factor in (0.5, 1, 1.3, 1.3)]


def test_step_sizes_of_one_layer() -> None:
    assert step_sizes(1) == [2.25 * 0.5]


def test_step_sizes_of_many_layers_never_fall() -> None:
    sizes = step_sizes(48)
    assert len(sizes) == 48
    assert sizes == sorted(sizes)
    assert [sizes.count(2.25 * factor) for factor in (0.5, 1, 1.3)] == [1, 16, 31]


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 16, 24, 94])
def test_every_layer_has_a_step_size(layers: int) -> None:
    sizes = step_sizes(layers, eta=1.0)
    assert len(sizes) == layers
    assert sizes[0] == 0.5
    assert set(sizes) <= {0.5, 1.0, 1.3}


def test_settings_of_a_new_memory() -> None:
    paper, recommended = PRESETS["paper"].settings(4), PRESETS["recommended"].settings(4)
    assert (paper.preset, paper.kind, list(paper.step_size)) == (
        "paper",
        MEMORY_KIND_ASSIGNMENT,
        [],
    )
    assert (recommended.preset, recommended.kind) == ("recommended", MEMORY_KIND_LOGIT_DELTA)
    assert list(recommended.step_size) == step_sizes(4)
    assert list(PRESETS["boosted"].settings(4).step_size) == step_sizes(4)
    assert [name for name, preset in PRESETS.items() if preset.rounds] == ["boosted"]


def test_a_memory_that_is_silenced_elsewhere_takes_larger_steps() -> None:
    alone, silenced = (PRESETS["recommended"].settings(4, null_entries=n) for n in (False, True))
    assert list(silenced.step_size) == step_sizes(4, 3.0)
    assert all(map(operator.lt, alone.step_size, silenced.step_size))
    assert not PRESETS["paper"].settings(4, null_entries=True).step_size


def test_the_second_reading_of_the_paper_differs_in_its_kind_alone() -> None:
    settings = PRESETS["paper-v2"].settings(4)
    assert (settings.preset, settings.kind) == ("paper-v2", MEMORY_KIND_LOGITS)
    assert replace(PAPER_V2, kind=PAPER.kind) == PAPER
    assert PRESETS["paper-v2"].lambda0 == PRESETS["paper"].lambda0


def test_one_name_for_preset_recipe_and_option() -> None:
    assert set(PRESETS) == set(get_args(options.Preset))
    recipes = {name: preset.recipe for name, preset in PRESETS.items()}
    assert recipes == {
        "paper": PAPER,
        "paper-v2": PAPER_V2,
        "recommended": RECOMMENDED,
        "boosted": RECOMMENDED,
    }
    assert all(name == preset.name for name, preset in PRESETS.items())
    assert set(get_args(options.Norm)) == set(Norm)

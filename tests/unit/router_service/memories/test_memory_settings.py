"""Settings: presets, ranges, changes, JSON."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest
from knnmoe.v1 import types_pb2

from router_service.backends.base import Metric
from router_service.blending import Support
from router_service.errors import InvalidField
from router_service.memories.settings import (
    PRESETS,
    Kind,
    MemorySettings,
    Similarity,
    changed,
    preset,
    settings_from_json,
    validate,
)

LAYERS = 3


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_named(name: str) -> None:
    assert preset(name).preset == name
    validate(preset(name), LAYERS)


def test_the_paper_preset_is_the_papers() -> None:
    paper = preset("paper")
    assert (paper.kind, paper.similarity, paper.neighbours) == (Kind.ASSIGNMENT, Similarity.RBF, 1)


def test_the_second_reading_of_the_paper_differs_in_its_kind_alone() -> None:
    assert preset("paper-v2") == replace(preset("paper"), preset="paper-v2", kind=Kind.LOGITS)


def test_unknown_preset() -> None:
    with pytest.raises(
        InvalidField, match=r"settings\.preset: got 'best', expected one of boosted, paper"
    ):
        preset("best")


def test_every_field_is_one_of_the_contract() -> None:
    wire = {field.name for field in types_pb2.MemorySettings.DESCRIPTOR.fields}
    assert {field.name for field in fields(MemorySettings)} == wire


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("neighbours", 0),
        ("neighbours", 1025),
        ("gamma", ()),
        ("gamma", (1.0, 1.0)),
        ("gamma", (0.0,)),
        ("gamma", (1.0, -1.0, 1.0)),
        ("gamma", (math.nan,)),
        ("gamma", (math.inf,)),
        ("step_size", (1.0,) * 4),
        ("step_size", (math.nan,)),
        ("step_size", (1e7,)),
        ("null_weight", -0.1),
        ("null_weight", math.inf),
        ("null_weight", math.nan),
        ("min_lambda", 1.0),
        ("min_lambda", -0.1),
        ("min_lambda", math.nan),
        ("layers", (0, 3)),
        ("hnsw_ef", 0),
        ("oversampling", 0.9),
        ("oversampling", math.nan),
    ],
)
def test_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(InvalidField, match=f"settings.{name}"):
        validate(replace(MemorySettings(), **{name: value}), LAYERS)


def test_one_number_is_for_every_layer_and_a_list_for_each() -> None:
    one = MemorySettings(gamma=(2.0,), step_size=(3.0,))
    each = MemorySettings(gamma=(1.0, 2.0, 3.0), step_size=(4.0, 5.0, 6.0))
    assert [one.gamma_of(layer) for layer in range(LAYERS)] == [2.0] * 3
    assert [each.gamma_of(layer) for layer in range(LAYERS)] == [1.0, 2.0, 3.0]
    assert [each.step_size_of(layer) for layer in range(LAYERS)] == [4.0, 5.0, 6.0]


def test_no_layer_listed_means_all() -> None:
    assert MemorySettings().speaks_for(2)
    assert [MemorySettings(layers=(0, 2)).speaks_for(layer) for layer in range(3)] == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [("kind", Kind.ASSIGNMENT), ("similarity", Similarity.COSINE), ("preset", "paper")],
)
def test_what_is_fixed_at_creation(name: str, value: Any) -> None:
    with pytest.raises(InvalidField, match="fixed at creation"):
        changed(MemorySettings(), {name: value})
    assert changed(MemorySettings(), {name: getattr(MemorySettings(), name)}) == MemorySettings()


def test_changes_make_a_copy() -> None:
    before = MemorySettings()
    after = changed(before, {"neighbours": 3, "support": Support.TOP_K})
    assert (after.neighbours, after.support, before.neighbours) == (3, Support.TOP_K, 32)


@pytest.mark.parametrize(
    "settings", [*PRESETS.values(), MemorySettings(gamma=(1.0, 2.0), layers=(1,))]
)
def test_json_round_trip(settings: MemorySettings) -> None:
    assert settings_from_json(json.loads(json.dumps(settings.fields()))) == settings


def test_settings_of_an_older_version_take_the_defaults() -> None:
    assert settings_from_json({"kind": "assignment"}) == MemorySettings(kind=Kind.ASSIGNMENT)


def test_settings_of_a_newer_version_are_refused() -> None:
    with pytest.raises(TypeError):
        settings_from_json({"temperature": 1.0})


def test_each_kernel_reads_its_own_distance() -> None:
    assert Similarity.RBF.metric is Metric.EUCLID
    assert Similarity.COSINE.metric is Metric.COSINE

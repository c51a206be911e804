"""What retention computes of a layer's reading must be what the layer does when it routes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_service.arrays import Assignment, Entries, Neighbours
from router_service.backends.base import Metric
from router_service.blending import scatter_dense
from router_service.memories.layer import LayerMemory, RouteQuery
from router_service.memories.settings import Similarity
from router_service.retention.scores import (
    LayerReading,
    cosine,
    expected_effect,
    kernel_average,
    overlap,
)
from tests.unit.router_service.retention import plain_pruning as plain
from tests.unit.router_service.retention.pruning_memories import (
    ASSIGNMENTS,
    DELTAS,
    EXPERTS,
    READINGS,
    TOP_K,
    filled,
    layers,
    random_entries,
    settings_of,
)

VARIANTS = [
    DELTAS,
    settings_of(DELTAS, null_weight=0.0, min_lambda=0.6, step_size=(-3.0,)),
    settings_of(DELTAS, similarity=Similarity.COSINE),
    ASSIGNMENTS,
    settings_of(ASSIGNMENTS, min_lambda=0.7),
]


@pytest.mark.parametrize("reading", VARIANTS)
def test_contribution_and_lambda_are_those_of_routing(reading: LayerReading) -> None:
    cosines = reading.settings.similarity is Similarity.COSINE
    entries = random_entries(40, reading)
    entries = replace(entries, keys=entries.keys + 1)  # no zero vector
    layer = LayerMemory(
        0, filled(entries, Metric.COSINE if cosines else Metric.EUCLID), EXPERTS, TOP_K
    )
    queries = random_entries(25, reading, seed=5).keys * np.float32(1.5) + 1
    nothing = np.zeros((25, EXPERTS), np.float32)
    own = Assignment(np.zeros((25, TOP_K), np.int32), np.zeros((25, TOP_K), np.float32))
    deltas = reading.settings.kind.value == "logit_delta"
    answer = layer.route(RouteQuery(queries, nothing if deltas else own), reading.settings)
    similarities = reading.similarities(answer.neighbours.distances)
    np.testing.assert_array_equal(reading.lambdas(similarities), answer.lambdas)
    blended = answer.blended
    routed = (
        scatter_dense(blended.experts, blended.weights, EXPERTS)
        if isinstance(blended, Assignment)
        else blended
    )
    found = reading.contribution(reading.dense(answer.neighbours.values), similarities)
    np.testing.assert_allclose(found, routed, rtol=1e-5, atol=1e-6)


@READINGS
@settings(max_examples=40)
@given(data=st.data())
def test_agreement_is_symmetric_bounded_and_1_for_equals(
    reading: LayerReading, data: st.DataObject
) -> None:
    entries: Entries = data.draw(layers(reading))
    dense = reading.dense(entries.values)
    found = reading.agreement(dense[:, None], dense[None])
    np.testing.assert_array_equal(found, found.T)
    assert (np.diagonal(found) == 1).all()
    assert (np.abs(found) <= 1).all()
    for row, other in np.ndindex(*found.shape):
        one, two = (plain.dense(entries.values[r], reading) for r in (row, other))
        assert found[row, other] == pytest.approx(plain.agreement(one, two, reading), abs=1e-12)


def test_agreement_with_nothing_is_0() -> None:
    one, nothing = np.array([1.0, 2.0]), np.zeros(2)
    assert cosine(one, nothing) == overlap(one, nothing) == 0
    assert cosine(nothing, nothing) == overlap(nothing, nothing) == 1


def test_agreement_of_assignments_ignores_their_total_weight() -> None:
    assert overlap(np.array([0.2, 0.1, 0.0]), np.array([4.0, 2.0, 0.0])) == pytest.approx(1)
    assert overlap(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 0


def test_the_average_of_far_neighbours_is_not_lost_in_underflow() -> None:
    similarities = np.array([[1e-42, 1e-42], [0.0, 0.0]], np.float32)
    values = np.array([[[2.0], [4.0]], [[2.0], [4.0]]], np.float32)
    assert kernel_average(values, similarities).tolist() == [[3.0], [0.0]]


def neighbours_of(distances: list[list[float]], values: list[list[list[float]]]) -> Neighbours:
    rows = np.array(values, np.float32)
    return Neighbours(np.zeros(rows.shape[:2], np.uint64), np.array(distances, np.float32), rows)


def test_the_expected_effect_of_losing_the_only_neighbour() -> None:
    own = np.array([[3.0, 4.0, 0.0, 0.0]], np.float32)
    before = neighbours_of([[0.0]], [[[3.0, 4.0, 0.0, 0.0]]])
    after = Neighbours.empty(1, 1, EXPERTS)
    effect = expected_effect(own, before, after, DELTAS)
    assert effect == pytest.approx(
        {
            "queries": 1,
            "lambda_before": 1 / 1.5,
            "lambda_after": 0,
            "lambda_change": -1 / 1.5,
            "abstained_before": 0,
            "abstained_after": 1,
            "agreement_before": 1,
            "agreement_after": 0,
            "contribution_before": 2 * 5 / 1.5,
            "contribution_change": 2 * 5 / 1.5,
        }
    )


def test_the_expected_effect_on_assignments_is_in_l1() -> None:
    own = np.array([[0, 1, 0.5, 0.5]], np.float32)
    before = neighbours_of([[0.0]], [[[0, 1, 0.5, 0.5]]])
    after = neighbours_of([[0.0]], [[[2, 3, 0.5, 0.5]]])
    effect = expected_effect(own, before, after, ASSIGNMENTS)
    assert effect["contribution_before"] == pytest.approx(1)
    assert effect["contribution_change"] == pytest.approx(2)
    assert effect["lambda_change"] == 0
    assert (effect["agreement_before"], effect["agreement_after"]) == (1, 0)


def test_no_queries_no_effect() -> None:
    nothing = Neighbours.empty(0, 1, EXPERTS)
    assert expected_effect(np.empty((0, EXPERTS), np.float32), nothing, nothing, DELTAS) == {}

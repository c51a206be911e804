"""How far answers are from exact ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router_service.arrays import NO_ID, Assignment, Neighbours
from router_service.jobs.measure import recall_at_1, search_errors
from router_service.memories.layer import RouteAnswer

IDS = np.array([[3], [4], [NO_ID]], np.uint64)
DISTANCES = np.array([[1.0], [2.0], [np.inf]], np.float32)
OWN = np.zeros((3, 2), np.float32)


def answer() -> RouteAnswer:
    found = Neighbours(IDS, DISTANCES, np.zeros((3, 1, 2), np.float32))
    lambdas = np.array([0.5, 0.25, 0.0], np.float32)
    return RouteAnswer(OWN + lambdas[:, None], lambdas, np.zeros(3, np.uint8), found, lambdas, 0, 0)


def test_an_exact_answer_has_no_error() -> None:
    errors = search_errors(answer(), answer(), OWN, 2)
    assert errors.recall_at_1 == 1.0
    assert errors.lambda_error_max == errors.blend_error_max == 0.0


def test_errors_are_means_and_largest_over_tokens() -> None:
    blended = np.array([[0.5, 0.9], [0.25, 0.25], [0.0, 0.2]], np.float32)
    other = replace(answer(), lambdas=np.array([0.2, 0.25, 0.0], np.float32), blended=blended)
    errors = search_errors(other, answer(), OWN, 2)
    assert errors.lambda_error_mean == pytest.approx(0.1)
    assert errors.lambda_error_max == pytest.approx(0.3)
    assert errors.blend_error_mean == pytest.approx(0.2)
    assert errors.blend_error_max == pytest.approx(0.4)


def test_where_every_token_abstained_the_blend_is_the_own_routing() -> None:
    experts = np.array([[0, 1]] * 3, np.int32)
    own = Assignment(experts, np.full((3, 2), 0.5, np.float32))
    silent = replace(answer(), blended=None)
    blended = replace(
        answer(), blended=Assignment(experts, np.float32([[1, 0], [0.5, 0.5], [0.5, 0.5]]))
    )
    assert search_errors(silent, silent, own, 4).blend_error_max == 0.0
    assert search_errors(blended, silent, own, 4).blend_error_max == 0.5


def test_an_entry_as_near_counts_as_the_nearest_and_a_farther_one_does_not() -> None:
    near = replace(answer().neighbours, ids=np.array([[9], [4], [NO_ID]], np.uint64))
    assert recall_at_1(replace(answer(), neighbours=near), answer()) == 1.0
    far = replace(near, distances=DISTANCES + np.float32(0.1))
    assert recall_at_1(replace(answer(), neighbours=far), answer()) == 0.5

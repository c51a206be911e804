"""How far the answers of one search are from those of another. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from router_service.arrays import F32, NO_ID, Assignment
from router_service.blending import scatter_dense
from router_service.layer_memory import RouteAnswer

# Nearest neighbours at the same distance may come in any order.
_SAME_DISTANCE = 1e-6


@dataclass(frozen=True, slots=True)
class SearchErrors:
    """Over the tokens of one layer; the blend's error of a token is the largest among its experts."""

    recall_at_1: float
    lambda_error_mean: float
    lambda_error_max: float
    blend_error_mean: float
    blend_error_max: float


def search_errors(
    found: RouteAnswer, exact: RouteAnswer, own: Assignment | F32, num_experts: int
) -> SearchErrors:
    """Of answers to the same T tokens with the routing `own`; T is 1 or more."""
    lambdas = np.abs(found.lambdas.astype(np.float64) - exact.lambdas)
    blends = np.abs(_blend(found, own, num_experts) - _blend(exact, own, num_experts)).max(axis=1)
    return SearchErrors(
        recall_at_1(found, exact),
        float(lambdas.mean()),
        float(lambdas.max()),
        float(blends.mean()),
        float(blends.max()),
    )


def recall_at_1(found: RouteAnswer, exact: RouteAnswer) -> float:
    """Share of tokens that have their nearest entry first, or one as near; tokens without a neighbour do not count."""
    true, distances = exact.neighbours, found.neighbours.distances[:, 0]
    some = true.ids[:, 0] != NO_ID
    if not some.any():
        return 1.0
    as_near = distances <= true.distances[:, 0] * (1 + _SAME_DISTANCE)
    same = found.neighbours.ids[:, 0] == true.ids[:, 0]
    return float((same | as_near)[some].mean())


def _blend(answer: RouteAnswer, own: Assignment | F32, num_experts: int) -> F32:
    """The blended routing [T, N]; the own one where every token abstained."""
    blended = own if answer.blended is None else answer.blended
    if isinstance(blended, Assignment):
        return scatter_dense(blended.experts, blended.weights, num_experts)
    return blended

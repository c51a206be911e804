"""Similarity between a router input and its neighbours, and the bandwidth that calibrates it. Pure functions."""

from __future__ import annotations

import math

import numpy as np

from router_service.arrays import F32


def rbf_similarity(squared_distances: F32, gamma: float) -> F32:
    """exp(-gamma d^2) of squared Euclidean distances [...]; an infinite distance gives 0. Method, eq. of s(x, k)."""
    # gamma d^2 beyond the largest float64 is a similarity of 0 all the same
    with np.errstate(over="ignore"):
        return np.exp(-gamma * squared_distances.astype(np.float64)).astype(np.float32)


def cosine_similarity(cosine_distances: F32) -> F32:
    """max(0, cosine) of cosine distances 1 - cos [...]; an infinite distance gives 0."""
    return np.clip(1.0 - cosine_distances, 0.0, 1.0).astype(np.float32)


def mean_lambda(similarities: F32) -> F32:
    """Lambda [T] of similarities [T, K]: their mean; an empty slot counts as similarity 0."""
    return similarities.mean(axis=1, dtype=np.float64).astype(np.float32)


def shrunk_lambda(similarities: F32, null_weight: float) -> F32:
    """Lambda [T] of similarities [T, K]: sum / (sum + s0), the weight left beside a null neighbour of weight s0."""
    total = similarities.sum(axis=1, dtype=np.float64)
    if null_weight > 0:
        return (total / (total + null_weight)).astype(np.float32)
    share = np.divide(total, total + null_weight, out=np.zeros_like(total), where=total > 0)
    return share.astype(np.float32)


def calibrated_gamma(squared_distance: float, lambda0: float) -> float:
    """The bandwidth at which a squared distance has similarity `lambda0` in (0, 1).

    Distances below 1e-12 (repeated inputs) are taken as 1e-12, so that gamma stays finite.
    """
    return -math.log(lambda0) / max(squared_distance, 1e-12)

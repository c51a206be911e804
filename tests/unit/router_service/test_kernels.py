"""Similarity, lambda and bandwidth, as arithmetic."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from router_service import kernels

F32 = NDArray[np.float32]
distances = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats(0, 2.0**100, width=32) | st.just(math.inf),
)
similarities = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats(0, 1, width=32),
)
gammas = st.floats(1e-300, 1e300)


@given(distances, gammas)
def test_rbf_similarity_is_in_the_unit_interval_and_falls_with_distance(
    squared: F32, gamma: float
) -> None:
    s = kernels.rbf_similarity(squared, gamma)
    assert s.dtype == np.float32
    assert ((s >= 0) & (s <= 1)).all()
    assert not s[np.isinf(squared)].any()
    farther = kernels.rbf_similarity(squared * np.float32(2), gamma)
    assert (farther <= s).all()


def test_rbf_similarity_is_the_gaussian_of_the_method() -> None:
    squared = np.array([[0.0, 1.0, 4.0, math.inf]], np.float32)
    expected = [[1.0, math.exp(-0.5), math.exp(-2.0), 0.0]]
    np.testing.assert_allclose(kernels.rbf_similarity(squared, 0.5), expected, rtol=1e-6)


def test_cosine_similarity_is_never_negative() -> None:
    far = np.array([[0.0, 0.25, 1.0, 2.0, math.inf]], np.float32)
    assert kernels.cosine_similarity(far).tolist() == [[1.0, 0.75, 0.0, 0.0, 0.0]]


@given(similarities, st.floats(0, 1e6))
def test_lambda_is_in_the_unit_interval(s: F32, null_weight: float) -> None:
    for lambdas in (kernels.mean_lambda(s), kernels.shrunk_lambda(s, null_weight)):
        assert lambdas.shape == (len(s),)
        assert ((lambdas >= 0) & (lambdas <= 1)).all()
        assert not lambdas[~s.any(axis=1)].any()


@given(similarities)
def test_the_order_of_neighbours_does_not_matter(s: F32) -> None:
    shuffled = s[:, np.random.default_rng(0).permutation(s.shape[1])]
    np.testing.assert_allclose(kernels.mean_lambda(shuffled), kernels.mean_lambda(s), rtol=1e-6)
    np.testing.assert_allclose(
        kernels.shrunk_lambda(shuffled, 0.5), kernels.shrunk_lambda(s, 0.5), rtol=1e-6
    )


@given(similarities)
def test_a_heavier_null_neighbour_shrinks_lambda(s: F32) -> None:
    weights = [0.0, 0.5, 1.0, 10.0]
    lambdas = [kernels.shrunk_lambda(s, weight) for weight in weights]
    for lighter, heavier in pairwise(lambdas):
        assert (heavier <= lighter).all()


@given(st.floats(1e-9, 1e9), st.floats(0.01, 0.99))
def test_the_calibrated_gamma_gives_lambda0_at_the_distance(squared: float, lambda0: float) -> None:
    gamma = kernels.calibrated_gamma(squared, lambda0)
    found = kernels.rbf_similarity(np.array([[squared]], np.float64).astype(np.float32), gamma)
    assert found[0, 0] == pytest.approx(lambda0, rel=1e-5)


def test_gamma_stays_finite_for_repeated_inputs() -> None:
    assert math.isfinite(kernels.calibrated_gamma(0.0, 0.5))

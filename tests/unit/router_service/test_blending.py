"""Properties that blending must have, whatever the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from router_service import kernels
from router_service.arrays import Assignment
from router_service.blending import (
    Support,
    blend_assignments,
    blend_logits,
    blend_stored_logits,
    scatter_dense,
    top_k_of,
)

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Blend:
    """T tokens, K neighbours, N experts, top-k, random but for the shape."""

    own: Assignment
    neighbours: Assignment  # [T, K, k]
    similarities: F32
    experts: int

    def lambdas(self) -> F32:
        return kernels.mean_lambda(self.similarities)

    def blended(self, support: Support = Support.UNION, lambdas: F32 | None = None) -> Assignment:
        used = self.lambdas() if lambdas is None else lambdas
        return blend_assignments(
            self.own, self.neighbours, self.similarities, used, self.experts, support
        )

    def dense(self, support: Support = Support.UNION) -> F32:
        blended = self.blended(support)
        return scatter_dense(blended.experts, blended.weights, self.experts)


@st.composite
def blends(draw: st.DrawFn) -> Blend:
    experts = draw(st.integers(2, 12))
    top_k = draw(st.integers(1, min(4, experts)))
    tokens, k = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    similarities = rng.random((tokens, k)).astype(np.float32)
    similarities[rng.random((tokens, k)) < 0.3] = 0

    def assignment(*shape: int) -> Assignment:
        chosen = rng.random((*shape, experts)).argsort(axis=-1)[..., :top_k].astype(np.int32)
        weights = rng.uniform(0.01, 1, (*shape, top_k)).astype(np.float32)
        return Assignment(chosen, weights / weights.sum(axis=-1, keepdims=True))

    return Blend(assignment(tokens), assignment(tokens, k), similarities, experts)


@given(blends())
def test_the_blend_is_a_convex_combination(blend: Blend) -> None:
    """Every assignment here sums to 1, so the blend does."""
    np.testing.assert_allclose(blend.dense().sum(axis=1), 1, atol=1e-5)
    assert (blend.dense() >= 0).all()


@given(blends())
def test_the_blend_is_the_formula(blend: Blend) -> None:
    lambdas, s = blend.lambdas()[:, None], blend.similarities.astype(np.float64)
    tokens, k = s.shape
    flat = Assignment(
        blend.neighbours.experts.reshape(tokens * k, -1),
        blend.neighbours.weights.reshape(tokens * k, -1),
    )
    values = scatter_dense(flat.experts, flat.weights, blend.experts).reshape(tokens, k, -1)
    total = s.sum(axis=1)[:, None, None]
    shares = np.divide(s[:, :, None], total, out=np.zeros((tokens, k, 1)), where=total > 0)
    own = scatter_dense(blend.own.experts, blend.own.weights, blend.experts)
    expected = (1 - lambdas) * own + lambdas * (shares * values).sum(axis=1)
    np.testing.assert_allclose(blend.dense(), expected, atol=1e-5)


@given(blends())
def test_lambda_0_is_the_models_own_assignment(blend: Blend) -> None:
    zero = np.zeros(len(blend.similarities), np.float32)
    own = scatter_dense(blend.own.experts, blend.own.weights, blend.experts)
    for support in Support:
        blended = blend.blended(support, lambdas=zero)
        dense = scatter_dense(blended.experts, blended.weights, blend.experts)
        assert np.array_equal(dense, own)
    assert blended.weights.tobytes() == blend.own.weights.tobytes()
    assert np.array_equal(blended.experts, blend.own.experts)


@given(blends(), st.integers(0, 2**32))
def test_the_order_of_neighbours_does_not_matter(blend: Blend, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(blend.similarities.shape[1])
    shuffled = Blend(
        blend.own,
        Assignment(blend.neighbours.experts[:, order], blend.neighbours.weights[:, order]),
        blend.similarities[:, order],
        blend.experts,
    )
    np.testing.assert_allclose(shuffled.dense(), blend.dense(), atol=1e-6)


@given(blends())
def test_top_k_support_keeps_the_total_weight_and_the_heaviest_experts(blend: Blend) -> None:
    union, top = blend.dense(), blend.blended(Support.TOP_K)
    assert top.experts.shape == blend.own.experts.shape
    np.testing.assert_allclose(top.weights.sum(axis=1), union.sum(axis=1), atol=1e-5)
    abstained = blend.lambdas() == 0
    kept = np.take_along_axis(union, top.experts, axis=1)
    left_out = union.copy()
    np.put_along_axis(left_out, top.experts, -1, axis=1)
    heaviest_left_out = left_out.max(axis=1)
    assert ((kept.min(axis=1) >= heaviest_left_out) | abstained).all()


@given(blends())
def test_the_sparse_union_is_the_dense_one(blend: Blend) -> None:
    """A model with more experts than names in the union gets them as they are, another one a dense row."""
    wide = Blend(blend.own, blend.neighbours, blend.similarities, experts=1000)
    sparse = wide.blended()
    k, names = blend.similarities.shape[1], blend.own.experts.shape[1]
    assert sparse.experts.shape[1] == (k + 1) * names
    assert blend.blended().experts.shape[1] == min(blend.experts, (k + 1) * names)
    dense = scatter_dense(sparse.experts, sparse.weights, 1000)
    np.testing.assert_allclose(dense[:, : blend.experts], blend.dense(), atol=1e-6)


@given(blends())
def test_inputs_are_not_changed(blend: Blend) -> None:
    arrays = [blend.own.experts, blend.own.weights, blend.neighbours.weights, blend.similarities]
    for array in arrays:
        array.flags.writeable = False
    before = [array.tobytes() for array in arrays]
    for support in Support:
        blend.blended(support)
    assert [array.tobytes() for array in arrays] == before


def test_an_expert_that_is_named_twice_counts_twice() -> None:
    dense = scatter_dense(np.array([[1, 1]], np.int32), np.array([[0.25, 0.5]], np.float32), 3)
    assert dense.tolist() == [[0, 0.75, 0]]


def test_ties_go_to_the_expert_with_the_smaller_number() -> None:
    top = top_k_of(np.array([[0.2, 0.4, 0.4, 0.0]], np.float32), 2)
    assert top.experts.tolist() == [[1, 2]]
    np.testing.assert_allclose(top.weights, [[0.5, 0.5]])


@st.composite
def logit_blends(draw: st.DrawFn) -> tuple[F32, F32, F32]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tokens, k, experts = (draw(st.integers(1, 5)) for _ in range(3))
    own = rng.standard_normal((tokens, experts)).astype(np.float32)
    deltas = rng.standard_normal((tokens, k, experts)).astype(np.float32)
    return own, deltas, rng.uniform(0.01, 1, (tokens, k)).astype(np.float32)


def _all(own: F32) -> NDArray[np.bool_]:
    return np.ones(len(own), dtype=np.bool_)


@given(logit_blends(), st.floats(0, 10), st.floats(-5, 5))
def test_logits_move_by_the_shrunk_average(
    blend: tuple[F32, F32, F32], null_weight: float, step_size: float
) -> None:
    own, deltas, s = blend
    got = blend_logits(own, deltas, s, null_weight, step_size, _all(own))
    average = np.einsum("tk,tkn->tn", s.astype(np.float64), deltas) / (
        s.sum(axis=1, dtype=np.float64)[:, None] + null_weight
    )
    np.testing.assert_allclose(got, own + step_size * average, atol=1e-4)


@given(logit_blends())
def test_a_heavier_null_neighbour_moves_the_logits_less(blend: tuple[F32, F32, F32]) -> None:
    own, deltas, s = blend
    shifts = [
        np.abs(blend_logits(own, deltas, s, weight, 1.0, _all(own)) - own)
        for weight in (0.0, 0.5, 2.0, 100.0)
    ]
    for lighter, heavier in pairwise(shifts):
        assert (heavier <= lighter + 1e-6).all()


@given(logit_blends(), st.integers(0, 2**32))
def test_stored_logits_take_the_place_of_the_own_by_lambda(
    blend: tuple[F32, F32, F32], seed: int
) -> None:
    own, stored, s = blend
    lambdas = kernels.mean_lambda(s)
    lambdas[np.random.default_rng(seed).random(len(own)) < 0.3] = 0  # they abstain
    own[0, 0] = -0.0
    got = blend_stored_logits(own, stored, s, lambdas)
    share = lambdas[:, None].astype(np.float64)
    average = np.einsum("tk,tkn->tn", s.astype(np.float64), stored) / s.sum(axis=1)[:, None]
    np.testing.assert_allclose(got, (1 - share) * own + share * average, atol=1e-5)
    abstained = lambdas == 0
    assert got[abstained].tobytes() == own[abstained].tobytes()


@given(logit_blends(), st.integers(0, 2**32))
def test_the_order_of_deltas_does_not_matter(blend: tuple[F32, F32, F32], seed: int) -> None:
    own, deltas, s = blend
    order = np.random.default_rng(seed).permutation(s.shape[1])
    one = blend_logits(own, deltas, s, 0.5, 1.0, _all(own))
    other = blend_logits(own, deltas[:, order], s[:, order], 0.5, 1.0, _all(own))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_token_that_abstains_keeps_its_logits_bit_for_bit() -> None:
    own = np.array([[-0.0, 1e-45], [3.0, 4.0]], np.float32)
    deltas, s = np.ones((2, 1, 2), np.float32), np.ones((2, 1), np.float32)
    got = blend_logits(own, deltas, s, 0.5, 1.0, np.array([False, True]))
    assert got[0].tobytes() == own[0].tobytes()
    np.testing.assert_allclose(got[1], own[1] + 2 / 3)


@pytest.mark.parametrize("similarity", [1e-45, 1e-40, 1e-30])
def test_without_a_null_neighbour_a_tiny_similarity_is_a_full_step(similarity: float) -> None:
    own, deltas = np.zeros((1, 2), np.float32), np.array([[[2.0, 0.0]]], np.float32)
    s = np.array([[similarity]], np.float32)
    got = blend_logits(own, deltas, s, 0.0, 1e6, _all(own))
    np.testing.assert_allclose(got, [[2e6, 0]])

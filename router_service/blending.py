"""Blending a model's own routing with what its neighbours suggest. Pure functions; inputs are never changed.

T tokens, K neighbours, N experts, k = top-k. A token with lambda 0 keeps its own routing exactly.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np

from router_service.arrays import F32, I32, Assignment, Bool


class Support(StrEnum):
    """Which experts a blended assignment names."""

    UNION = "union"
    TOP_K = "top_k"


def blend_assignments(
    own: Assignment,
    neighbours: Assignment,
    similarities: F32,
    lambdas: F32,
    num_experts: int,
    support: Support,
) -> Assignment:
    """A = (1 - lambda) a_own + lambda sum_j s_j v_j / sum_j s_j, in assignment space (arXiv 2601.02144).

    own: [T, k]; neighbours: experts and weights [T, K, k]; similarities [T, K]; lambdas [T].
    Width of the result: UNION min(N, k + K k'), TOP_K k.
    """
    tokens = len(lambdas)
    shares = lambdas[:, None] * _normalised(similarities)  # [T, K]
    memory_weights = (shares[:, :, None] * neighbours.weights).reshape(tokens, -1)
    own_weights = (np.float32(1) - lambdas)[:, None] * own.weights
    experts = np.concatenate([own.experts, neighbours.experts.reshape(tokens, -1)], axis=1)
    weights = np.concatenate([own_weights, memory_weights], axis=1)
    if support is Support.UNION and experts.shape[1] <= num_experts:
        return Assignment(experts, weights)
    dense = scatter_dense(experts, weights, num_experts)
    if support is Support.UNION:
        every = np.broadcast_to(np.arange(num_experts, dtype=np.int32), dense.shape)
        return Assignment(np.ascontiguousarray(every), dense)
    return _keep_own_where(lambdas == 0, own, top_k_of(dense, own.experts.shape[1]))


def blend_logits(
    own: F32, deltas: F32, similarities: F32, null_weight: float, step_size: float, retrieved: Bool
) -> F32:
    """R + eta sum_j s_j u_j / (sum_j s_j + s0): a kernel average of logit deltas, shrunk by a null neighbour.

    own [T, N]; deltas u [T, K, N]; similarities [T, K]; retrieved [T]: False keeps the own logits.
    """
    total = similarities.sum(axis=1, dtype=np.float64) + null_weight
    everywhere = bool(retrieved.all()) and bool(total.all())
    if everywhere:
        scale = step_size / total
    else:
        used = retrieved & (total > 0)
        scale = np.divide(step_size, total, out=np.zeros_like(total), where=used)
    # Scaled before they meet the deltas: without a null neighbour, 1 / total alone can be beyond f32.
    shares = (scale[:, None] * similarities).astype(np.float32)
    blended = own + np.einsum("tk,tkn->tn", shares, deltas)
    return blended if everywhere else np.where(retrieved[:, None], blended, own)


def blend_stored_logits(own: F32, stored: F32, similarities: F32, lambdas: F32) -> F32:
    """R' = (1 - lambda) r_own + lambda sum_j s_j v_j / sum_j s_j, in logit space (arXiv 2601.02144, version 2).

    own [T, N]; stored v [T, K, N]; similarities [T, K]; lambdas [T], their means, or 0: the own logits are kept.
    """
    shares = similarities / np.float32(similarities.shape[1])  # lambda s_j / sum_j s_j
    kept = (np.float32(1) - lambdas)[:, None] * own
    blended = kept + np.einsum("tk,tkn->tn", shares, stored)
    return np.where((lambdas > 0)[:, None], blended, own)


def scatter_dense(experts: I32, weights: F32, num_experts: int) -> F32:
    """The dense assignment [T, N] of a sparse one [T, k]; experts named twice add up."""
    tokens = len(experts)
    flat = (np.arange(tokens)[:, None] * num_experts + experts).ravel()
    dense = np.bincount(flat, weights=weights.ravel(), minlength=tokens * num_experts)
    return dense.reshape(tokens, num_experts).astype(np.float32)


def top_k_of(dense: F32, top_k: int) -> Assignment:
    """The k heaviest experts of each token, scaled to the token's total weight."""
    experts = np.argsort(-dense, axis=1, kind="stable")[:, :top_k].astype(np.int32)
    weights = np.take_along_axis(dense, experts, axis=1)
    kept = weights.sum(axis=1, keepdims=True)
    total = dense.sum(axis=1, keepdims=True)
    scale = np.divide(total, kept, out=np.ones_like(total), where=kept > 0)
    return Assignment(experts, weights * scale)


def _normalised(similarities: F32) -> F32:
    total = similarities.sum(axis=1, keepdims=True)
    return np.divide(similarities, total, out=np.zeros_like(similarities), where=total > 0)


def _keep_own_where(mask: Bool, own: Assignment, other: Assignment) -> Assignment:
    rows = mask[:, None]
    return Assignment(
        np.where(rows, own.experts, other.experts), np.where(rows, own.weights, other.weights)
    )

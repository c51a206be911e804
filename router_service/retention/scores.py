"""How a layer reads its entries, as far as retention needs it. Pure functions.

T tokens, K neighbours, N experts, W = width of a value row. Values are compared dense: N logit deltas, N logits less
their mean, which moves no softmax, or N weights.
"""

from __future__ import annotations

from collections.abc import Collection as Container
from dataclasses import dataclass

import numpy as np

from router_service import blending, kernels
from router_service.arrays import (
    F32,
    F64,
    Bool,
    Entries,
    ExampleRef,
    HitCounts,
    Neighbours,
    OwnAssignments,
)
from router_service.memories.settings import Kind, MemorySettings, Similarity


@dataclass(frozen=True, slots=True)
class LayerReading:
    """One layer's place in its memory and the settings by which it is read."""

    layer: int
    num_experts: int
    settings: MemorySettings

    def similarities(self, distances: F32) -> F32:
        """Kernel values of distances [...] as Collection.search reports them."""
        if self.settings.similarity is Similarity.RBF:
            return kernels.rbf_similarity(distances, self.settings.gamma_of(self.layer))
        return kernels.cosine_similarity(distances)

    def lambdas(self, similarities: F32) -> F32:
        """Lambda [T] of similarities [T, K]; 0 where routing would abstain. As if the layer were switched on."""
        lambdas = self.settings.lambdas(similarities)
        return np.where(lambdas > self.settings.min_lambda, lambdas, np.float32(0))

    def dense(self, values: F32) -> F32:
        """Value rows [..., W] as [..., N] logit deltas, logits less their mean, or expert weights."""
        if self.settings.kind is Kind.LOGIT_DELTA:
            return values
        if self.settings.kind is Kind.LOGITS:
            return values - values.mean(axis=-1, keepdims=True)
        flat = values.reshape(-1, values.shape[-1])
        top_k = flat.shape[1] // 2
        experts = flat[:, :top_k].astype(np.int32)
        rows = blending.scatter_dense(experts, flat[:, top_k:], self.num_experts)
        return rows.reshape(*values.shape[:-1], self.num_experts)

    def agreement(self, one: F32 | F64, other: F32 | F64) -> F64:
        """How far dense values [..., N] say the same: cosine of logits, overlap in [0, 1] of assignments."""
        return (cosine if self.settings.kind.blends_logits else overlap)(one, other)

    def contribution(self, values: F32, similarities: F32) -> F64:
        """What neighbours' dense values [T, K, N] add to a token's own routing [T, N].

        eta sum_j s_j u_j / (sum_j s_j + s0) for logit deltas, else lambda times the neighbours' average; 0 for
        abstaining tokens.
        """
        deltas = self.settings.kind is Kind.LOGIT_DELTA
        scale = self.settings.step_size_of(self.layer) if deltas else 1.0
        lambdas = self.lambdas(similarities).astype(np.float64)
        return scale * lambdas[:, None] * kernel_average(values, similarities)


def kernel_average(values: F32, similarities: F32) -> F64:
    """sum_j s_j v_j / sum_j s_j [T, N] of dense values [T, K, N], similarities [T, K]; 0 where all s_j are 0."""
    wide = similarities.astype(np.float64)
    total = wide.sum(axis=1, keepdims=True)
    shares = np.divide(wide, total, out=np.zeros_like(wide), where=total > 0)
    average: F64 = np.einsum("tk,tkn->tn", shares, values)
    return average


def cosine(one: F32 | F64, other: F32 | F64) -> F64:
    """Cosine [...] of vectors [..., N]; exactly 1 for equal ones, 0 when one of them is zero."""
    left, right = one.astype(np.float64), other.astype(np.float64)
    dots = (left * right).sum(axis=-1)
    norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    cosines = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
    return np.where((left == right).all(axis=-1), 1.0, np.clip(cosines, -1.0, 1.0))


def overlap(one: F32 | F64, other: F32 | F64) -> F64:
    """Sum of the smaller weights [...] of assignments [..., N] scaled to total 1, that is 1 - L1 / 2; in [0, 1]."""
    shared = np.minimum(_to_total_one(one), _to_total_one(other)).sum(axis=-1)
    return np.where((one == other).all(axis=-1), 1.0, np.clip(shared, 0.0, 1.0))


def _to_total_one(weights: F32 | F64) -> F64:
    wide = weights.astype(np.float64)
    total = wide.sum(axis=-1, keepdims=True)
    return np.divide(wide, total, out=np.zeros_like(wide), where=total > 0)


def expected_effect(
    values: F32, before: Neighbours, after: Neighbours, reading: LayerReading
) -> dict[str, float]:
    """Means over T leave-one-example-out queries: entries with value rows [T, W] and their neighbours [T, K].

    lambda_*; abstained_*: the share with lambda 0; agreement_*: of the contribution with the entry's own value, 0 where
    nothing is retrieved; contribution_before and contribution_change: sizes, the Euclidean norm in logits, or L1 of the
    weights for assignments.
    """
    if not len(values):
        return {}
    own = reading.dense(values)
    lambdas, contributions = zip(*(_read(part, reading) for part in (before, after)), strict=True)
    effect = {"queries": float(len(values))}
    for name, weights, added in zip(("before", "after"), lambdas, contributions, strict=True):
        effect[f"lambda_{name}"] = float(weights.mean())
        effect[f"abstained_{name}"] = float((weights == 0).mean())
        effect[f"agreement_{name}"] = float(reading.agreement(own, added).mean())
    effect["lambda_change"] = effect["lambda_after"] - effect["lambda_before"]
    effect["contribution_before"] = _mean_size(contributions[0], reading)
    effect["contribution_change"] = _mean_size(contributions[1] - contributions[0], reading)
    return effect


def _read(neighbours: Neighbours, reading: LayerReading) -> tuple[F64, F64]:
    """Lambdas [T] and contributions [T, N]."""
    similarities = reading.similarities(neighbours.distances)
    lambdas = reading.lambdas(similarities).astype(np.float64)
    return lambdas, reading.contribution(reading.dense(neighbours.values), similarities)


def _mean_size(rows: F64, reading: LayerReading) -> float:
    order = 2 if reading.settings.kind.blends_logits else 1
    return float(np.linalg.norm(rows, ord=order, axis=1).mean())


def created_unix_ms(page: Entries) -> F64:
    """Creation times [n] in milliseconds since the epoch; 0 for an entry that was never stamped."""
    times = (origin.created_unix_ms for origin in page.provenance)
    return np.fromiter(times, np.float64, len(page))


def gains(page: Entries) -> F64:
    """Gains [n] in nats, as the builder measured them."""
    return np.fromiter((origin.gain for origin in page.provenance), np.float64, len(page))


def outside(page: Entries, examples: Container[ExampleRef], sources: Container[str]) -> F64:
    """0 for entries of these examples or sources, 1 for the others [n]."""
    inside = (
        origin.source in sources or ExampleRef(origin.source, origin.example) in examples
        for origin in page.provenance
    )
    return 1.0 - np.fromiter(inside, np.float64, len(page))


def use(page: Entries, hits: HitCounts, spare_created_from_unix_ms: int | None) -> F64:
    """Hits [n]; inf for entries created at or after the given time, which had no chance yet."""
    counts = hits.of_entries(page.ids)
    if spare_created_from_unix_ms is None:
        return counts
    return np.where(created_unix_ms(page) >= spare_created_from_unix_ms, np.inf, counts)


def strength(page: Entries, reading: LayerReading, own: OwnAssignments | None) -> F64:
    """How far an entry can move routing [n].

    Logit deltas: the Euclidean norm, in logits. Logits: their distance to equal ones. Assignments: L1 / 2 in [0, 1] to
    the router's own assignment where `own` has it, else to the uniform one.
    """
    dense = reading.dense(page.values)
    if reading.settings.kind.blends_logits:
        return np.linalg.norm(dense.astype(np.float64), axis=1)
    reference = np.ones_like(dense)
    if own is not None:
        rows, known = own.of_entries(page.ids)
        reference[known] = reading.dense(rows[known])
    return 1.0 - overlap(dense, reference)


def lowest(scores: F64, among: Bool, drop: int) -> Bool:
    """The `drop` lowest scores [n] of the rows `among` [n]; of equal scores the later row goes."""
    rows = np.flatnonzero(among)
    worst_first = rows[np.lexsort((-rows, scores[rows]))]
    chosen = np.zeros(len(scores), np.bool_)
    chosen[worst_first[: max(0, drop)]] = True
    return chosen

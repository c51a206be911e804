"""What the sidecar should answer: brute force in NumPy and float64, independent of the service's own code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.clustered import F32, Workload

F64 = NDArray[np.float64]
Rows = NDArray[np.intp]

_QUERIES_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class ExactAnswer:
    """The K nearest keys of q queries and what they make of the logits."""

    rows: Rows  # [q, K] rows of the workload's keys, nearest first
    lambdas: F64  # [q]
    logits: F64  # [q, N]


@dataclass(frozen=True, slots=True)
class Reading:
    """The settings of a logit-delta memory that its answers depend on."""

    gamma: float
    step_size: float
    null_weight: float


def exact_answer(workload: Workload, k: int, reading: Reading) -> ExactAnswer:
    """R + eta sum_j s_j u_j / (sum_j s_j + s0), s = exp(-gamma d^2), over the K nearest keys."""
    rows, squared = nearest(workload.keys, workload.queries.astype(np.float64), k)
    similarities = np.exp(-reading.gamma * squared)
    total = similarities.sum(axis=1) + reading.null_weight
    deltas = workload.deltas[rows].astype(np.float64)
    average = np.einsum("tk,tkn->tn", similarities, deltas) / total[:, None]
    logits = workload.logits.astype(np.float64) + reading.step_size * average
    return ExactAnswer(rows, similarities.sum(axis=1) / total, logits)


def nearest(keys: F32, queries: F64, k: int) -> tuple[Rows, F64]:
    """Rows and squared distances [q, K] of the K nearest keys, nearest first."""
    wide = keys.astype(np.float64)
    norms = np.einsum("nd,nd->n", wide, wide)
    found = [
        _nearest_of(wide, norms, queries[start : start + _QUERIES_AT_ONCE], k)
        for start in range(0, len(queries), _QUERIES_AT_ONCE)
    ]
    return np.concatenate([rows for rows, _ in found]), np.concatenate([d for _, d in found])


def _nearest_of(keys: F64, norms: F64, queries: F64, k: int) -> tuple[Rows, F64]:
    ranking = norms - 2 * (queries @ keys.T)  # squared distance less the query's own norm
    rows = np.argpartition(ranking, k - 1, axis=1)[:, :k]
    squared = np.stack(
        [((keys[near] - query) ** 2).sum(axis=1) for near, query in zip(rows, queries, strict=True)]
    )
    order = np.argsort(squared, axis=1)
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(squared, order, axis=1)

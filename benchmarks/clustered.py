"""Router inputs as a trained model produces them, made up: clusters in a low-rank subspace, queries near stored keys.

A key is its cluster's centre plus a draw around it, both in a subspace of rank r whose i-th direction has standard
deviation i^-1/2, plus isotropic noise that carries 1 % of the energy. Cluster sizes fall off like Zipf's law, as tokens
do. Some dimensions are larger than others (log-normal scales), which is what makes int8 keys hard. A query is a stored
key plus half a draw around a centre plus noise: the same token in another context. Rows have a mean square of about 1,
as after RMS norm. Queries are rounded to f16, so that every engine and every wire format gets the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F16 = NDArray[np.float16]
F32 = NDArray[np.float32]
U64 = NDArray[np.uint64]

CLUSTERS = 500
RANK = 64
SPREAD_OF_CLUSTER = 0.5
SPREAD_OF_QUERY = 0.5
NOISE_ENERGY = 0.01
OUTLIER_SCALE = 0.5


@dataclass(frozen=True, slots=True)
class Workload:
    """n entries of one layer, and q queries with the router logits that a model would send along."""

    ids: U64  # [n], below 2^63, in no order, as hashes are
    keys: F32  # [n, d]
    deltas: F32  # [n, N] logit deltas, the stored values
    queries: F16  # [q, d]
    logits: F16  # [q, N] the model's own router logits
    held_out: F32  # [h, d] further queries, for calibration


def make_workload(
    keys: int, dimension: int, queries: int, held_out: int, num_experts: int, seed: int
) -> Workload:
    """A workload that depends on its arguments alone."""
    rng = np.random.default_rng(seed)
    space = _Space(rng, dimension, min(CLUSTERS, keys))
    stored = space.keys(keys)
    asked = space.queries(stored, queries + held_out)
    return Workload(
        ids=_ids(rng, keys),
        keys=stored,
        deltas=rng.standard_normal((keys, num_experts), np.float32),
        queries=asked[:queries].astype(np.float16),
        logits=rng.standard_normal((queries, num_experts), np.float32).astype(np.float16),
        held_out=asked[queries:],
    )


class _Space:
    """Clusters in a subspace of `dimension` dimensions."""

    def __init__(self, rng: np.random.Generator, dimension: int, clusters: int) -> None:
        rank = min(RANK, max(1, dimension // 2))
        self._rng = rng
        basis = np.linalg.qr(rng.standard_normal((dimension, rank)))[0].T
        outliers = np.exp(OUTLIER_SCALE * rng.standard_normal(dimension))
        self._basis = (basis * outliers).astype(np.float32)  # [r, d]
        self._deviations = np.arange(1, rank + 1, dtype=np.float32) ** -0.5  # [r]
        self._centres = self._draws(clusters)
        self._shares = 1 / np.arange(1, clusters + 1)
        self._scale = self._row_scale()

    def keys(self, number: int) -> F32:
        """Keys [n, d]."""
        chosen = self._rng.choice(
            len(self._centres), size=number, p=self._shares / self._shares.sum()
        )
        place: F32 = self._centres[chosen] + np.float32(SPREAD_OF_CLUSTER) * self._draws(number)
        return self._scale * self._with_noise(place @ self._basis)

    def queries(self, keys: F32, number: int) -> F32:
        """Queries [q, d] near keys, exact in f16."""
        parents = keys[self._rng.integers(len(keys), size=number)]
        step: F32 = np.float32(SPREAD_OF_QUERY * SPREAD_OF_CLUSTER) * self._draws(number)
        rows = parents + self._scale * self._with_noise(step @ self._basis)
        return rows.astype(np.float16).astype(np.float32)

    def _draws(self, number: int) -> F32:
        shape = (number, len(self._deviations))
        return self._deviations * self._rng.standard_normal(shape, np.float32)

    def _row_scale(self) -> np.float32:
        """Gives rows of centres a mean square of 1."""
        return np.float32(np.mean((self._centres @ self._basis) ** 2) ** -0.5)

    def _with_noise(self, rows: F32) -> F32:
        deviation = np.float32(NOISE_ENERGY**0.5) / self._scale
        return rows + deviation * self._rng.standard_normal(rows.shape, np.float32)


def _ids(rng: np.random.Generator, number: int) -> U64:
    ids = np.unique(rng.integers(2**63, size=number + 16, dtype=np.uint64))[:number]
    return rng.permutation(ids)

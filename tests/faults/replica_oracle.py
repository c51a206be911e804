"""What replicas are compared with: what was acknowledged of a memory, and NumPy in float64 on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from knnmoe.client import ExampleRef
from knnmoe.v1 import types_pb2 as types_pb
from numpy.typing import NDArray

from tests.integration.knn_moe_reference import dense
from tests.sidecar import ASSIGNMENT, COSINE, DENSE_VALUES, LOGIT_DELTA, TOP_K, Assignments

LAYERS = 2
TOLERANCE = 1e-5
# Where the K-th and the next neighbour, or a lambda and its bound, are so close, either answer is right.
CLOSE = 1e-4
F64 = NDArray[np.float64]


class Violation(AssertionError):
    """A replica is not what was acknowledged."""


class Entry(NamedTuple):
    """As it was sent, the key of length 1 under cosine; W = N logits or deltas, or k experts and then k weights."""

    key: NDArray[np.float32]
    value: NDArray[np.float32]
    example: ExampleRef


Layer = dict[int, Entry]


@dataclass
class Truth:
    """What was acknowledged of one memory."""

    kind: int
    similarity: int
    settings: dict[str, Any]
    layers: list[Layer] = field(default_factory=lambda: [{} for _ in range(LAYERS)])

    def copy(self) -> Truth:
        """Of this moment."""
        return Truth(
            self.kind, self.similarity, dict(self.settings), [dict(layer) for layer in self.layers]
        )


@dataclass
class Expected:
    """Of T tokens, in float64: lambdas [T], blended [T, N], and which tokens have one right answer [T]."""

    lambdas: F64
    blended: F64
    clear: NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        truth: Truth,
        layer: int,
        inputs: NDArray[np.float32],
        own: Any,
        exclude: list[ExampleRef],
    ) -> Expected:
        """From the formulas of the method."""
        tokens, plain = len(inputs), dense_of(own)
        entries = list(truth.layers[layer].values())
        if not speaks(truth, layer) or not entries:
            return cls(np.zeros(tokens), plain, np.ones(tokens, bool))
        how = truth.settings
        k, cosine = how["neighbours"], truth.similarity == COSINE
        distances = squared_distances(
            unit(inputs) if cosine else inputs, np.stack([each.key for each in entries])
        )
        for number, ref in enumerate(exclude):
            part = slice(number * tokens // len(exclude), (number + 1) * tokens // len(exclude))
            distances[part, [each.example == ref for each in entries]] = np.inf
        order = distances.argsort(axis=1)
        near = np.take_along_axis(distances, order, axis=1)
        near = np.pad(near, ((0, 0), (0, max(0, k + 1 - near.shape[1]))), constant_values=np.inf)
        with np.errstate(invalid="ignore"):  # two that are left out are no tie
            clear = ~(near[:, k] - near[:, k - 1] < CLOSE)
        kernel = np.clip(1 - near / 2, 0, 1) if cosine else np.exp(-how["gamma"][0] * near)
        s, rows = kernel[:, : min(k, len(entries))], order[:, :k]
        values = dense_values(truth.kind, entries)[rows]
        total = s.sum(axis=1)
        if truth.kind == LOGIT_DELTA:
            beside = total + how["null_weight"]
            lambdas = total / beside
            deltas = np.einsum("tk,tkn->tn", s, values) / beside[:, None]
            blended = plain + how["step_size"][0] * deltas
        else:
            lambdas = total / k
            memory = np.einsum("tk,tkn->tn", s, values) / np.maximum(total, 1e-300)[:, None]
            blended = (1 - lambdas)[:, None] * plain + lambdas[:, None] * memory
            if truth.kind == ASSIGNMENT and how["support"] == types_pb.SUPPORT_TOP_K:
                blended, apart = _heaviest(blended)
                clear &= apart
        silent = ~(lambdas > how["min_lambda"])
        if how["min_lambda"]:
            clear &= np.abs(lambdas - how["min_lambda"]) > CLOSE
        lambdas = np.where(silent, 0.0, lambdas)
        return cls(lambdas, np.where(silent[:, None], plain, blended), clear)

    def compare(self, lambdas: F64, blended: F64, where: str) -> None:
        """Raises Violation."""
        for what, found, wanted in (
            ("lambda", lambdas, self.lambdas),
            ("blended", blended, self.blended),
        ):
            off = np.abs(found - wanted)[self.clear].max(initial=0.0)
            if not off <= TOLERANCE * max(1.0, np.abs(wanted).max(initial=0.0)):
                raise Violation(f"{where}: {what} is off by {off:.2e}")


def speaks(truth: Truth, layer: int) -> bool:
    return layer in truth.settings["layers"]


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (rows / lengths).astype(np.float32)


def squared_distances(queries: NDArray[np.float32], keys: NDArray[np.float32]) -> F64:
    """[T, n], exact enough in float64 by the scalar product."""
    x, y = queries.astype(np.float64), keys.astype(np.float64)
    return np.maximum((x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1), 0.0)


def dense_of(own: Any) -> F64:
    if isinstance(own, Assignments):
        return dense(own.experts, own.weights)
    return np.asarray(own, np.float64)


def dense_values(kind: int, entries: list[Entry]) -> F64:
    values = np.stack([each.value for each in entries]).astype(np.float64)
    if kind in DENSE_VALUES:
        return values
    return dense(values[:, :TOP_K].astype(np.int64), values[:, TOP_K:])


def _heaviest(blended: F64) -> tuple[F64, NDArray[np.bool_]]:
    """The k heaviest, scaled to the total; and where they are clearly those."""
    order = blended.argsort(axis=1)[:, ::-1]
    ranked = np.take_along_axis(blended, order, axis=1)
    kept = np.zeros(blended.shape, bool)
    np.put_along_axis(kept, order[:, :TOP_K], values=True, axis=1)
    chosen = np.where(kept, blended, 0.0)
    scale = blended.sum(axis=1) / chosen.sum(axis=1)
    return chosen * scale[:, None], ranked[:, TOP_K - 1] - ranked[:, TOP_K] > CLOSE

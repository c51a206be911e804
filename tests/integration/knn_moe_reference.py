"""What Route must answer, in NumPy float64 over the exported entries; written from the method, not from the service.

Tolerances: 1e-5 in f32; in f16 and bf16 the rounding of the reply's own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from knnmoe import tensors
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import routing_pb2 as routing_pb
from numpy.typing import NDArray

from tests.sidecar import DENSE_VALUES, EXPERTS, TOP_K, Assignments

TOLERANCE = {"f32": 1e-5, "f16": 2e-3, "bf16": 1.6e-2}

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """How the memory is read."""

    cosine: bool = False
    k: int = 1
    gamma: float = 0.05
    null_weight: float = 0.5
    step_size: float = 1.5
    top_k_support: bool = False


@dataclass(frozen=True)
class Stored:
    """A layer's entries: ids [n], keys [n, d], dense values [n, N], examples [n]."""

    ids: NDArray[np.uint64]
    keys: F64
    values: F64
    examples: list[tuple[str, str]]


def stored_entries(parts: list[admin_pb.Entries]) -> Stored:
    """The exported entries, assignments as dense rows."""
    return Stored(
        np.concatenate([tensors.to_array(part.ids) for part in parts]),
        np.concatenate([tensors.to_array(part.keys) for part in parts]).astype(np.float64),
        np.concatenate([_dense_values(part) for part in parts]),
        [(p.source, p.example) for part in parts for p in part.provenance],
    )


def nearest(stored: Stored, inputs: NDArray[Any], how: Reading, allowed: Any = None) -> Any:
    """Rows [T, K] and distances [T, K] of the K nearest; `allowed` [T, n] masks entries."""
    x = inputs.astype(np.float64)
    if how.cosine:
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        keys = stored.keys / np.linalg.norm(stored.keys, axis=1, keepdims=True)
        distances = 1 - unit @ keys.T
    else:
        # Row by row: all pairs at once would take gigabytes.
        distances = np.stack([((row - stored.keys) ** 2).sum(axis=1) for row in x])
    if allowed is not None:
        distances = np.where(allowed, distances, np.inf)
    rows = distances.argsort(axis=1, kind="stable")[:, : how.k]
    return rows, np.take_along_axis(distances, rows, axis=1)


def similarities_of(distances: F64, how: Reading) -> F64:
    """s(x, k) [T, K]."""
    if how.cosine:
        return np.clip(1 - distances, 0, 1)
    return np.exp(-how.gamma * distances)


def expected_assignments(
    stored: Stored, inputs: NDArray[Any], own: Assignments, how: Reading, allowed: Any = None
) -> tuple[F64, F64]:
    """Lambda [T] and the dense blended assignment [T, N]."""
    rows, distances = nearest(stored, inputs, how, allowed)
    s = similarities_of(distances, how)
    lambdas = s.mean(axis=1)
    shares = s / s.sum(axis=1, keepdims=True)
    memory = np.einsum("tk,tkn->tn", shares, stored.values[rows])
    blended = (1 - lambdas)[:, None] * dense(own.experts, own.weights) + lambdas[:, None] * memory
    if how.top_k_support:
        kept = blended.argsort(axis=1)[:, ::-1][:, :TOP_K]
        mask = np.zeros(blended.shape, dtype=bool)
        np.put_along_axis(mask, kept, True, axis=1)
        total = blended.sum(axis=1, keepdims=True)
        blended = np.where(mask, blended, 0)
        blended *= total / blended.sum(axis=1, keepdims=True)
    return lambdas, blended


def expected_deltas(
    stored: Stored, inputs: NDArray[Any], own: NDArray[Any], how: Reading, allowed: Any = None
) -> tuple[F64, F64]:
    """Lambda [T] and the blended logits [T, N]."""
    rows, distances = nearest(stored, inputs, how, allowed)
    s = similarities_of(distances, how)
    total = s.sum(axis=1) + how.null_weight
    deltas = np.einsum("tk,tkn->tn", s, stored.values[rows]) / total[:, None]
    return s.sum(axis=1) / total, own.astype(np.float64) + how.step_size * deltas


def expected_logits(
    stored: Stored, inputs: NDArray[Any], own: NDArray[Any], how: Reading, allowed: Any = None
) -> tuple[F64, F64]:
    """Lambda [T] and the logits [T, N] that are blended with stored ones."""
    rows, distances = nearest(stored, inputs, how, allowed)
    s = similarities_of(distances, how)
    lambdas = s.mean(axis=1)
    memory = np.einsum("tk,tkn->tn", s / s.sum(axis=1, keepdims=True), stored.values[rows])
    own_share = (1 - lambdas)[:, None] * own.astype(np.float64)
    return lambdas, own_share + lambdas[:, None] * memory


def dense(experts: NDArray[Any], weights: NDArray[Any]) -> F64:
    """A sparse assignment [T, k] as [T, N]; experts named twice add up."""
    out = np.zeros((len(experts), EXPERTS))
    np.add.at(out, (np.arange(len(experts))[:, None], experts), weights.astype(np.float64))
    return out


def blended_of(reply: routing_pb.RouteResponse) -> F64:
    """The reply's logits, or its assignment as a dense one."""
    if reply.WhichOneof("blended") == "router_logits":
        return tensors.to_array(reply.router_logits).astype(np.float64)
    experts = tensors.to_array(reply.assignment.experts)
    return dense(experts, tensors.to_array(reply.assignment.weights))


def _dense_values(part: admin_pb.Entries) -> F64:
    field = part.WhichOneof("values")
    if field in DENSE_VALUES.values():
        return tensors.to_array(getattr(part, field)).astype(np.float64)
    experts = tensors.to_array(part.assignments.experts)
    return dense(experts, tensors.to_array(part.assignments.weights))

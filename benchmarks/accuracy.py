"""How close the sidecar's answers are to brute force in float64, through the same RPC that is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from knnmoe import tensors
from numpy.typing import NDArray

from benchmarks.clustered import F32, U64, Workload
from benchmarks.exact import ExactAnswer, exact_answer
from benchmarks.sidecars import SidecarClient

TOKENS_PER_REQUEST = 256
LAMBDA_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class SidecarAnswer:
    """What a sidecar answered to q queries."""

    ids: U64  # [q, K]
    lambdas: F32  # [q]
    logits: NDArray[np.floating[Any]]  # [q, N]


def accuracy(client: SidecarClient, workload: Workload, k: int) -> dict[str, float]:
    """Recall@K, and absolute errors of lambda and of the blended logits (f16 and f32 on the wire).

    `..._where_found` leaves out the tokens whose neighbours are not the exact ones: what is left is arithmetic.
    """
    exact = exact_answer(workload, k, client.reading())
    half, full = (ask(client, workload, k, dtype) for dtype in (np.float16, np.float32))
    found = _found(half.ids, workload.ids[exact.rows])
    complete = np.all(found, axis=1)
    errors = np.abs(half.lambdas - exact.lambdas)
    return {
        "recall": float(found.mean()),
        "lambda_error_max": float(errors.max()),
        "lambda_error_mean": float(errors.mean()),
        "lambda_beyond_tolerance": float(np.mean(errors > LAMBDA_TOLERANCE)),
        "lambda_error_max_where_found": float(errors[complete].max(initial=0.0)),
        "lambda_median": float(np.median(exact.lambdas)),
        **_logit_errors("f16", half, exact, complete),
        **_logit_errors("f32", full, exact, complete),
    }


def ask(
    client: SidecarClient, workload: Workload, k: int, dtype: type[np.floating[Any]]
) -> SidecarAnswer:
    """Every query of the workload, with neighbours. Tokens that all abstain come back with their own logits."""
    inputs, logits = workload.queries.astype(dtype), workload.logits.astype(dtype)
    ids, lambdas, blended = [], [], []
    for start in range(0, len(inputs), TOKENS_PER_REQUEST):
        tokens = np.s_[start : start + TOKENS_PER_REQUEST]
        request = client.request(inputs[tokens], logits[tokens], k, with_neighbours=True)
        response = client.streamed(request)
        ids.append(tensors.to_array(response.neighbours.ids))
        lambdas.append(tensors.to_array(response.lambdas))
        answered = response.HasField("router_logits")
        blended.append(tensors.to_array(response.router_logits) if answered else logits[tokens])
    return SidecarAnswer(np.concatenate(ids), np.concatenate(lambdas), np.concatenate(blended))


def recall(ids: U64 | NDArray[np.int64], wanted: U64 | NDArray[np.int64]) -> float:
    """Share of the wanted ids [q, K] that were found."""
    return float(_found(ids, wanted).mean())


def _found(ids: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.bool_]:
    hit: NDArray[np.bool_] = np.any(wanted[:, :, None] == ids[:, None, :], axis=2)
    return hit


def _logit_errors(
    name: str, answer: SidecarAnswer, exact: ExactAnswer, complete: NDArray[np.bool_]
) -> dict[str, float]:
    errors = np.abs(answer.logits.astype(np.float64) - exact.logits)
    return {
        f"logits_error_max_{name}": float(errors.max()),
        f"logits_error_mean_{name}": float(errors.mean()),
        f"logits_error_max_where_found_{name}": float(errors[complete].max(initial=0.0)),
    }

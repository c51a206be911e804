"""What pruning changes for inputs like those that the memory was built from. Pure functions."""

from __future__ import annotations

import numpy as np

from router_service.arrays import F32, Neighbours
from router_service.memory_settings import Kind
from router_service.retention.reading import LayerReading
from router_service.retention.tables import F64


def expected_effect(
    values: F32, before: Neighbours, after: Neighbours, reading: LayerReading
) -> dict[str, float]:
    """Means over T leave-one-example-out queries: entries with value rows [T, W] and their neighbours [T, K].

    lambda_*; abstained_*: the share with lambda 0; agreement_*: of the contribution with the entry's own value, 0 where
    nothing is retrieved; contribution_before and contribution_change: sizes, the Euclidean norm in logits for deltas,
    L1 of the weights for assignments.
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
    order = 1 if reading.settings.kind is Kind.ASSIGNMENT else 2
    return float(np.linalg.norm(rows, ord=order, axis=1).mean())

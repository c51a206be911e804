"""What a layer counts of its lookups."""

from __future__ import annotations

import numpy as np

from router_service.memories.counters import LAMBDA_RANGES, Abstain, LayerCounters


def test_tokens_count_alike_one_by_one_and_together() -> None:
    edges = np.arange(LAMBDA_RANGES + 1, dtype=np.float32) / np.float32(LAMBDA_RANGES)
    lambdas = np.concatenate([edges, np.random.default_rng(0).random(50, np.float32)])
    abstained = np.zeros(len(lambdas), np.uint8)
    for why in Abstain:
        lambdas[why], abstained[why] = (0, why) if why else (0.5, why)
    together, alone = LayerCounters(), LayerCounters()
    together.add(lambdas, abstained, 7)
    for n in range(len(lambdas)):
        alone.add(lambdas[n : n + 1], abstained[n : n + 1], 7)
    assert together.read().lambda_counts == alone.read().lambda_counts
    assert together.read().abstained == alone.read().abstained == [1, 1, 1]
    assert alone.read().tokens == len(lambdas)

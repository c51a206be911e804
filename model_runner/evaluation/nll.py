"""Scores compared: paired differences of the loss of texts, and the oracle that they are measured against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from knnmoe.client import ExampleRef
from torch import Tensor, nn

from model_runner.architectures.families import Assignment
from model_runner.errors import BadInput
from model_runner.memory_builder.objective import router_gradients
from model_runner.memory_builder.recipes import Recipe, entry_values
from model_runner.progress import Progress
from model_runner.router_hooks import RouterHooks
from model_runner.scoring import F64, Scores, collected, losses_of, plain_logits
from model_runner.texts import Batch, Window, token_nll


@dataclass(frozen=True, slots=True)
class Difference:
    """Change of NLL per token in nats (negative is better), with the standard error of paired differences."""

    delta: float
    se: float
    windows: int


def oracle_scores(
    model: nn.Module,
    windows: Sequence[Window],
    recipe: Recipe,
    progress: Progress,
    *,
    batch_size: int = 16,
) -> Scores:
    """Scores with the assignments that `recipe` makes of the scored tokens' own gradients.

    It sees the answers: a bound, not a method.
    """

    def logits_of(batch: Batch) -> Tensor:
        values = _own_assignments(model, batch, recipe)
        with RouterHooks(model, lambda call: values[call.site.layer]):
            return plain_logits(model, batch)

    return collected(losses_of(model, windows, logits_of, progress, "oracle", batch_size))


def _own_assignments(model: nn.Module, batch: Batch, recipe: Recipe) -> list[Assignment]:
    def loss(logits: Tensor) -> Tensor:
        return token_nll(logits, batch).sum()

    traces = router_gradients(model, batch.input_ids, loss, attention_mask=batch.attention_mask)
    every = torch.arange(batch.input_ids.numel(), device=batch.input_ids.device)
    values = [entry_values(t, recipe, 1.0, every, torch.Generator()) for t in traces]
    return [v for v in values if isinstance(v, Assignment)]


def difference(scores: Scores, baseline: Scores) -> Difference:
    """Paired change of NLL; the standard error is that of a ratio, clustered by example.

    Both must be scores of the same windows in the same order.
    """
    _require_same_windows(scores, baseline)
    changes = scores.nll_sums - baseline.nll_sums
    total = scores.targets.sum()
    delta = float(changes.sum() / total)
    residuals = _by_example(changes - delta * scores.targets, scores.examples)
    clusters = len(residuals)
    se = math.nan
    if clusters > 1:
        se = float(np.sqrt((residuals**2).sum() * clusters / (clusters - 1)) / total)
    return Difference(delta, se, len(changes))


def bootstrap_interval(
    scores: Scores, baseline: Scores, *, seed: int, draws: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the change of NLL per token, by resampling examples; NaN for a single example."""
    _require_same_windows(scores, baseline)
    rng = np.random.default_rng(seed)
    changes = _by_example(scores.nll_sums - baseline.nll_sums, scores.examples)
    targets = _by_example(scores.targets, scores.examples)
    if len(changes) < 2:
        return math.nan, math.nan
    picks = rng.integers(0, len(changes), size=(draws, len(changes)))
    deltas = changes[picks].sum(axis=1) / targets[picks].sum(axis=1)
    low, high = np.quantile(deltas, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _require_same_windows(scores: Scores, baseline: Scores) -> None:
    if scores.examples != baseline.examples or (scores.targets != baseline.targets).any():
        raise BadInput("paired differences need scores of the same windows in the same order")


def _by_example(values: F64, examples: Sequence[ExampleRef]) -> F64:
    """Sums over the windows of each example."""
    number = {ref: i for i, ref in enumerate(dict.fromkeys(examples))}
    return np.bincount([number[ref] for ref in examples], weights=values).astype(np.float64)

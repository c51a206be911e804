"""The oracle: each token routed by its own optimised assignment. Sees the answers; a bound, not a method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from model_runner.architectures.site import Assignment
from model_runner.evaluation.nll import Scores
from model_runner.memory_builder.objective import router_gradients
from model_runner.memory_builder.recipes import Recipe, entry_values
from model_runner.progress import Progress
from model_runner.router_hooks import RouterCall, RouterHooks
from model_runner.texts import Batch, Window, batched, make_batch, token_nll


def oracle_scores(
    model: nn.Module,
    windows: Sequence[Window],
    recipe: Recipe,
    progress: Progress,
    *,
    batch_size: int = 16,
) -> Scores:
    """Scores with the assignments that `recipe` makes of the scored tokens' own gradients."""
    device = next(model.parameters()).device
    groups = list(batched(windows, batch_size))
    sums, order = [], [w for group in groups for w in group]
    for group in progress.track(groups, "oracle", unit="batches"):
        batch = make_batch(group, device)
        values = _own_assignments(model, batch, recipe)

        def replay(call: RouterCall, values: list[Assignment] = values) -> Assignment:
            return values[call.site.layer]

        with torch.no_grad(), RouterHooks(model, replay):
            output = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
        sums.append(token_nll(output.logits, batch).double().sum(dim=1).cpu().numpy())
    return Scores(
        np.concatenate(sums),
        np.array([w.targets for w in order], dtype=np.float64),
        tuple(w.ref for w in order),
    )


def _own_assignments(model: nn.Module, batch: Batch, recipe: Recipe) -> list[Assignment]:
    def loss(logits: Tensor) -> Tensor:
        return token_nll(logits, batch).sum()

    traces = router_gradients(model, batch.input_ids, loss, attention_mask=batch.attention_mask)
    every = torch.arange(batch.input_ids.numel(), device=batch.input_ids.device)
    values = [entry_values(t, recipe, 1.0, every, torch.Generator()) for t in traces]
    return [v for v in values if isinstance(v, Assignment)]

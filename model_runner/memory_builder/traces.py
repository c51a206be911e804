"""One pass over reference windows: what every router saw and decided, and the gradient of each token's loss there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from model_runner.memory_builder.objective import LayerTrace, Scope, router_gradients
from model_runner.memory_builder.recipes import Recipe, step
from model_runner.router_hooks import Logits, RouterCall, RouterHooks
from model_runner.texts import Batch, token_nll


@dataclass(frozen=True, slots=True)
class GradientSettings:
    """How the gradient of each token's loss with respect to the routers' logits is taken.

    The defaults are measured in docs/experiments.md.

    Attributes:
        steps: gradient steps S; each after the first costs another pass. Not for logit deltas.
        scope: "leaf" holds later routers fixed, "live" lets the gradient through them.
        straight_through: experts that were not chosen get a gradient too.
        own_token: only (nearly) each token's own loss, not its effect on later tokens.

    """

    steps: int = 1
    scope: Scope = "leaf"
    straight_through: bool = False
    own_token: bool = False


@dataclass(frozen=True, slots=True)
class TracedWindows:
    """What one pass over the frozen model gave: a trace per layer, and the NLL [B, S] in nats."""

    batch: Batch
    traces: Sequence[LayerTrace]
    nll: Tensor

    @property
    def kept(self) -> Tensor:
        """Row numbers [n] of the tokens with a loss."""
        return self.batch.predicts.flatten().nonzero().flatten()

    def gradient_norms(self, trace: LayerTrace) -> Tensor:
        """|g| [n] in f32 of the tokens with a loss."""
        return trace.gradient.float().norm(dim=-1)[self.batch.predicts]


# Nats [B, S] of logits [B, S, V].
TokenLoss = Callable[[Tensor, Batch], Tensor]


def traced_windows(
    model: nn.Module,
    batch: Batch,
    gradient: GradientSettings,
    token_loss: TokenLoss = token_nll,
) -> TracedWindows:
    """Traces at the model's own logits, or at those of the policy that routes it, with the gradient there."""
    losses: list[Tensor] = []

    def loss(logits: Tensor) -> Tensor:
        losses.append(token_loss(logits, batch))
        return losses[-1].sum()

    traces = router_gradients(
        model,
        batch.input_ids,
        loss,
        attention_mask=batch.attention_mask,
        straight_through=gradient.straight_through,
        detach_kv=gradient.own_token,
        scope=gradient.scope,
    )
    return TracedWindows(batch, traces, losses[0].detach())


def descended(
    model: nn.Module,
    traced: TracedWindows,
    recipe: Recipe,
    norms: Sequence[float],
    gradient: GradientSettings,
    *,
    generator: torch.Generator | None = None,
) -> Sequence[LayerTrace]:
    """Traces at the logits before the last of `gradient.steps` steps; for one step the ones given.

    norms: median |g| per layer; generator: of random steps.
    """
    traces, drawn_by = traced.traces, generator or torch.Generator()
    for _ in range(1, gradient.steps):
        logits = [
            t.router_logits
            + step(t.gradient, recipe, norms[t.site.layer], drawn_by).to(t.router_logits)
            for t in traces
        ]
        with RouterHooks(model, partial(_replay_logits, logits)):
            traces = traced_windows(model, traced.batch, gradient).traces
    return traces


def _replay_logits(logits: Sequence[Tensor], call: RouterCall) -> Logits:
    return Logits(logits[call.site.layer].flatten(0, 1))

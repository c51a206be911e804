"""Builds memories from reference windows: one pass for the gradients, one value per memory, streamed to the sidecar.

Ids come from where an entry stands and what text it is of (source, example, digest, position), so building again writes
the same entries, a build that was cut off goes on where it stopped, and another text never takes their place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from knnmoe.client import AdminClient, Upserter
from knnmoe.fingerprint import ModelFingerprint
from knnmoe.v1 import memory_admin_pb2 as pb
from torch import Tensor, nn

from model_runner.architectures.families import Assignment
from model_runner.errors import BadInput
from model_runner.memory_builder.entries import (
    Destination,
    LayerEntries,
    entry_ids,
    provenance_of,
    upsert_requests,
)
from model_runner.memory_builder.objective import LayerTrace, Scope, router_gradients
from model_runner.memory_builder.recipes import Kind, Recipe, Values, entry_values, step
from model_runner.progress import Progress
from model_runner.router_hooks import Logits, RouterCall, RouterHooks
from model_runner.texts import Batch, Window, batched, distinct, make_batch, token_nll

# Windows whose gradients set each layer's median norm: up to 8,192 tokens, enough for a median, few beside a build.
NORM_SAMPLE_WINDOWS = 16


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
class Target:
    """A memory to fill, and how its values are made; `measure_gain` costs another forward pass per batch."""

    memory: str
    recipe: Recipe
    measure_gain: bool = True


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build did."""

    windows: int
    windows_skipped: int
    entries_per_layer: int
    elapsed_s: float
    upload_s: float


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
# Which of a layer's entries ([n] bool) are written.
Keep = Callable[[TracedWindows, LayerTrace, LayerEntries], Tensor]


class MemoryBuilder:
    """Fills memories that exist already. The model is only read, and must not be routing with a memory.

    tokenizer: the model's; the words around each entry's token are kept with it. None: without them.
    """

    def __init__(
        self,
        model: nn.Module,
        fingerprint: ModelFingerprint,
        client: AdminClient,
        gradient: GradientSettings | None = None,
        *,
        batch_size: int = 16,
        durability: pb.Durability = pb.DURABILITY_PROCESS,
        tokenizer: Any = None,
    ) -> None:
        self._model, self._client, self._tokenizer = model, client, tokenizer
        self._digest, self._layers = fingerprint.digest(), fingerprint.num_layers
        self._gradient = gradient or GradientSettings()
        self._batch_size, self._durability = batch_size, durability
        self._device = next(model.parameters()).device
        self._upload_s = 0.0

    def build(
        self, windows: Sequence[Window], targets: Sequence[Target], progress: Progress
    ) -> BuildReport:
        """Writes an entry per token with a loss, per layer and target.

        Windows that an earlier build wrote are skipped, and those that repeat an earlier one count for nothing. Raises
        BadInput; ServiceUnavailable, ServiceRefused or ModelMismatch when the sidecar fails: what was written stays.
        """
        if not windows:
            raise BadInput("windows: got none, expected at least one")
        for target in targets:
            if self._gradient.steps > 1 and target.recipe.kind is Kind.LOGIT_DELTA:
                raise BadInput(
                    "several gradient steps make assignments or logits, not logit deltas: use steps 1"
                )
        started, skipped, entries = time.monotonic(), 0, 0
        self._upload_s, windows = 0.0, distinct(windows)
        norms = self.median_norms(windows, progress)
        batches = list(enumerate(batched(windows, self._batch_size)))
        with self._client.upserter() as upserter:
            for number, group in progress.track(batches, "building", unit="batches"):
                if self.is_there(group, [target.memory for target in targets]):
                    skipped += len(group)
                    continue
                traced = self.trace(group)
                for target in targets:
                    self.write(upserter, traced, target, norms, number=number)
                entries += len(traced.kept)
            upserter.finish()
        return BuildReport(
            len(windows), skipped, entries, time.monotonic() - started, self._upload_s
        )

    def trace(self, group: Sequence[Window]) -> TracedWindows:
        """Traces at the model's own logits with the gradient there."""
        return traced_windows(self._model, make_batch(group, self._device), self._gradient)

    def is_there(self, group: Sequence[Window], memories: Sequence[str]) -> bool:
        """Whether these windows were written before: layers are written in order, so the last one tells."""
        ids = entry_ids(group)
        return all(self._client.count(m, self._layers - 1, ids) == len(ids) for m in memories)

    def median_norms(
        self, windows: Sequence[Window], progress: Progress | None = None
    ) -> list[float]:
        """Median |g| of each layer over the tokens of some windows, spread over the reference."""
        stride = max(1, len(windows) // NORM_SAMPLE_WINDOWS)
        norms: list[list[Tensor]] = [[] for _ in range(self._layers)]
        groups = list(batched(windows[::stride][:NORM_SAMPLE_WINDOWS], self._batch_size))
        progress = progress or Progress(quiet=True)
        for group in progress.track(groups, "lengths of gradients", "batches"):
            traced = self.trace(group)
            for trace in traced.traces:
                norms[trace.site.layer].append(traced.gradient_norms(trace))
        return [float(torch.cat(parts).median()) for parts in norms]

    def write(
        self,
        upserter: Upserter,
        traced: TracedWindows,
        target: Target,
        norms: Sequence[float],
        *,
        number: int = 0,
        keep: Keep | None = None,
    ) -> int:
        """Sends the entries of one group, layer by layer; returns how many. `number` seeds what is drawn.

        norms: median |g| per layer. Raises as Upserter.send().
        """
        # Of one batch, so that a build that goes on where it stopped draws what it would have drawn. The prime keeps
        # the batches of one seed from being those of the next.
        generator = torch.Generator().manual_seed(target.recipe.seed * 1_000_003 + number)
        layers = self._entries(traced, target, norms, generator)
        if keep is not None:
            layers = [
                entries.rows(keep(traced, trace, entries).nonzero().flatten())
                for trace, entries in zip(traced.traces, layers, strict=True)
            ]
        started = time.monotonic()
        to = Destination(target.memory, self._digest, self._durability)
        for entries in layers:
            for request in upsert_requests(entries, to):
                upserter.send(request)
        self._upload_s += time.monotonic() - started
        return sum(len(entries) for entries in layers)

    def _entries(
        self,
        traced: TracedWindows,
        target: Target,
        norms: Sequence[float],
        generator: torch.Generator,
    ) -> list[LayerEntries]:
        kept, batch = traced.kept, traced.batch
        last = descended(
            self._model, traced, target.recipe, norms, self._gradient, generator=generator
        )
        values = [
            entry_values(t, target.recipe, norms[t.site.layer], kept, generator) for t in last
        ]
        gains = torch.zeros(len(kept))
        if target.measure_gain:
            gains = (traced.nll - self._replayed_nll(batch, values))[batch.predicts]
        ids = entry_ids(batch.windows)
        provenance = provenance_of(batch.windows, gains, self._tokenizer)
        keys = [t.router_input.flatten(0, 1)[kept] for t in traced.traces]  # of the unmodified pass
        return [
            LayerEntries(trace.site.layer, ids, layer_keys, layer_values, provenance)
            for trace, layer_keys, layer_values in zip(traced.traces, keys, values, strict=True)
        ]

    def _replayed_nll(self, batch: Batch, values: Sequence[Values]) -> Tensor:
        """NLL [B, S] in nats when the stored values stand in place of the model's own routing."""
        policy = partial(_replay_values, values, batch.predicts.flatten())
        with torch.no_grad(), RouterHooks(self._model, policy):
            output = self._model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
        return token_nll(output.logits, batch)


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


def collect_router_inputs(
    model: nn.Module,
    windows: Sequence[Window],
    *,
    batch_size: int = 16,
    most: int = 2000,
    progress: Progress | None = None,
) -> dict[int, Tensor]:
    """Router inputs [n, d] by layer, n <= `most`, spread over the tokens whose loss counts."""
    device = next(model.parameters()).device
    found: dict[int, list[Tensor]] = {}
    groups, progress = list(batched(windows, batch_size)), progress or Progress(quiet=True)
    for group in progress.track(groups, "router inputs", "batches"):
        batch = make_batch(group, device)
        keep = batch.predicts.flatten()

        def note(call: RouterCall, keep: Tensor = keep) -> None:
            found.setdefault(call.site.layer, []).append(call.router_input[keep].cpu())

        with torch.no_grad(), RouterHooks(model, note):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return {layer: _thinned(torch.cat(parts), most) for layer, parts in found.items()}


def _thinned(rows: Tensor, most: int) -> Tensor:
    stride = max(1, -(-len(rows) // most))
    return rows[::stride]


def _replay_logits(logits: Sequence[Tensor], call: RouterCall) -> Logits:
    return Logits(logits[call.site.layer].flatten(0, 1))


def _replay_values(values: Sequence[Values], kept: Tensor, call: RouterCall) -> Assignment | Logits:
    """The stored values on the kept rows ([T] bool), the model's own routing on the others."""
    value = values[call.site.layer]
    if isinstance(value, Assignment):
        weights, experts = call.weights.clone(), call.experts.clone()
        weights[kept], experts[kept] = value.weights.to(weights), value.experts
        return Assignment(weights, experts)
    logits = call.router_logits.clone()
    if isinstance(value, Logits):
        logits[kept] = value.router_logits.to(logits)
    else:
        logits[kept] += value.to(logits)
    return Logits(logits)

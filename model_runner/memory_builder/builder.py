"""Builds memories from reference windows: one pass for the gradients, one value per memory, streamed to the sidecar.

Ids come from where an entry stands (source, example, position), so building again writes the same entries, and a build
that was cut off goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from knnmoe import tensors
from knnmoe.entry_ids import entry_id
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1.types_pb2 import Provenance
from torch import Tensor, nn

from model_runner.architectures import Assignment, RouterSite
from model_runner.batches import Batch, make_batch, token_nll
from model_runner.errors import BadInput
from model_runner.fingerprint import ModelFingerprint
from model_runner.memory_builder.layer_trace import LayerTrace, Scope
from model_runner.memory_builder.objective import router_gradients
from model_runner.memory_builder.recipes import Kind, Recipe, entry_values, step
from model_runner.memory_client import MemoryClient, Upserter
from model_runner.progress import Progress
from model_runner.router_hooks import Logits, RouterCall, RouterHooks
from model_runner.texts import Window, batched
from model_runner.wire import encode_assignment, encode_floats

# Windows whose gradients set each layer's median norm.
NORM_SAMPLE_WINDOWS = 16
# Entries per upsert message.
ENTRIES_PER_MESSAGE = 1024


@dataclass(frozen=True, slots=True)
class GradientSettings:
    """How the gradient of each token's loss with respect to the routers' logits is taken.

    The defaults are measured in docs/experiments.md.

    Attributes:
        steps: gradient steps S; each after the first costs another pass. Assignment memories only.
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


class MemoryBuilder:
    """Fills memories that exist already. The model is only read."""

    def __init__(
        self,
        model: nn.Module,
        fingerprint: ModelFingerprint,
        client: MemoryClient,
        gradient: GradientSettings | None = None,
        *,
        batch_size: int = 16,
    ) -> None:
        self._model, self._client = model, client
        self._digest, self._layers = fingerprint.digest(), fingerprint.num_layers
        self._gradient = gradient or GradientSettings()
        self._batch_size = batch_size
        self._device = next(model.parameters()).device
        self._upload_s = 0.0

    def build(
        self, windows: Sequence[Window], targets: Sequence[Target], progress: Progress
    ) -> BuildReport:
        """Writes an entry per token with a loss, per layer and target.

        Windows that an earlier build wrote are skipped. Raises BadInput; RoutingUnavailable, RoutingRefused or
        ModelMismatch when the sidecar fails: what was written stays.
        """
        if not windows:
            raise BadInput("windows: got none, expected at least one")
        for target in targets:
            if self._gradient.steps > 1 and target.recipe.kind is Kind.LOGIT_DELTA:
                raise BadInput(
                    "several gradient steps make assignments, not logit deltas: use steps 1"
                )
        started, skipped, entries = time.monotonic(), 0, 0
        self._upload_s = 0.0
        norms = self._median_norms(windows)
        batches = list(enumerate(batched(windows, self._batch_size)))
        with self._client.upserter() as upserter:
            for number, group in progress.track(batches, "building", unit="batches"):
                batch = make_batch(group, self._device)
                if self._is_there(batch, targets):
                    skipped += len(group)
                    continue
                traces, nll = self._traces(batch)
                for target in targets:
                    generator = _generator(target.recipe, number)
                    self._upload(upserter, batch, traces, nll, target, norms, generator)
                entries += int(batch.predicts.sum())
            upserter.finish()
        return BuildReport(
            len(windows), skipped, entries, time.monotonic() - started, self._upload_s
        )

    def _traces(self, batch: Batch) -> tuple[list[LayerTrace], Tensor]:
        """Traces at the model's own logits with the gradient there, and the NLL [B, S] in nats."""
        losses: list[Tensor] = []

        def loss(logits: Tensor) -> Tensor:
            losses.append(token_nll(logits, batch))
            return losses[-1].sum()

        traces = router_gradients(
            self._model,
            batch.input_ids,
            loss,
            attention_mask=batch.attention_mask,
            straight_through=self._gradient.straight_through,
            detach_kv=self._gradient.own_token,
            scope=self._gradient.scope,
        )
        return traces, losses[0].detach()

    def _median_norms(self, windows: Sequence[Window]) -> list[float]:
        """Median |g| of each layer over the tokens of some windows, spread over the reference."""
        stride = max(1, len(windows) // NORM_SAMPLE_WINDOWS)
        norms: list[list[Tensor]] = [[] for _ in range(self._layers)]
        for group in batched(windows[::stride][:NORM_SAMPLE_WINDOWS], self._batch_size):
            batch = make_batch(group, self._device)
            traces, _ = self._traces(batch)
            for trace in traces:
                norms[trace.site.layer].append(trace.gradient.float().norm(dim=-1)[batch.predicts])
        return [float(torch.cat(parts).median()) for parts in norms]

    def _is_there(self, batch: Batch, targets: Sequence[Target]) -> bool:
        """Whether an earlier build wrote this batch: layers are written in order, so the last one tells."""
        ids = entry_ids(batch.windows)
        return all(self._client.count(t.memory, self._layers - 1, ids) == len(ids) for t in targets)

    def _upload(
        self,
        upserter: Upserter,
        batch: Batch,
        traces: Sequence[LayerTrace],
        nll: Tensor,
        target: Target,
        norms: Sequence[float],
        generator: torch.Generator,
    ) -> None:
        kept = batch.predicts.flatten().nonzero().flatten()
        ends = self._descend(batch, traces, target.recipe, norms, generator)
        values = [
            entry_values(t, target.recipe, norms[t.site.layer], kept, generator) for t in ends
        ]
        gains = torch.zeros(len(kept))
        if target.measure_gain:
            gains = (nll - self._replayed_nll(batch, values))[batch.predicts]
        provenance = _provenance(batch, gains)
        started = time.monotonic()
        ids = entry_ids(batch.windows)
        for trace, layer_values in zip(traces, values, strict=True):  # keys of the unmodified pass
            keys = trace.router_input.flatten(0, 1)[kept]
            for request in _upserts(
                target.memory, self._digest, trace.site, ids, keys, layer_values, provenance
            ):
                upserter.send(request)
        self._upload_s += time.monotonic() - started

    def _descend(
        self,
        batch: Batch,
        traces: Sequence[LayerTrace],
        recipe: Recipe,
        norms: Sequence[float],
        generator: torch.Generator,
    ) -> Sequence[LayerTrace]:
        """Traces at the logits before the last of S steps; for S = 1 the ones given."""
        for _ in range(1, self._gradient.steps):
            logits = [
                t.router_logits
                + step(t.gradient, recipe, norms[t.site.layer], generator).to(t.router_logits)
                for t in traces
            ]
            with RouterHooks(self._model, partial(_replay_logits, logits)):
                traces, _ = self._traces(batch)
        return traces

    def _replayed_nll(self, batch: Batch, values: Sequence[Assignment | Tensor]) -> Tensor:
        """NLL [B, S] in nats when the stored values stand in place of the model's own routing."""
        policy = partial(_replay_values, values, batch.predicts.flatten())
        with torch.no_grad(), RouterHooks(self._model, policy):
            output = self._model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
        return token_nll(output.logits, batch)


def _generator(recipe: Recipe, batch: int) -> torch.Generator:
    """Of one batch, so that a build that goes on where it stopped draws what it would have drawn."""
    return torch.Generator().manual_seed(recipe.seed * 1_000_003 + batch)


def _replay_logits(logits: Sequence[Tensor], call: RouterCall) -> Logits:
    return Logits(logits[call.site.layer].flatten(0, 1))


def _replay_values(
    values: Sequence[Assignment | Tensor], kept: Tensor, call: RouterCall
) -> Assignment | Logits:
    """The stored values on the kept rows ([T] bool), the model's own routing on the others."""
    value = values[call.site.layer]
    if isinstance(value, Assignment):
        weights, experts = call.weights.clone(), call.experts.clone()
        weights[kept], experts[kept] = value.weights.to(weights), value.experts
        return Assignment(weights, experts)
    logits = call.router_logits.clone()
    logits[kept] += value.to(logits)
    return Logits(logits)


def entry_ids(windows: Sequence[Window]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Ids [n] of the windows' entries, in the order of a batch's `predicts`."""
    return np.fromiter(
        (entry_id(w.ref.source, w.ref.example, position) for w, position in _places(windows)),
        dtype=np.uint64,
    )


def _places(windows: Sequence[Window]) -> Iterable[tuple[Window, int]]:
    for window in windows:
        for token in range(window.first_target - 1, len(window.token_ids) - 1):
            yield window, window.offset + token


def _provenance(batch: Batch, gains: Tensor) -> list[Provenance]:
    now = time.time_ns() // 1_000_000
    return [
        Provenance(
            source=window.ref.source,
            example=window.ref.example,
            position=position,
            token=window.token_ids[position - window.offset],
            gain=gain,
            created_unix_ms=now,
        )
        for (window, position), gain in zip(_places(batch.windows), gains.tolist(), strict=True)
    ]


def _upserts(
    memory: str,
    digest: str,
    site: RouterSite,
    ids: np.ndarray[tuple[int], np.dtype[np.uint64]],
    keys: Tensor,
    values: Assignment | Tensor,
    provenance: Sequence[Provenance],
) -> Iterable[pb.UpsertRequest]:
    for start in range(0, len(ids), ENTRIES_PER_MESSAGE):
        rows = slice(start, start + ENTRIES_PER_MESSAGE)
        entries = pb.Entries(
            ids=tensors.to_tensor(ids[rows]),
            keys=encode_floats(keys[rows]),
            provenance=provenance[rows],
        )
        if isinstance(values, Assignment):
            part = Assignment(values.weights[rows], values.experts[rows])
            entries.assignments.CopyFrom(encode_assignment(part))
        else:
            entries.logit_deltas.CopyFrom(encode_floats(values[rows]))
        yield pb.UpsertRequest(
            memory=memory, layer=site.layer, entries=entries, model_digest=digest
        )

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
from knnmoe.v1.types_pb2 import MemorySettings
from torch import Tensor, nn

from model_runner.architectures.families import Assignment
from model_runner.errors import BadInput
from model_runner.memory_builder.boosted_memories import (
    RoundMemories,
    Stored,
    boost_memory,
    rows_of,
)
from model_runner.memory_builder.boosting import LEAST_FALL, Booster, Outcome
from model_runner.memory_builder.entries import (
    Destination,
    LayerEntries,
    entry_ids,
    provenance_of,
    upsert_requests,
)
from model_runner.memory_builder.null_entries import changes, largest
from model_runner.memory_builder.objective import LayerTrace
from model_runner.memory_builder.recipes import (
    RECOMMENDED,
    Kind,
    Recipe,
    Values,
    entry_values,
)
from model_runner.memory_builder.traces import (
    GradientSettings,
    TracedWindows,
    descended,
    traced_windows,
)
from model_runner.progress import Progress
from model_runner.router_hooks import Logits, Policy, RouterCall, RouterHooks
from model_runner.texts import Batch, Window, batched, distinct, make_batch, token_nll

# Windows whose gradients set each layer's median norm: up to 8,192 tokens, enough for a median, few beside a build.
NORM_SAMPLE_WINDOWS = 16


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
        self._experts = fingerprint.num_experts
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
        self._require_windows(windows)
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
                for target in targets if not entries else ():
                    self._forget_rounds(target.memory)
                for target in targets:
                    self.write(upserter, traced, target, norms, number=number)
                entries += len(traced.kept)
            upserter.finish()
        return BuildReport(
            len(windows), skipped, entries, time.monotonic() - started, self._upload_s
        )

    def changes(
        self, windows: Sequence[Window], policy: Policy, progress: Progress
    ) -> list[Tensor]:
        """How far a memory would move the logits of text: see null_entries.changes."""
        return changes(self._model, windows, policy, progress, batch_size=self._batch_size)

    def add_null_entries(
        self,
        memory: str,
        windows: Sequence[Window],
        moved: Sequence[Tensor],
        count: int,
        progress: Progress,
    ) -> int:
        """Writes entries that change nothing, `count` per layer at most, of text that the memory is not for.

        They stand where it would change the routing of that text most. `memory` holds logit deltas; windows: distinct;
        moved: `changes` of them with it. Returns how many there are per layer. Raises as `build`.
        """
        self._require_windows(windows)
        entries, first, chosen = 0, 0, [largest(each, count) for each in moved]
        with self._client.upserter() as upserter:
            groups = list(batched(windows, self._batch_size))
            for group in progress.track(groups, "null entries", unit="batches"):
                tokens = slice(first, first := first + sum(window.targets for window in group))
                rows = [each[tokens].nonzero().flatten() for each in chosen]
                if any(len(each) for each in rows):
                    entries += self._send(upserter, self._null_entries(group, rows), memory)
            upserter.finish()
        return entries // self._layers

    def _null_entries(self, group: Sequence[Window], rows: Sequence[Tensor]) -> list[LayerEntries]:
        """Of the tokens [m] of each layer."""
        ids = entry_ids(group)
        found = collect_router_inputs(self._model, group, batch_size=len(group), most=len(ids))
        provenance = provenance_of(group, torch.zeros(len(ids)), self._tokenizer)
        nothing = torch.zeros(len(ids), self._experts)
        return [
            LayerEntries(layer, ids, keys, nothing, provenance).rows(rows[layer])
            for layer, keys in sorted(found.items())
        ]

    def boost(
        self,
        memory: str,
        windows: Sequence[Window],
        rounds: int,
        progress: Progress,
        *,
        recipe: Recipe = RECOMMENDED,
        least_fall: float = LEAST_FALL,
        finish: Callable[[str], object] | None = None,
    ) -> Outcome:
        """Boosts a memory of logit deltas, built of these windows and calibrated, until it went through `rounds`.

        Ends before when a round lowers the leave-one-out NLL of the windows by less than `least_fall`; that one is not
        kept. Until the memory is replaced, from one lookup to the next, rounds are memories beside it
        (boosted_memories.py): a run that was cut off goes on.
        finish: gets the name of the one that takes its place, before it does, e.g. to index it.
        Raises BadInput for other values, or text of one example; MemoryChanged when it was written to meanwhile.
        """
        windows = distinct(windows)

        def booster_of(stored: Stored) -> Booster:
            return Booster(
                *(self._model, windows, self.median_norms(windows, progress)),
                stored.described.settings,
                rows=rows_of(stored, windows, self._batch_size),
                recipe=recipe,
                gradient=self._gradient,
                least_fall=least_fall,
                batch_size=self._batch_size,
            )

        to = Destination(memory, self._digest, self._durability)
        beside = RoundMemories(self._client, to, self._device)
        return boost_memory(
            *(beside, windows, booster_of, rounds, progress),
            least_fall=least_fall,
            finish=finish or (lambda name: None),
        )

    @staticmethod
    def _require_windows(windows: Sequence[Window]) -> None:
        if not windows:
            raise BadInput("windows: got none, expected at least one")

    def trace(self, group: Sequence[Window]) -> TracedWindows:
        """Traces at the model's own logits with the gradient there."""
        return traced_windows(self._model, make_batch(group, self._device), self._gradient)

    def is_there(self, group: Sequence[Window], memories: Sequence[str]) -> bool:
        """Whether these windows were written before: layers are written in order, so the last one tells."""
        ids = entry_ids(group)
        return all(self._client.count(m, self._layers - 1, ids) == len(ids) for m in memories)

    def _forget_rounds(self, memory: str) -> None:
        """Entries that are written now went through none."""
        if self._client.describe(memory).settings.rounds:
            self._client.update_settings(memory, MemorySettings(rounds=0))

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
        return self._send(upserter, layers, target.memory)

    def _send(self, upserter: Upserter, layers: Sequence[LayerEntries], memory: str) -> int:
        started = time.monotonic()
        to = Destination(memory, self._digest, self._durability)
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

"""Adds examples to a memory while it serves: one at a time, acknowledged, and so in the answer to the next lookup.

OnlineLearner writes every token of an example, or those that its `keep` wants; KnownTokens is one that leaves out what
the memory knows already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from knnmoe.client import AdminClient, ExampleRef, Upserter, require_same_model
from knnmoe.fingerprint import ModelFingerprint
from knnmoe.v1 import memory_admin_pb2 as pb
from torch import Tensor, nn

from model_runner.architectures.families import Assignment
from model_runner.errors import BadInput
from model_runner.memory_builder.builder import Keep, MemoryBuilder, Target
from model_runner.memory_builder.entries import LayerEntries
from model_runner.memory_builder.objective import LayerTrace
from model_runner.memory_builder.recipes import Recipe, assignment_values, recipe_of
from model_runner.memory_builder.traces import TracedWindows
from model_runner.texts import Window, batched, distinct

# Tokens whose gradient norms a running median remembers, per layer: 16 windows of 512, as many as a build samples.
NORMS_REMEMBERED = 8192
# What an acknowledged entry survives, by the name that commands use.
DURABILITIES = {"process": pb.DURABILITY_PROCESS, "fsync": pb.DURABILITY_FSYNC}


@dataclass(frozen=True, slots=True)
class Learnt:
    """What became of one example: entries sent over all layers, and those that were known already."""

    entries: int
    known: int


@dataclass(frozen=True, slots=True)
class NllSums:
    """Nats over an example's tokens: without retrieval, with it before and after learning the example."""

    off: float
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class ExampleReport:
    """One learnt example.

    Attributes:
        example, name: as the memory and as its file names it.
        tokens: those with a loss.
        entries: written, over all layers.
        known: left out, since the memory knew them (KnownTokens).
        was_there: the example was in the memory, and was not written again.
        nll_sums: None when it was not scored.

    """

    example: str
    name: str
    tokens: int
    entries: int
    known: int
    was_there: bool
    nll_sums: NllSums | None = None


class OnlineLearner:
    """Learns windows into one memory over one Upsert stream. Not for several threads at once.

    Gradients are those of the frozen model, as in a build: the model must not be routing with a memory meanwhile.

    Args:
        model: a frozen MoE.
        client: of the sidecar that serves the memory.
        memory: must be there, made for this model.
        recipe: how values are made; None = the memory's own (see recipe_of).
        reference: windows that set the median gradient norms, as a build's do; without, the norms are those of what
            was learnt so far.
        keep: which entries are written; None = all.
        catch_up: called when an example is acknowledged, and waited for: a replica that is read meanwhile gets it.
        durability: of every upsert.
        batch_size: windows per pass.
        tokenizer: as of MemoryBuilder.

    Raises ModelMismatch, ServiceRefused (no such memory), ServiceUnavailable;
    BadInput when a recipe makes another kind.

    """

    def __init__(
        self,
        model: nn.Module,
        fingerprint: ModelFingerprint,
        client: AdminClient,
        memory: str,
        *,
        recipe: Recipe | None = None,
        reference: Sequence[Window] = (),
        keep: Keep | None = None,
        catch_up: Callable[[], None] | None = None,
        durability: pb.Durability = pb.DURABILITY_PROCESS,
        batch_size: int = 8,
        tokenizer: Any = None,
    ) -> None:
        self._target = Target(memory, _checked_recipe(client, memory, fingerprint, recipe))
        self._builder = MemoryBuilder(
            *(model, fingerprint, client),
            batch_size=batch_size,
            durability=durability,
            tokenizer=tokenizer,
        )
        self._norms = self._builder.median_norms(reference) if reference else None
        self._running = RunningMedians(fingerprint.num_layers)
        self._keep, self._catch_up, self._batch_size = keep, catch_up, batch_size
        self._upserter: Upserter = client.upserter()

    def __enter__(self) -> OnlineLearner:
        return self

    def __exit__(self, *_: object) -> None:
        self._upserter.__exit__()

    def is_there(self, windows: Sequence[Window]) -> bool:
        """Whether every token of these windows has an entry."""
        return self._builder.is_there(windows, [self._target.memory])

    def learn_example(self, windows: Sequence[Window], *, again: bool = False) -> ExampleReport:
        """learn() of one example's windows, unless it is there already; `again`: also then."""
        was_there = not again and self.is_there(windows)
        learnt = Learnt(0, 0) if was_there else self.learn(windows)
        first, tokens = windows[0], sum(window.targets for window in windows)
        return ExampleReport(
            first.ref.example, first.name, tokens, learnt.entries, learnt.known, was_there
        )

    def learn(self, windows: Sequence[Window]) -> Learnt:
        """Writes an entry per token with a loss and layer; returns when all are acknowledged, and `catch_up` is done.

        Raises ServiceUnavailable, ServiceRefused or ModelMismatch: learning the same again then writes the same ids.
        """
        sent = every = 0
        for group in batched(distinct(windows), self._batch_size):
            traced = self._builder.trace(group)
            norms = self._norms or self._running.with_norms_of(traced)
            sent += self._builder.write(
                self._upserter, traced, self._target, norms, keep=self._keep
            )
            every += len(traced.kept) * len(traced.traces)
        self._upserter.finish()
        if self._catch_up is not None:
            self._catch_up()
        return Learnt(sent, every - sent)


class RunningMedians:
    """The median gradient norm per layer of the tokens seen last."""

    def __init__(self, layers: int) -> None:
        self._norms = [torch.empty(0) for _ in range(layers)]

    def with_norms_of(self, traced: TracedWindows) -> list[float]:
        """Medians with these windows among what was seen."""
        for trace in traced.traces:
            layer, norms = trace.site.layer, traced.gradient_norms(trace).cpu()
            self._norms[layer] = torch.cat([self._norms[layer], norms])[-NORMS_REMEMBERED:]
        return [float(norms.median()) for norms in self._norms]


def _checked_recipe(
    client: AdminClient, memory: str, fingerprint: ModelFingerprint, recipe: Recipe | None
) -> Recipe:
    description = client.describe(memory)
    require_same_model(description, fingerprint.message())
    own = recipe_of(memory, description.settings)
    if recipe is not None and recipe.kind is not own.kind:
        raise BadInput(
            f"memory {memory!r} holds values of kind {own.kind}, this recipe makes {recipe.kind}; "
            "choose the memory's preset, or another memory"
        )
    return recipe or own


class Similarities(Protocol):
    """What knows how near a memory's entries are: a RouterClient or a ReplicaRetriever."""

    def nearest_similarities(
        self,
        layer: int,
        router_input: Tensor,
        router_logits: Tensor,
        own: Assignment,
        exclude: Sequence[ExampleRef],
    ) -> Tensor:
        """f32 [T] on the host: that of the nearest key of another example than the token's in `exclude` [T]; or 0."""
        ...


class KnownTokens:
    """A `Keep` of the builder: entries whose nearest key has a similarity below `threshold`, in (0, 1].

    The example's own entries do not count: a corrected answer replaces the one before it.
    """

    def __init__(self, memory: Similarities, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise BadInput(f"skip-known: got {threshold}, expected a similarity in (0, 1]")
        self._memory, self._threshold = memory, threshold

    def keep(self, traced: TracedWindows, trace: LayerTrace, entries: LayerEntries) -> Tensor:
        """Which entries ([n] bool, on the host) the memory does not know yet."""
        logits = trace.router_logits.flatten(0, 1)
        own = assignment_values(trace, logits)
        tokens = traced.kept
        similarities = self._memory.nearest_similarities(
            entries.layer,
            entries.keys,
            logits[tokens],
            Assignment(own.weights[tokens], own.experts[tokens]),
            [ExampleRef(p.source, p.example) for p in entries.provenance],
        )
        return similarities < self._threshold

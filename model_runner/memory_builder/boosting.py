"""Boosting of logit-delta memories: rounds over the reference with the memory on, each token without its own example.

A round runs the reference through the model while the memory answers, so that gradients are those that the memory
leaves over; every entry's delta gets a share of the step against its own, and its key becomes the router input that was
seen. The same pass says what the memory gains on text that it does not hold: its leave-one-out NLL, which falls round
by round and tracks held-out text (docs/experiments.md), is the stopping rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from knnmoe.client import ExampleRef
from knnmoe.v1.types_pb2 import MemorySettings
from torch import Tensor, nn

from model_runner.errors import BadInput
from model_runner.memory_builder.recipes import RECOMMENDED, Recipe, step
from model_runner.memory_builder.traces import GradientSettings, TracedWindows, traced_windows
from model_runner.progress import Progress
from model_runner.replica.held import HeldMemory, policy_of
from model_runner.router_hooks import RouterHooks
from model_runner.routing_policy import RetrievalPolicy
from model_runner.scoring import score
from model_runner.texts import Window, batched, make_batch

# Of a round's step that is added to the deltas.
RATE = 0.5
# Nats per token: a round that lowers the leave-one-out NLL by less is the last, and is not kept.
LEAST_FALL = 0.002


@dataclass(frozen=True, slots=True)
class Deltas:
    """One layer's entries: keys [n, d] and logit deltas [n, N] in f32, and the example of each."""

    keys: Tensor
    deltas: Tensor
    origins: Sequence[ExampleRef]


@dataclass(frozen=True, slots=True)
class Boosted:
    """A memory after some rounds.

    Attributes:
        nll: of the reference, nats per token: of the plain model, then leave-one-out after 0, 1, ... rounds; those that
            were measured, so after `rounds` - 1 at least.

    """

    layers: Sequence[Deltas]
    rounds: int
    nll: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What boosting came to: the round whose memory is kept, the NLL of each (see Boosted.nll), and why it ended."""

    rounds: int
    nll: tuple[float, ...]
    why: str

    def __str__(self) -> str:
        plain, *after = (f"{nll:.4f}" for nll in self.nll)
        each = ", ".join(f"{nll} after {rounds}" for rounds, nll in enumerate(after))
        return f"{self.rounds} rounds kept ({self.why}); leave-one-out NLL of the reference: plain {plain}, {each}"


def held(layers: Sequence[Deltas], settings: MemorySettings) -> HeldMemory:
    """The entries, to be searched."""
    return HeldMemory.of(
        [layer.keys for layer in layers],
        [layer.deltas for layer in layers],
        [layer.origins for layer in layers],
        settings,
    )


def require_two_examples(windows: Sequence[Window]) -> None:
    """Raises BadInput for text that leaves nothing over when a token's own example is left out."""
    if len({window.ref for window in windows}) < 2:
        raise BadInput(
            "boosting leaves each token's own example out, and there is one only; give text of two examples or more, "
            "or --rounds 0"
        )


def verdict(nll: Sequence[float], least_fall: float) -> str:
    """Why the last of these rounds (see Boosted.nll) is to be the last; "" when it is not."""
    if len(nll) < 3:
        return ""
    fall = nll[-2] - nll[-1]
    if fall >= least_fall:
        return ""
    if fall < 0:
        return f"round {len(nll) - 2} raised the NLL by {-fall:.4f}"
    return f"round {len(nll) - 2} lowered it by less than {least_fall}"


class Booster:
    """Goes over the reference windows whose entries a memory holds.

    Args:
        model: frozen, not routing with a memory.
        windows: of the reference; their entries in the order of batches of `batch_size` are `rows` of each layer.
            -1: a token without an entry. None: they are all entries, in that order. Others take part and stay.
        norms: median |g| of each layer with the plain model.
        settings: how the memory is read, every field set. Layers that it does not speak for stay as they are.
        rate: of a round's step that is added to the deltas.
        least_fall: nats per token; a round that lowers the leave-one-out NLL by less is the last, and is not kept.

    Raises BadInput for text of one example.

    """

    def __init__(
        self,
        model: nn.Module,
        windows: Sequence[Window],
        norms: Sequence[float],
        settings: MemorySettings,
        *,
        rows: Sequence[Tensor] | None = None,
        recipe: Recipe = RECOMMENDED,
        gradient: GradientSettings | None = None,
        rate: float = RATE,
        least_fall: float = LEAST_FALL,
        batch_size: int = 8,
    ) -> None:
        require_two_examples(windows)
        self._model, self._norms, self._settings = model, norms, settings
        self._rows, self._recipe = rows, recipe
        self._gradient = gradient or GradientSettings()
        self._rate, self._least_fall = rate, least_fall
        self._windows, self._batch_size = windows, batch_size
        self._device = next(model.parameters()).device

    def run(
        self,
        start: Boosted,
        rounds: int,
        progress: Progress,
        on_round: Callable[[Boosted], None],
    ) -> Outcome:
        """Rounds until there are `rounds`, or one lowers the leave-one-out NLL too little; that one is not kept.

        on_round: gets the memory after each; the kept one is among them, or `start`.
        """
        state, nll = start, start.nll[: start.rounds + 1] or (self._nll(None, progress, "plain"),)
        while True:
            last = state.rounds >= rounds
            what = f"after {state.rounds} rounds"
            if last:
                nll = (*nll, self._nll(state.layers, progress, what))
            else:
                left, layers = self.round(state.layers, progress, what)
                nll = (*nll, left)
            why = verdict(nll, self._least_fall)
            if why or last:
                # What hardly helps is not kept: it would still harm other text more.
                return Outcome(state.rounds - bool(why), nll, why or "as many as asked for")
            state = Boosted(layers, state.rounds + 1, nll)
            on_round(state)

    def _nll(self, layers: Sequence[Deltas] | None, progress: Progress, what: str) -> float:
        """Of the reference, with the plain model, or leave-one-out."""
        policy = None if layers is None else self._policy(layers)
        scores = score(
            *(self._model, self._windows, policy, progress),
            what=f"NLL, {what}",
            batch_size=self._batch_size,
            leave_one_out=policy is not None,
        )
        return scores.nll

    def _policy(self, layers: Sequence[Deltas]) -> RetrievalPolicy:
        return policy_of(held(layers, self._settings), layers[0].deltas.shape[1])

    def round(
        self, layers: Sequence[Deltas], progress: Progress, what: str
    ) -> tuple[float, list[Deltas]]:
        """One pass with the memory that `layers` are: its leave-one-out NLL, and the memory after one more round."""
        keys: list[list[Tensor]] = [[] for _ in layers]
        steps: list[list[Tensor]] = [[] for _ in layers]
        nll, tokens = 0.0, 0
        for traced in self._passes(layers, progress, what):
            nll += float(traced.nll.double().sum())
            tokens += len(traced.kept)
            for trace in traced.traces:
                layer = trace.site.layer
                keys[layer].append(trace.router_input.flatten(0, 1)[traced.kept].float())
                change = step(
                    trace.gradient, self._recipe, self._norms[layer], torch.Generator()
                ).flatten(0, 1)
                steps[layer].append(self._rate * change[traced.kept])
        return nll / tokens, [
            self._stepped(number, layer, torch.cat(keys[number]), torch.cat(steps[number]))
            for number, layer in enumerate(layers)
        ]

    def _passes(
        self, layers: Sequence[Deltas], progress: Progress, what: str
    ) -> Iterator[TracedWindows]:
        policy = self._policy(layers)
        groups = list(batched(self._windows, self._batch_size))
        for group in progress.track(groups, f"boosting, {what}", unit="batches"):
            batch = make_batch(group, self._device)
            with (
                policy.excluding([window.ref for window in batch.windows]),
                RouterHooks(self._model, policy),
            ):
                traced = traced_windows(self._model, batch, self._gradient)
            yield traced

    def _stepped(self, number: int, layer: Deltas, keys: Tensor, steps: Tensor) -> Deltas:
        if self._settings.layers and number not in self._settings.layers:
            return layer
        if self._rows is None:
            return Deltas(keys, layer.deltas + steps, layer.origins)
        there = (self._rows[number] >= 0).nonzero().flatten()
        rows = self._rows[number][there]
        return Deltas(
            layer.keys.index_copy(0, rows, keys[there]),
            layer.deltas.index_add(0, rows, steps[there]),
            layer.origins,
        )

"""Selective retrieval: signals that say beforehand whether a lookup is worth making; what they keep and save."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from model_runner.architectures import Assignment
from model_runner.experiments.arms import fitted_memory, preset_setting
from model_runner.experiments.local import LocalMemory
from model_runner.experiments.registry import Experiment
from model_runner.experiments.results import Row, change
from model_runner.experiments.study import Study
from model_runner.progress import Progress
from model_runner.router_hooks import Logits, RouterCall
from model_runner.scoring import losses, score
from model_runner.texts import Window

RATES = (0.25, 0.5, 0.75)
# Above every signal, and finite, for quantiles are taken.
_ALWAYS = 99.0


class Signal(Protocol):
    """How much a lookup is worth."""

    def begin(self, windows: Sequence[Window]) -> None:
        """Before these windows are scored."""

    def of(self, call: RouterCall) -> Tensor:
        """[T] of a layer's tokens, higher: look up. Asked once per layer, in order."""


@dataclass(slots=True)
class Chance:
    """The control: drawn anew for each layer."""

    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def begin(self, windows: Sequence[Window]) -> None:
        """As of Signal."""
        self.generator.manual_seed(len(windows))

    def of(self, call: RouterCall) -> Tensor:
        """As of Signal."""
        drawn = torch.rand(len(call.router_input), generator=self.generator)
        return drawn.to(call.router_input.device)


class Entropy:
    """Of the router's own distribution over experts."""

    def begin(self, windows: Sequence[Window]) -> None:
        """As of Signal."""

    def of(self, call: RouterCall) -> Tensor:
        """As of Signal."""
        log_p = call.router_logits.float().log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)


class Margin:
    """How little lies between the last expert that runs and the first that does not."""

    def begin(self, windows: Sequence[Window]) -> None:
        """As of Signal."""

    def of(self, call: RouterCall) -> Tensor:
        """As of Signal."""
        best = call.router_logits.float().topk(call.site.top_k + 1, dim=-1).values
        return best[:, -1] - best[:, -2]


@dataclass(slots=True)
class PreviousLoss:
    """The plain model's loss of the token itself, given those before it: known when it is routed."""

    study: Study
    _batches: list[Tensor] = field(default_factory=list)
    _current: Tensor = field(default_factory=lambda: torch.empty(0))

    def begin(self, windows: Sequence[Window]) -> None:
        """As of Signal."""
        scored = losses(
            *(self.study.loaded.model, windows, None, Progress(quiet=True)),
            what="plain",
            batch_size=self.study.sizes.batch_size,
        )
        # The loss of a token's successor, one place on; before the first nothing was predicted.
        self._batches = [nll.roll(1, dims=1) for _, nll in scored]
        for nll in self._batches:
            nll[:, 0] = _ALWAYS

    def of(self, call: RouterCall) -> Tensor:
        """As of Signal."""
        if call.site.layer == 0:
            self._current = self._batches.pop(0).flatten()
        return self._current


@dataclass(slots=True)
class FirstLambda:
    """Lambda of the first layer, which always looks up: whether the memory knows such text at all."""

    memory: LocalMemory
    _current: Tensor = field(default_factory=lambda: torch.empty(0))

    def begin(self, windows: Sequence[Window]) -> None:
        """As of Signal."""

    def of(self, call: RouterCall) -> Tensor:
        """As of Signal."""
        if call.site.layer > 0:
            return self._current
        similarity, _ = self.memory.neighbours(0, call.router_input.float())
        total = similarity.sum(1)
        self._current = total / (total + self.memory.setting.null_weight)
        return torch.full_like(self._current, _ALWAYS)


class GatedMemory:
    """A logit-delta memory that is asked only for tokens whose signal reaches the layer's threshold."""

    def __init__(self, memory: LocalMemory, signal: Signal, thresholds: Sequence[float]) -> None:
        self._memory, self._signal, self._thresholds = memory, signal, thresholds
        self.tokens = self.looked_up = 0

    def __call__(self, call: RouterCall) -> Assignment | Logits | None:
        """The memory's routing of those tokens, the model's own of the others."""
        asked = self._signal.of(call) >= self._thresholds[call.site.layer]
        rows = asked.nonzero().flatten()
        self.tokens += len(asked)
        self.looked_up += len(rows)
        part = replace(
            call,
            router_input=call.router_input[rows],
            router_logits=call.router_logits[rows],
            weights=call.weights[rows],
            experts=call.experts[rows],
            batch_shape=None,
            valid=None,
        )
        reply = self._memory(part) if len(rows) else None
        if not isinstance(reply, Logits):
            return None
        return Logits(
            call.router_logits.index_copy(0, rows, reply.router_logits.to(call.router_logits))
        )


def thresholds(study: Study, signal: Signal, rate: float) -> list[float]:
    """Per layer, so that this share of the dev text's tokens is looked up."""
    found: dict[int, list[Tensor]] = {}

    def note(call: RouterCall) -> None:
        found.setdefault(call.site.layer, []).append(signal.of(call))

    signal.begin(study.texts.dev)
    study.score(study.texts.dev, note, "signals")
    return [float(torch.cat(found[layer]).quantile(1 - rate)) for layer in sorted(found)]


def selective_rows(study: Study, _part: str) -> Iterator[Row]:
    """Every signal at every rate, and all lookups; seconds are of the process, with the model's own."""
    memory = fitted_memory(study, preset_setting("recommended"))
    signals: dict[str, Signal] = {
        "chance": Chance(),
        "router entropy": Entropy(),
        "router margin": Margin(),
        "previous token's loss": PreviousLoss(study),
        "first layer's lambda": FirstLambda(memory),
    }
    yield {
        "signal": "all",
        "rate": 1.0,
        **_gated(study, memory, Chance(), [-1.0] * len(memory.keys)),
    }
    for name, signal in signals.items():
        for rate in RATES:
            found = thresholds(study, signal, rate)
            yield {"signal": name, "rate": rate, **_gated(study, memory, signal, found)}


def _gated(study: Study, memory: LocalMemory, signal: Signal, found: Sequence[float]) -> Row:
    row: Row = {}
    for text, windows in (("domain", study.texts.test), ("general", study.texts.general_test)):
        gate = GatedMemory(memory, signal, found)
        signal.begin(windows)
        started = time.process_time()
        scores = score(
            *(study.loaded.model, windows, gate, Progress(quiet=True)),
            what=text,
            batch_size=study.sizes.batch_size,
        )
        elapsed = time.process_time() - started
        row[text] = change(scores, study.plain(windows), study.seed)
        row[f"{text}_looked_up"] = gate.looked_up / gate.tokens
        row[f"{text}_us_per_token"] = 1e6 * elapsed / scores.targets.sum()
    return row


EXPERIMENTS = (
    Experiment(
        "selective",
        "Does a cheap signal say when to retrieve, better than chance at the same rate, and what does it save?",
        selective_rows,
    ),
)

"""How a memory is best read when it must not harm: the largest gain under a bound on the harm to general text.

Two numbers trade gain for harm: lambda0, the similarity at the typical distance, from which bandwidths follow, and s0,
the weight of a logit-delta memory's null neighbour. Harm is the change of NLL of unlabelled general text against the
plain model; a setting is allowed when the upper bound of its confidence interval is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from knnmoe.v1.types_pb2 import MEMORY_KIND_LOGIT_DELTA, SIMILARITY_COSINE, MemorySettings
from torch import nn

from model_runner.errors import BadInput
from model_runner.evaluation.nll import Difference, difference
from model_runner.progress import Progress
from model_runner.replica.held import HeldMemory, policy_of
from model_runner.scoring import Scores, score
from model_runner.texts import Window

LAMBDAS = (0.1, 0.2, 0.3, 0.5, 0.7)
NULL_WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0)
# Standard errors to the upper bound of a one-sided interval of 95 %.
ONE_SIDED = 1.645


@dataclass(frozen=True, slots=True)
class Reading:
    """Two settings of a memory; null_weight None: its kind has none."""

    lambda0: float
    null_weight: float | None

    def settings(self, squared_distances: Sequence[float]) -> MemorySettings:
        """As they are stored; the typical squared distance of each layer."""
        gamma = [-math.log(self.lambda0) / distance for distance in squared_distances]
        return MemorySettings(gamma=gamma, null_weight=self.null_weight)

    def __str__(self) -> str:
        null = "" if self.null_weight is None else f", null weight {self.null_weight:g}"
        return f"lambda0 {self.lambda0:g}{null}"


@dataclass(frozen=True, slots=True)
class Trial:
    """What a setting does: changes of NLL per token of general text, and of the text that the memory is for."""

    reading: Reading
    harm: Difference
    gain: Difference | None = None

    @property
    def most_harm(self) -> float:
        """Upper bound of the harm, one-sided 95 %."""
        return self.harm.delta + ONE_SIDED * self.harm.se


def readings(settings: MemorySettings) -> list[list[Reading]]:
    """What there is to choose from: a row per lambda0, ascending; in it null weights, ascending. Raises BadInput."""
    if settings.similarity == SIMILARITY_COSINE:
        raise BadInput("a cosine memory has no bandwidth, so that its harm cannot be controlled")
    deltas = settings.kind == MEMORY_KIND_LOGIT_DELTA
    nulls: Sequence[float | None] = NULL_WEIGHTS if deltas else (None,)
    return [[Reading(lambda0, null) for null in nulls] for lambda0 in LAMBDAS]


@dataclass(frozen=True, slots=True)
class Measured:
    """Measures what settings of a memory do to two texts.

    Attributes:
        memory: as it is held beside the model.
        squared_distances: the typical one of each layer.
        general: windows of text that the memory is not for, of two documents or more.
        text: windows that it is for.
        leave_one_out: that text is the memory's own: no token finds its own example.

    """

    model: nn.Module
    memory: HeldMemory
    num_experts: int
    squared_distances: Sequence[float]
    general: Sequence[Window]
    text: Sequence[Window]
    leave_one_out: bool
    progress: Progress
    batch_size: int

    def harm(self, plain: Scores, reading: Reading) -> Difference:
        """To general text."""
        return difference(self._scores(self.general, reading, leave_one_out=False), plain)

    def gain(self, plain: Scores, reading: Reading) -> Difference:
        """On the text that the memory is for."""
        return difference(self._scores(self.text, reading, leave_one_out=self.leave_one_out), plain)

    def plain(self, windows: Sequence[Window], what: str) -> Scores:
        """Of the model without a memory."""
        size = self.batch_size
        return score(self.model, windows, None, self.progress, what=what, batch_size=size)

    def _scores(
        self, windows: Sequence[Window], reading: Reading, *, leave_one_out: bool
    ) -> Scores:
        settings = reading.settings(self.squared_distances)
        policy = policy_of(self.memory.read_with(settings), self.num_experts, "auto")
        return score(
            *(self.model, windows, policy, self.progress),
            what=str(reading),
            batch_size=self.batch_size,
            leave_one_out=leave_one_out,
        )


def allowed(
    rows: Sequence[Sequence[Reading]], most: float, harm: Callable[[Reading], Difference]
) -> tuple[list[Trial], list[Trial]]:
    """Of each lambda0 the least null weight whose harm is bounded by `most`; and what was measured and is not.

    Harm grows with lambda0 and falls with the null weight, so that a walk along the boundary sees all of it.
    """
    within, beyond, at = list[Trial](), list[Trial](), 0
    for row in rows:
        while at < len(row):
            trial = Trial(row[at], harm(row[at]))
            if trial.most_harm <= most:
                within.append(trial)
                break
            beyond.append(trial)
            at += 1
    return within, beyond


def best(
    rows: Sequence[Sequence[Reading]],
    within: Sequence[Trial],
    gain: Callable[[Reading], Difference],
    harm: Callable[[Reading], Difference],
) -> list[Trial]:
    """The allowed settings with their gains, best first; of the best also with more weight on the null neighbour."""
    tried = [replace(trial, gain=gain(trial.reading)) for trial in within]
    tried.sort(key=_change)
    [row] = [row for row in rows if tried[0].reading in row]
    for reading in row[row.index(tried[0].reading) + 1 :]:
        change = gain(reading)
        if change.delta >= _change(tried[0]):
            break
        tried.insert(0, Trial(reading, harm(reading), change))
    return tried


def _change(trial: Trial) -> float:
    return math.inf if trial.gain is None else trial.gain.delta


def least_harm(measured: Measured, most: float) -> list[Trial]:
    """Settings that harm general text by at most `most` nats per token, the largest gain first.

    Raises BadInput when none does, with the nearest; or general text of one document, which says no interval.
    """
    if len({window.ref for window in measured.general}) < 2:
        raise BadInput("general text: one document says no interval of the harm; give two or more")
    rows = readings(measured.memory.settings)
    harm = partial(measured.harm, measured.plain(measured.general, "general text, plain model"))
    within, beyond = allowed(rows, most, harm)
    if not within:
        nearest = min(beyond, key=lambda trial: trial.most_harm)
        raise BadInput(
            f"no setting keeps the harm to general text within {most:g}: the nearest, {nearest.reading}, changes its "
            f"NLL by {nearest.harm.delta:+.4f} ± {nearest.harm.se:.4f} (at most {nearest.most_harm:+.4f}, 95 %); "
            "nothing was changed. What helps: a larger bound, more general text (a narrower interval), fewer layers "
            "(router-admin memory set --layers)"
        )
    gain = partial(measured.gain, measured.plain(measured.text, "text, plain model"))
    return best(rows, within, gain, harm)

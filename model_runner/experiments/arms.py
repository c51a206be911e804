"""What is compared on a study: an arm is fitted to its reference, and scores windows; memories are the first arms."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from model_runner.experiments.local import LocalMemory, Setting, gammas_at, values_of
from model_runner.experiments.study import Study
from model_runner.memory_builder.null_entries import largest
from model_runner.memory_builder.recipes import PRESETS, RECOMMENDED_STEP_SIZE, Kind
from model_runner.scoring import Scores
from model_runner.texts import Window


@dataclass(frozen=True, slots=True)
class Budget:
    """What an arm costs.

    Attributes:
        fit_s: seconds to fit, calibration included.
        trained_parameters: numbers that were fitted by gradient; 0 for memories.
        peak_bytes: what it keeps beside the model while it is fitted or read: weights, gradients and states of the
            optimizer, or keys and values.
        s_per_token: seconds per scored token, beside nothing else; None when nothing was scored yet.

    """

    fit_s: float
    trained_parameters: int
    peak_bytes: int
    s_per_token: float | None = None


class Fitted(Protocol):
    """An arm that was fitted to a reference."""

    @property
    def budget(self) -> Budget:
        """What it took; s_per_token is that of the last scores."""

    @property
    def details(self) -> Mapping[str, object]:
        """The setting that was chosen on dev, and from which: for results. Empty where there was no choice."""

    def score(self, windows: Sequence[Window]) -> Scores:
        """Of windows, longest first, as model_runner.scoring.score gives them."""


class Arm(Protocol):
    """A method with its settings."""

    @property
    def name(self) -> str:
        """As tables and files have it."""

    def fit(self, study: Study) -> AbstractContextManager[Fitted]:
        """Within it the arm scores; the model is as before afterwards, bit for bit.

        Only texts.reference, dev and general_dev are read.
        """


# Of windows, longest first, as model_runner.scoring.score gives them.
Scorer = Callable[[Sequence[Window]], Scores]


@dataclass(slots=True)
class Timed:
    """A Fitted that scores with a function, and notes how long that takes; the numbers as of Budget."""

    scorer: Scorer
    fit_s: float
    peak_bytes: int = 0
    trained_parameters: int = 0
    details: Mapping[str, object] = field(default_factory=dict)
    s_per_token: float | None = None

    @property
    def budget(self) -> Budget:
        """As of Fitted."""
        return Budget(self.fit_s, self.trained_parameters, self.peak_bytes, self.s_per_token)

    def score(self, windows: Sequence[Window]) -> Scores:
        """As of Fitted."""
        started = time.perf_counter()
        scores = self.scorer(windows)
        self.s_per_token = (time.perf_counter() - started) / sum(len(w.token_ids) for w in windows)
        return scores


@dataclass(frozen=True, slots=True)
class MemoryArm:
    """A routing memory in RAM, searched exactly.

    Attributes:
        general: null entries stand for general text in it, as `build` puts them there.

    """

    name: str
    setting: Setting
    general: bool = False

    @contextmanager
    def fit(self, study: Study) -> Iterator[Fitted]:
        """As of Arm. The time is that of traces, values and calibration, also where the study had them already."""
        study.medians()
        made = ["traces", "medians"]
        if self.general:
            study.general_inputs()
            made.append("general inputs")
        started = time.perf_counter()
        memory = fitted_memory(study, self.setting)
        if self.general:
            memory = with_null_entries(study, memory)
        elapsed_s = study.made_s(*made) + time.perf_counter() - started
        yield Timed(partial(study.score, policy=memory, what=self.name), elapsed_s, memory.nbytes)


def fitted_memory(study: Study, setting: Setting) -> LocalMemory:
    """Of the study's reference; gamma by the dev text."""
    traces, recipe = study.traces(), setting.recipe
    if recipe in [preset.recipe for preset in PRESETS.values()]:  # many settings read these
        values = study.once(("values", recipe), lambda: values_of(traces, recipe))
    else:
        values = values_of(traces, recipe)
    return LocalMemory(traces.keys, values, gammas_at(study.medians(), setting.lambda0), setting)


def with_null_entries(study: Study, memory: LocalMemory, share: float = 1.0) -> LocalMemory:
    """The same, and entries without a change where it would change the routing of general text most.

    share: how many, of those that it has.
    """
    count = round(share * len(memory.keys[0]))
    keys = [
        inputs[largest(memory.change(layer, inputs), count)]
        for layer, inputs in enumerate(study.general_inputs())
    ]
    nothing = [v.new_zeros(len(k), v.shape[1]) for k, v in zip(keys, memory.values, strict=True)]
    return extended(study, memory, keys, nothing)


def extended(
    study: Study, memory: LocalMemory, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> LocalMemory:
    """The same with more entries: keys [m, d] and values [m, N] per layer; gamma by the dev text and all keys."""
    every = [torch.cat(pair) for pair in zip(memory.keys, keys, strict=True)]
    gammas = gammas_at(study.medians_to(every), memory.setting.lambda0)
    both = [torch.cat(pair) for pair in zip(memory.values, values, strict=True)]
    return LocalMemory(every, both, gammas, memory.setting)


def preset_setting(name: str, *, null_entries: bool = False) -> Setting:
    """How a memory of that preset is made and read."""
    preset = PRESETS[name]
    if preset.recipe.kind is Kind.LOGIT_DELTA:
        eta = preset.step_size if null_entries else RECOMMENDED_STEP_SIZE
        return Setting(preset.recipe, 32, preset.lambda0, eta)
    return Setting(preset.recipe, 1, preset.lambda0)


PAPER = MemoryArm("paper", preset_setting("paper"))
PAPER_V2 = MemoryArm("paper-v2", preset_setting("paper-v2"))
RECOMMENDED = MemoryArm(
    "recommended", preset_setting("recommended", null_entries=True), general=True
)
ALONE = MemoryArm("recommended-alone", preset_setting("recommended"))
# A longer step than the preset's: more gain, and harm.
LONGER = MemoryArm("recommended-3.5", replace(RECOMMENDED.setting, step_size=3.5), general=True)

"""Boosted memories as arms, and the experiment on rounds: what each gains, and how the memory is read after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from knnmoe.client import ExampleRef
from knnmoe.v1.types_pb2 import (
    MEMORY_KIND_LOGIT_DELTA,
    SIMILARITY_RBF,
    SUPPORT_UNION,
    MemorySettings,
)

from model_runner.experiments.arms import (
    Fitted,
    Timed,
    fitted_memory,
    preset_setting,
    with_null_entries,
)
from model_runner.experiments.local import LocalMemory, Setting
from model_runner.experiments.registry import Experiment
from model_runner.experiments.results import Row
from model_runner.experiments.study import Study
from model_runner.experiments.sweeps import changes
from model_runner.memory_builder.boosting import LEAST_FALL, Boosted, Booster, Deltas, Outcome
from model_runner.memory_builder.recipes import PRESETS, step_sizes

# s0 of the preset (router_service/memories/settings.py).
NULL_WEIGHT = 4.0
SETTING = replace(preset_setting("boosted"), null_weight=NULL_WEIGHT)


@dataclass(frozen=True, slots=True)
class Rounds:
    """What boosting gave: the memory after 0, 1, ... rounds, what it said, and the bandwidths of the first."""

    layers: list[Sequence[Deltas]]
    outcome: Outcome
    gammas: Sequence[float]

    @property
    def kept(self) -> Sequence[Deltas]:
        """Of the round that is kept."""
        return self.layers[self.outcome.rounds]


def boosted(
    study: Study, most: int, least_fall: float = LEAST_FALL, *, general: bool = False
) -> Rounds:
    """Boosts the study's reference for `most` rounds at most.

    least_fall: as of Booster; -inf: all of them. general: null entries stand for general text, and stay.
    """
    key = ("boosted", most, least_fall, general)
    return study.once(key, lambda: _boosted(study, most, least_fall, general))


def _boosted(study: Study, most: int, least_fall: float, general: bool) -> Rounds:
    traces = study.traces()
    memory = fitted_memory(study, SETTING)
    if general:
        memory = with_null_entries(study, memory)
    origins = [window.ref for window in traces.windows for _ in window.target_at]
    own = torch.arange(len(origins))
    origins += [_NOBODY] * (len(memory.keys[0]) - len(origins))
    first = [Deltas(k, u, origins) for k, u in zip(memory.keys, memory.values, strict=True)]
    booster = Booster(
        *(study.loaded.model, traces.windows, traces.norms()),
        wire_settings(SETTING, memory.gammas),
        rows=[own.to(k.device) for k in memory.keys],
        least_fall=least_fall,
        batch_size=study.sizes.batch_size,
    )
    layers: list[Sequence[Deltas]] = [first]
    outcome = booster.run(
        Boosted(first, 0, ()), most, study.progress, lambda state: layers.append(state.layers)
    )
    return Rounds(layers, outcome, memory.gammas)


def wire_settings(setting: Setting, gammas: Sequence[float]) -> MemorySettings:
    """Of a logit-delta memory, every field set."""
    return MemorySettings(
        kind=MEMORY_KIND_LOGIT_DELTA,
        similarity=SIMILARITY_RBF,
        neighbours=setting.neighbours,
        gamma=gammas,
        step_size=step_sizes(len(gammas), setting.step_size),
        null_weight=setting.null_weight,
        min_lambda=0.0,
        support=SUPPORT_UNION,
        layers=setting.layers or (),
    )


def memory_of(layers: Sequence[Deltas], gammas: Sequence[float], setting: Setting) -> LocalMemory:
    """Entries after some rounds, read with the bandwidths of the first: the deltas were fitted to them."""
    return LocalMemory([d.keys for d in layers], [d.deltas for d in layers], gammas, setting)


@dataclass(frozen=True, slots=True)
class BoostedArm:
    """An Arm: rounds over the reference until its leave-one-out NLL hardly falls.

    general: null entries stand for general text in it.
    """

    name: str = "boosted"
    general: bool = True
    setting: Setting = SETTING
    rounds: int = PRESETS["boosted"].rounds

    @contextmanager
    def fit(self, study: Study) -> Iterator[Fitted]:
        """As of Arm."""
        found = boosted(study, self.rounds, general=self.general)
        memory = memory_of(found.kept, found.gammas, self.setting)
        # The time of what a round asks for first is in it.
        fit_s = study.made_s("traces", ("boosted", self.rounds, LEAST_FALL, self.general))
        yield Timed(partial(study.score, policy=memory, what=self.name), fit_s, 2 * memory.nbytes)


BOOSTED = BoostedArm()
BOOSTED_ALONE = BoostedArm("boosted-alone", general=False)
# Of null entries in rounds: no example of the reference.
_NOBODY = ExampleRef("", "")
_NEVER_STOPS = float("-inf")
_NULL_WEIGHTS = (2.0, 4.0, 8.0)


def round_rows(study: Study, _part: str) -> Iterator[Row]:
    """Every round on dev, with each null weight; the round that the stopping rule keeps on test, and the first."""
    most = PRESETS["boosted"].rounds
    every = boosted(study, most, _NEVER_STOPS, general=True)
    kept = boosted(study, most, general=True).outcome.rounds
    for rounds, layers in enumerate(every.layers):
        for null_weight in _NULL_WEIGHTS if rounds in (0, kept, most) else (NULL_WEIGHT,):
            setting = replace(SETTING, null_weight=null_weight)
            memory = memory_of(layers, every.gammas, setting)
            names: Row = {"rounds": rounds, "null_weight": null_weight, "kept": rounds == kept}
            names["left_out_nll"] = every.outcome.nll[rounds + 1]
            yield {**names, **changes(study, memory, "dev", f"round {rounds}")}
            if rounds in (0, kept, most):
                yield {**names, **changes(study, memory, "test", f"round {rounds}")}


def layer_rows(study: Study, _part: str) -> Iterator[Row]:
    """The boosted memory read at one layer, and at all but one."""
    found = boosted(study, BOOSTED.rounds, general=True)
    layers = found.kept
    numbers = range(len(layers))
    chosen: dict[str, tuple[int, ...]] = {"all": tuple(numbers)}
    chosen |= {f"only {n}": (n,) for n in numbers}
    chosen |= {f"all but {n}": tuple(m for m in numbers if m != n) for n in numbers}
    for name, read in chosen.items():
        memory = memory_of(layers, found.gammas, replace(SETTING, layers=read))
        yield {"layers": name, **changes(study, memory, "test", name)}


EXPERIMENTS = (
    Experiment(
        "rounds",
        "What does each boosting round gain and harm, and does the leave-one-out NLL say when to stop?",
        round_rows,
    ),
    Experiment("boosted-layers", "In which layers is the gain of a boosted memory?", layer_rows),
)

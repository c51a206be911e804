"""The baselines of the report: every other use of the same reference, with settings chosen on the same dev texts.

Each method stands twice: at its largest gain on dev (`knn-lm`), and at its largest gain that costs general dev text at
most 0.01 nats per token (`knn-lm-safe`). Controls break a memory on purpose; the oracle sees the answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from model_runner.evaluation.demo import ORACLE_STEP_SIZE
from model_runner.evaluation.nll import oracle_scores
from model_runner.experiments.arms import (
    Arm,
    Fitted,
    MemoryArm,
    Timed,
    fitted_memory,
    preset_setting,
    with_null_entries,
)
from model_runner.experiments.c3po import VARIANTS, C3po
from model_runner.experiments.choosing import SAFE, Baseline, Candidate, Method
from model_runner.experiments.fine_tuning import FULL, LAST_ROUTER, LORA, ROUTERS
from model_runner.experiments.in_context import FewShot
from model_runner.experiments.knn_lm import KnnLm
from model_runner.experiments.study import Study
from model_runner.memory_builder.recipes import PAPER, Direction
from model_runner.scoring import Scores
from model_runner.texts import Window

ORACLE_STEPS = (3.0, 10.0, ORACLE_STEP_SIZE)
LAMBDAS = (0.3, 0.5, 0.7)
STEPS = (2.25, 3.0, 4.0)


@dataclass(frozen=True, slots=True)
class ZeroShot:
    """An Arm: the model as it is."""

    name: str = "zero-shot"

    @contextmanager
    def fit(self, study: Study) -> Iterator[Fitted]:
        """As of Arm."""
        yield Timed(partial(study.score, policy=None, what=self.name), 0.0)


@dataclass(frozen=True, slots=True)
class Oracle:
    """A Method: each token's own optimised assignment, which knows the answer; its step is chosen on dev."""

    name: str = "oracle"

    def candidates(self, study: Study) -> Iterator[Candidate]:
        """As of Method."""
        for step in ORACLE_STEPS:
            yield Candidate({"step": step}, partial(_oracle_scores, study, step))


def _oracle_scores(study: Study, step: float, windows: Sequence[Window]) -> Scores:
    recipe = replace(PAPER, step_size=step)
    how = {"batch_size": study.sizes.batch_size}
    return oracle_scores(study.loaded.model, windows, recipe, study.progress, **how)


@dataclass(frozen=True, slots=True)
class TunedMemory:
    """A Method: the recommended memory, with lambda0 and step by the rule that the baselines have."""

    name: str = "recommended-tuned"

    def candidates(self, study: Study) -> Iterator[Candidate]:
        """As of Method."""
        for lambda0, step in itertools.product(LAMBDAS, STEPS):
            setting = replace(preset_setting("recommended"), lambda0=lambda0, step_size=step)
            memory = with_null_entries(study, fitted_memory(study, setting))
            score = partial(study.score, policy=memory, what=self.name)
            made_s = study.made_s("traces", "medians", "general inputs", ("values", setting.recipe))
            chosen = {"lambda0": lambda0, "step": step}
            yield Candidate(chosen, score, peak_bytes=memory.nbytes, fit_s=made_s)


def controls(preset: str = "recommended") -> tuple[Arm, ...]:
    """A preset's memory with random, shuffled and negated values."""
    setting = preset_setting(preset)
    altered = {
        "random": replace(setting.recipe, direction=Direction.RANDOM),
        "shuffled": replace(setting.recipe, shuffled=True),
        "negated": replace(setting.recipe, direction=Direction.ASCENT),
    }
    return tuple(
        MemoryArm(f"control-{name}", replace(setting, recipe=recipe))
        for name, recipe in altered.items()
    )


METHODS: tuple[Method, ...] = (
    FewShot(),
    ROUTERS,
    LAST_ROUTER,
    LORA,
    FULL,
    KnnLm(),
    C3po("c3po-tuned", VARIANTS),
    TunedMemory(),
)


def baselines(methods: Sequence[Method] = METHODS) -> tuple[Arm, ...]:
    """All rows, in the report's order."""
    rows: list[Arm] = [ZeroShot()]
    for method in methods:
        rows += [Baseline(method.name, method), Baseline(f"{method.name}-safe", method, SAFE)]
    as_released = C3po()
    oracle = Oracle()
    return (
        *rows,
        Baseline(as_released.name, as_released),
        *controls(),
        Baseline(oracle.name, oracle),
    )

"""`main`: every method on the same reference and the same held-out windows, with what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from model_runner.experiments.arms import ALONE, LONGER, PAPER, PAPER_V2, RECOMMENDED, Arm
from model_runner.experiments.baselines import baselines
from model_runner.experiments.boosted import BOOSTED, BOOSTED_ALONE
from model_runner.experiments.distilled import DISTILLED
from model_runner.experiments.metric import METRIC
from model_runner.experiments.registry import Experiment
from model_runner.experiments.results import Row, change
from model_runner.experiments.study import Study


def arms() -> dict[str, Arm]:
    """By name, in the order of the table."""
    memories: list[Arm] = [PAPER, PAPER_V2, ALONE, RECOMMENDED, LONGER, BOOSTED_ALONE, BOOSTED]
    found: list[Arm] = [*memories, DISTILLED, METRIC, *baselines()]
    return {arm.name: arm for arm in found}


def main_rows(study: Study, part: str) -> Iterator[Row]:
    """One row: the arm's changes on the test texts, and its budget."""
    with arms()[part].fit(study) as fitted:
        texts = {"domain": study.texts.test, "general": study.texts.general_test}
        changes = {
            name: change(fitted.score(windows), study.plain(windows), study.seed)
            for name, windows in texts.items()
        }
        chosen = {"chosen": fitted.details} if fitted.details else {}
        yield {"arm": part, **changes, "budget": asdict(fitted.budget), **chosen}


EXPERIMENTS = (
    Experiment(
        "main",
        "What does each method gain on the domain, and what does it harm elsewhere, at what cost?",
        main_rows,
        tuple(arms()),
    ),
)

"""The experiments by name, and their run: study after study, each result on disk as soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from model_runner.errors import BadInput
from model_runner.experiments.results import ONLY_PART, Result, Row, result_name, write_result
from model_runner.experiments.study import Sizes, Study, model_name, open_study
from model_runner.models import LoadedModel, load_model
from model_runner.progress import Progress


@dataclass(frozen=True, slots=True)
class Experiment:
    """One question.

    Attributes:
        answers: the question.
        rows: of a study and a part.
        parts: each has a file of its own.

    """

    name: str
    answers: str
    rows: Callable[[Study, str], Iterable[Row]]
    parts: tuple[str, ...] = (ONLY_PART,)


def experiments() -> dict[str, Experiment]:
    """All, by name, in the order in which `all` runs them."""
    from model_runner.experiments import (
        behaviour,
        boosted,
        choice,
        main_table,
        memories,
        references,
        selective,
        sweeps,
        together,
    )

    modules = (
        main_table,
        sweeps,
        memories,
        behaviour,
        selective,
        references,
        boosted,
        together,
        choice,
    )
    return {each.name: each for module in modules for each in module.EXPERIMENTS}


def named(name: str) -> list[Experiment]:
    """One, or `all`. Raises BadInput."""
    known = experiments()
    if name == "all":
        return list(known.values())
    if name not in known:
        raise BadInput(f"experiment {name!r}: expected all, report, {', '.join(known)}")
    return [known[name]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run, and where results go.

    Attributes:
        parts: only these of experiments that have several; none: all.

    """

    chosen: Sequence[Experiment]
    model: str
    domains: Sequence[str]
    seeds: Sequence[int]
    out: Path
    data: Path | None
    sizes: Sizes
    options: str = ""
    parts: Sequence[str] = ()


def run(plan: Plan, progress: Progress) -> int:
    """Runs what has no result yet; returns how many results were written.

    A run that was interrupted goes on with the first one that is missing. Raises BadInput, RunnerError.
    """
    known = {part for each in plan.chosen for part in each.parts}
    if unknown := set(plan.parts) - known:
        raise BadInput(f"part {min(unknown)!r}: expected one of {', '.join(sorted(known))}")
    written, loaded = 0, list[LoadedModel]()
    for domain in plan.domains:
        for seed in plan.seeds:
            missing = _missing(plan, domain, seed)
            if not missing:
                continue
            loaded = loaded or [load_model(plan.model)]
            opened = partial(open_study, data=plan.data, sizes=plan.sizes)
            study = opened(loaded[0], domain, seed, progress)
            for experiment, part in missing:
                write_result(plan.out, _result(plan, experiment, part, study))
                written += 1
    return written


def _missing(plan: Plan, domain: str, seed: int) -> list[tuple[Experiment, str]]:
    study = f"{model_name(plan.model)}-{domain}-seed{seed}"
    return [
        (experiment, part)
        for experiment in plan.chosen
        for part in experiment.parts
        if not plan.parts or experiment.parts == (ONLY_PART,) or part in plan.parts
        if not (plan.out / experiment.name / result_name(study, part)).exists()
    ]


def _result(plan: Plan, experiment: Experiment, part: str, study: Study) -> Result:
    of = "" if part == ONLY_PART else f", {part}"
    where = f"{study.model}, {study.texts.domain}, seed {study.seed}"
    study.progress.say(f"{experiment.name} ({where}{of})")
    started = time.perf_counter()
    rows = list(experiment.rows(study, part))
    return Result(
        experiment.name,
        study.model,
        study.texts.domain,
        study.seed,
        part,
        command_of(plan, experiment.name, study),
        asdict(study.sizes),
        round(time.perf_counter() - started, 1),
        rows,
    )


def command_of(plan: Plan, name: str, study: Study) -> str:
    """As a reader would type it: names in the place of this machine's paths."""
    data = "" if plan.data is None else f" --data DIR --domain {study.texts.domain}"
    model = "" if study.model == "small_moe" else f" --model {study.model}"
    return f"model-runner experiment {name}{model}{data} --seeds {study.seed}{plan.options}"

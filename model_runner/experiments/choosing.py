"""Settings of baselines, chosen on the dev texts by one rule: the largest gain, of those whose harm is within a bound.

A method gives candidates one after the other; the best one is kept, scored on what is reported, and its cost with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from model_runner.evaluation.nll import difference
from model_runner.experiments.arms import Fitted, Scorer, Timed
from model_runner.experiments.study import Study

Setting = Mapping[str, float | int | str]


@dataclass(frozen=True, slots=True)
class Rule:
    """The largest gain on dev text of the domain.

    Attributes:
        most_harm: of candidates whose harm to general dev text is at most so many nats per token, one standard error
            added, and of leaving the model as it is; None: of all candidates.

    """

    most_harm: float | None = None

    def allows(self, trial: Trial) -> bool:
        """Whether it may be chosen."""
        if self.most_harm is None:
            return True
        return trial.gain < 0 and trial.harm + trial.harm_se <= self.most_harm


BEST = Rule()
SAFE = Rule(most_harm=0.01)
RULES = (BEST, SAFE)


@dataclass(frozen=True, slots=True)
class Trial:
    """A setting on the dev texts: changes of NLL in nats per token, negative is better.

    Attributes:
        gain: on text of the domain.
        harm: on general text.
        harm_se: its standard error.

    """

    setting: Setting
    gain: float
    harm: float
    harm_se: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A method with one setting.

    Attributes:
        score: of windows, until the next candidate is asked for.
        kept: called meanwhile; gives what makes a scorer of it again, for the time of a context. None: `score` stays
            as it is.
        trained_parameters, peak_bytes: as of Budget.
        fit_s: seconds that this candidate alone took to be made.

    """

    setting: Setting
    score: Scorer
    kept: Callable[[], Callable[[], AbstractContextManager[Scorer]]] | None = None
    trained_parameters: int = 0
    peak_bytes: int = 0
    fit_s: float = 0.0


class Method(Protocol):
    """What makes candidates of a study."""

    @property
    def name(self) -> str:
        """What rows of it are called."""

    def candidates(self, study: Study) -> Iterator[Candidate]:
        """Only texts.reference, dev and general_dev are read; the model is as before when the iterator ends."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The candidate that a rule chose."""

    trial: Trial
    again: Callable[[], AbstractContextManager[Scorer]]
    candidate: Candidate


@dataclass(frozen=True, slots=True)
class Sweep:
    """All trials of a method, what each of RULES chose, and the time that it took."""

    trials: tuple[Trial, ...]
    choices: Mapping[Rule, Choice]
    elapsed_s: float


def swept(study: Study, method: Method) -> Sweep:
    """Tries all candidates; made once per study."""
    return study.once(("sweep", method), lambda: _sweep(study, method))


def _sweep(study: Study, method: Method) -> Sweep:
    for windows in (study.texts.dev, study.texts.general_dev):
        study.plain(windows)  # before a method changes the model
    started = time.perf_counter()
    trials, choices = list[Trial](), dict[Rule, Choice]()
    for candidate in method.candidates(study):
        trial = judged(study, candidate)
        study.progress.say(
            f"{method.name} {dict(trial.setting)}: dev {trial.gain:+.4f}, general {trial.harm:+.4f}"
        )
        trials.append(trial)
        better = [
            rule
            for rule in RULES
            if rule.allows(trial) and (rule not in choices or trial.gain < choices[rule].trial.gain)
        ]
        if better:
            choices |= dict.fromkeys(better, _choice(trial, candidate))
    return Sweep(tuple(trials), choices, time.perf_counter() - started)


def _choice(trial: Trial, candidate: Candidate) -> Choice:
    if candidate.kept is not None:
        return Choice(trial, candidate.kept(), candidate)
    return Choice(trial, lambda: nullcontext(candidate.score), candidate)


def judged(study: Study, candidate: Candidate) -> Trial:
    """A candidate on the dev texts."""
    dev, general = study.texts.dev, study.texts.general_dev
    gain = difference(candidate.score(dev), study.plain(dev))
    harm = difference(candidate.score(general), study.plain(general))
    return Trial(candidate.setting, gain.delta, harm.delta, harm.se)


@dataclass(frozen=True, slots=True)
class Baseline:
    """An Arm: a method, and the rule that chooses its setting."""

    name: str
    method: Method
    rule: Rule = BEST

    @contextmanager
    def fit(self, study: Study) -> Iterator[Fitted]:
        """As of Arm. The time is that of the whole sweep."""
        texts = study.texts
        for windows in (texts.test, texts.general_test):
            study.plain(windows)  # within the context the model may be another
        sweep = swept(study, self.method)
        choice = sweep.choices.get(self.rule)
        details = _details(sweep, self.rule)
        if choice is None:
            yield Timed(study.plain, sweep.elapsed_s, details=details)
            return
        with choice.again() as scorer:
            one = choice.candidate
            yield Timed(scorer, sweep.elapsed_s, one.peak_bytes, one.trained_parameters, details)


def _details(sweep: Sweep, rule: Rule) -> dict[str, object]:
    choice = sweep.choices.get(rule)
    return {
        "most_harm": rule.most_harm,
        "setting": None if choice is None else dict(choice.trial.setting),
        "fit_once_s": None if choice is None else choice.candidate.fit_s,
        "trials": [
            {"setting": dict(t.setting), "gain": t.gain, "harm": t.harm, "harm_se": t.harm_se}
            for t in sweep.trials
        ],
    }

"""Multiple choice: which of four continuations follows; McNemar's test against the plain model, per seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from model_runner.experiments.main_table import arms
from model_runner.experiments.registry import Experiment
from model_runner.experiments.results import Row
from model_runner.experiments.study import Study, draw
from model_runner.scoring import Scores
from model_runner.texts import Window

CHOICES = 4
# Tokens that are read, and that are chosen between.
_CONTEXT, _CONTINUATION = 24, 8
# Arms of the main table that are asked.
ASKED = ("paper", "paper-v2", "recommended", "boosted")


def questions(windows: Sequence[Window], seed: int) -> list[list[Window]]:
    """Per window: CHOICES windows, the true one first, of which only the continuation counts."""
    rng, found = random.Random(f"{seed}/choices"), []
    for window in windows:
        context = window.token_ids[:_CONTEXT]
        ends = {window.token_ids[_CONTEXT:]: None}
        while len(ends) < CHOICES:
            ends.setdefault(rng.choice(windows).token_ids[_CONTEXT:])
        counted = tuple(range(_CONTEXT, _CONTEXT + _CONTINUATION))
        found.append([replace(window, token_ids=context + end, target_at=counted) for end in ends])
    return found


def is_right(scores: Scores) -> NDArray[np.bool_]:
    """[n] whether the true continuation is the likeliest; scores: of the windows of questions(), in their order."""
    return scores.nll_sums.reshape(-1, CHOICES).argmin(axis=1) == 0


def mcnemar(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[int, int, float]:
    """Questions that only `after`, and that only `before` has right, and the exact two-sided p."""
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    n, least = gained + lost, min(gained, lost)
    log_half = n * math.log(2)
    tail = sum(math.exp(_log_choose(n, k) - log_half) for k in range(least + 1))
    return gained, lost, min(1.0, 2 * tail)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def choice_rows(study: Study, part: str) -> Iterator[Row]:
    """One arm's accuracy on the test split of the domain."""
    windows = draw(
        study.loaded,
        study.texts.domain,
        "test",
        seed=study.seed,
        count=study.sizes.questions,
        data=study.data,
        length=_CONTEXT + _CONTINUATION,
    )
    asked = [window for each in questions(windows, study.seed) for window in each]
    before = is_right(study.plain(asked))
    with arms()[part].fit(study) as fitted:
        after = is_right(fitted.score(asked))
    gained, lost, p = mcnemar(before, after)
    n, shift = len(after), float(after.mean() - before.mean())
    yield {
        "arm": part,
        "questions": n,
        "documents": len({w.ref for w in windows}),
        "plain": float(before.mean()),
        "accuracy": float(after.mean()),
        "change": shift,
        "se": math.sqrt(max(0.0, (gained + lost) / n - shift**2) / n),
        "gained": gained,
        "lost": lost,
        "p": p,
    }


EXPERIMENTS = (
    Experiment(
        "choice",
        "Does the gain in likelihood choose the right one of four continuations more often?",
        choice_rows,
        tuple(name for name in ASKED if name in arms()),
    ),
)

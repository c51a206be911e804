"""Paired differences of scores, against brute force."""

from __future__ import annotations

import math
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from knnmoe.client import ExampleRef

from model_runner.errors import BadInput
from model_runner.evaluation.nll import bootstrap_interval, difference
from model_runner.scoring import Scores


def scores_of(sums: list[float], targets: list[float], examples: list[int]) -> Scores:
    refs = tuple(ExampleRef("s", str(number)) for number in examples)
    return Scores(np.array(sums), np.array(targets), refs)


# (loss, baseline's loss, targets, example) of each window
PAIRS = st.lists(
    st.tuples(st.floats(0, 50), st.floats(0, 50), st.integers(1, 20).map(float), st.integers(0, 4)),
    min_size=1,
    max_size=12,
)


@given(PAIRS)
def test_difference_and_its_error_by_hand(pairs: list[tuple[float, float, float, int]]) -> None:
    scores = scores_of([p[0] for p in pairs], [p[2] for p in pairs], [p[3] for p in pairs])
    baseline = scores_of([p[1] for p in pairs], [p[2] for p in pairs], [p[3] for p in pairs])
    found = difference(scores, baseline)
    tokens = sum(p[2] for p in pairs)
    delta = sum(p[0] - p[1] for p in pairs) / tokens
    assert found.delta == pytest.approx(delta, abs=1e-9)
    assert found.windows == len(pairs)
    residuals = [
        sum(p[0] - p[1] - delta * p[2] for p in group)
        for _, group in groupby(sorted(pairs, key=lambda p: p[3]), key=lambda p: p[3])
    ]
    clusters = len(residuals)
    if clusters == 1:
        assert math.isnan(found.se)
    else:
        variance = sum(r * r for r in residuals) * clusters / (clusters - 1) / tokens**2
        assert found.se == pytest.approx(math.sqrt(variance), abs=1e-7)


def test_windows_of_equal_length_have_the_standard_error_of_a_mean() -> None:
    rng = np.random.default_rng(0)
    changes = rng.normal(-1.0, 2.0, 30)
    scores = scores_of(list(50 + changes), [8.0] * 30, list(range(30)))
    found = difference(scores, scores_of([50.0] * 30, [8.0] * 30, list(range(30))))
    assert found.delta == pytest.approx(changes.mean() / 8)
    assert found.se == pytest.approx(changes.std(ddof=1) / math.sqrt(30) / 8)


def test_windows_of_one_example_count_as_one() -> None:
    """Twice the same windows in the same examples is no new evidence; in new examples it is."""
    sums, targets, examples = [3.0, 1.0, 5.0, 2.0], [1.0] * 4, [0, 1, 2, 3]
    once = difference(scores_of(sums, targets, examples), scores_of([0.0] * 4, targets, examples))
    cloned = difference(
        scores_of(sums * 2, targets * 2, examples * 2),
        scores_of([0.0] * 8, targets * 2, examples * 2),
    )
    assert (cloned.delta, cloned.se) == (once.delta, pytest.approx(once.se))
    fresh = [*examples, 4, 5, 6, 7]
    more = difference(
        scores_of(sums * 2, targets * 2, fresh), scores_of([0.0] * 8, targets * 2, fresh)
    )
    assert more.se < 0.8 * once.se


def test_bootstrap_interval_covers() -> None:
    """In about 95 of 100 draws of 40 examples, each of 3 windows that share an effect."""
    rng = np.random.default_rng(3)
    examples = [number for number in range(40) for _ in range(3)]
    covered = 0
    for draw in range(200):
        shared = np.repeat(rng.normal(0, 1, 40), 3)
        changes = -0.5 * 10 + shared + rng.normal(0, 1, 120)
        scores = scores_of(list(changes), [10.0] * 120, examples)
        baseline = scores_of([0.0] * 120, [10.0] * 120, examples)
        low, high = bootstrap_interval(scores, baseline, seed=draw, draws=400)
        covered += low <= -0.5 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_bootstrap_interval_is_seeded_and_holds_the_difference() -> None:
    rng = np.random.default_rng(0)
    scores = scores_of(list(rng.normal(5, 1, 20)), [4.0] * 20, list(range(20)))
    baseline = scores_of([5.0] * 20, [4.0] * 20, list(range(20)))
    low, high = bootstrap_interval(scores, baseline, seed=1)
    assert (low, high) == bootstrap_interval(scores, baseline, seed=1)
    assert (low, high) != bootstrap_interval(scores, baseline, seed=2)
    assert low < difference(scores, baseline).delta < high


def test_one_example_has_no_interval() -> None:
    scores = scores_of([1.0, 2.0], [1.0, 1.0], [0, 0])
    assert all(math.isnan(end) for end in bootstrap_interval(scores, scores, seed=0))


@pytest.mark.parametrize(
    "other",
    [
        scores_of([1.0, 1.0], [2.0, 2.0], [0, 2]),
        scores_of([1.0, 1.0], [2.0, 3.0], [0, 1]),
        scores_of([1.0, 1.0], [2.0, 2.0], [1, 0]),
        scores_of([1.0], [2.0], [0]),
    ],
)
def test_scores_of_other_windows_are_not_compared(other: Scores) -> None:
    scores = scores_of([1.0, 1.0], [2.0, 2.0], [0, 1])
    with pytest.raises(BadInput, match="same windows"):
        difference(scores, other)
    with pytest.raises(BadInput, match="same windows"):
        bootstrap_interval(scores, other, seed=0)

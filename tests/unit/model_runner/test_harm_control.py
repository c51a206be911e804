"""Which settings are allowed under a bound on harm, and which of them is best: over made-up harms and gains."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from knnmoe.v1.types_pb2 import (
    MEMORY_KIND_ASSIGNMENT,
    MEMORY_KIND_LOGIT_DELTA,
    SIMILARITY_COSINE,
    MemorySettings,
)

from model_runner.errors import BadInput
from model_runner.evaluation.harm_control import (
    LAMBDAS,
    NULL_WEIGHTS,
    ONE_SIDED,
    Reading,
    allowed,
    best,
    readings,
)
from model_runner.evaluation.nll import Difference

DELTAS = MemorySettings(kind=MEMORY_KIND_LOGIT_DELTA)
SE = 0.001


def trust(reading: Reading) -> float:
    """How much the memory speaks."""
    return reading.lambda0 / (1 + (reading.null_weight or 0.0))


def harm(reading: Reading) -> Difference:
    return Difference(0.02 * trust(reading), SE, 10)


def counted(of: Callable[[Reading], Difference]) -> tuple[list[Reading], Callable[..., Difference]]:
    seen = list[Reading]()

    def measure(reading: Reading) -> Difference:
        seen.append(reading)
        return of(reading)

    return seen, measure


@pytest.mark.parametrize("most", [0.0018, 0.004, 0.008, 0.1])
def test_the_walk_finds_of_each_lambda0_the_least_null_weight(most: float) -> None:
    seen, measure = counted(harm)
    within, beyond = allowed(readings(DELTAS), most, measure)
    expected = {}
    for lambda0 in LAMBDAS:
        for null in NULL_WEIGHTS:
            reading = Reading(lambda0, null)
            if harm(reading).delta + ONE_SIDED * SE <= most and lambda0 not in expected:
                expected[lambda0] = reading
    assert [trial.reading for trial in within] == list(expected.values())
    assert len(seen) == len(set(seen)) < len(LAMBDAS) + len(NULL_WEIGHTS)
    assert {trial.reading for trial in (*within, *beyond)} == set(seen)
    assert all(trial.most_harm > most for trial in beyond)


def test_nothing_is_allowed_where_all_harm_too_much() -> None:
    within, beyond = allowed(readings(DELTAS), 0.0, harm)
    assert not within
    assert len(beyond) == len(NULL_WEIGHTS)


def test_the_best_gains_most() -> None:
    rows = readings(DELTAS)
    within, _ = allowed(rows, 0.008, harm)
    tried = best(rows, within, lambda reading: Difference(-trust(reading), SE, 10), harm)
    assert [trial.reading for trial in tried] == sorted(
        (trial.reading for trial in within), key=trust, reverse=True
    )


def test_more_weight_on_the_null_neighbour_where_that_gains() -> None:
    rows = readings(DELTAS)
    within, _ = allowed(rows, 1.0, harm)  # all are, so that each has the least weight

    def gain(reading: Reading) -> Difference:
        null = reading.null_weight or 0.0
        return Difference((null - 1) ** 2 + (reading.lambda0 - 0.5) ** 2, SE, 10)

    tried = best(rows, within, gain, harm)
    assert tried[0].reading == Reading(0.5, 1.0)
    assert tried[0].harm == harm(tried[0].reading)


def test_other_kinds_have_bandwidths_only() -> None:
    rows = readings(MemorySettings(kind=MEMORY_KIND_ASSIGNMENT))
    assert rows == [[Reading(lambda0, None)] for lambda0 in LAMBDAS]
    settings = rows[0][0].settings([2.0, 4.0])
    assert not settings.HasField("null_weight")
    assert settings.gamma[0] == 2 * settings.gamma[1]
    with pytest.raises(BadInput, match="no bandwidth"):
        readings(MemorySettings(similarity=SIMILARITY_COSINE))

"""Which settings are allowed under a bound on harm, and which of them is best: over made-up harms and gains."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from knnmoe.client import ExampleRef
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
    Measured,
    Reading,
    allowed,
    best,
    least_harm,
    readings,
)
from model_runner.evaluation.nll import Difference, difference
from model_runner.progress import Progress
from model_runner.replica.held import HeldMemory, policy_of
from model_runner.scoring import score
from model_runner.texts import Window
from tests.families import VOCABULARY, tiny_model

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


def windows(name: str, documents: int) -> list[Window]:
    draw = random.Random(name)
    found = []
    for number in range(documents):
        ids = tuple(draw.randrange(3, VOCABULARY) for _ in range(8))
        found.append(Window(ExampleRef(name, str(number)), ids, tuple(range(1, 8)), 0))
    return found


@pytest.fixture
def measured() -> Measured:
    """A tiny random model, and a memory that says the same everywhere."""
    model = tiny_model("olmoe").requires_grad_(False)
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    experts = model.config.num_experts
    generator = torch.Generator().manual_seed(0)
    settings = MemorySettings(
        kind=MEMORY_KIND_LOGIT_DELTA,
        neighbours=4,
        gamma=[1.0],
        step_size=[2.0],
        null_weight=0.5,
        min_lambda=0.0,
    )
    memory = HeldMemory.of(
        [torch.randn(12, hidden, generator=generator) for _ in range(layers)],
        [torch.randn(1, experts, generator=generator).expand(12, -1) for _ in range(layers)],
        [[ExampleRef("text", str(n)) for n in range(12)]] * layers,
        settings,
    )
    return Measured(
        *(model, memory, experts, [float(hidden)] * layers),
        *(windows("general", 4), windows("text", 4), False, Progress(quiet=True), 4),
    )


def test_trials_are_scores_of_the_memory_as_it_would_be_read(measured: Measured) -> None:
    chosen = least_harm(measured, 9.0)[0]
    settings = chosen.reading.settings(measured.squared_distances)
    policy = policy_of(measured.memory.read_with(settings), measured.num_experts, "auto")
    for windows_, expected in ((measured.general, chosen.harm), (measured.text, chosen.gain)):
        plain, routed = (
            score(measured.model, windows_, each, measured.progress, what="", batch_size=4)
            for each in (None, policy)
        )
        assert difference(routed, plain) == expected
    assert settings.null_weight in NULL_WEIGHTS


def test_it_refuses_and_says_the_nearest(measured: Measured) -> None:
    with pytest.raises(
        BadInput, match=r"within -9: the nearest, lambda0 0\.1, null weight .* 95 %"
    ):
        least_harm(measured, -9.0)
    with pytest.raises(BadInput, match="one document says no interval"):
        least_harm(replace(measured, general=measured.general[:1]), 9.0)

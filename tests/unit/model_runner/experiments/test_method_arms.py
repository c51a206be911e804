"""Boosted memories, distilled networks and a learned metric, on a tiny random model: they score, and leave no trace."""

from __future__ import annotations

import math
import random

import pytest
import torch
from knnmoe.client import ExampleRef

from model_runner.experiments.arms import Arm
from model_runner.experiments.boosted import (
    SETTING,
    BoostedArm,
    boosted,
    memory_of,
    round_rows,
    wire_settings,
)
from model_runner.experiments.distilled import DistilledArm, Fit
from model_runner.experiments.local import gammas_at
from model_runner.experiments.metric import Learning, MetricArm
from model_runner.experiments.study import Sizes, Study, StudyTexts
from model_runner.experiments.together import Mixture, VotingMemory, mixed_scores, successors_of
from model_runner.fingerprint import model_fingerprint
from model_runner.memory_builder.boosting import held
from model_runner.models import LoadedModel
from model_runner.progress import Progress
from model_runner.replica.held import policy_of
from model_runner.texts import Window, make_batch
from tests.families import VOCABULARY, tiny_model

ARMS = (
    BoostedArm(rounds=1),
    DistilledArm(rounds=1, how=Fit(hidden=8, batch=32, every=5, most_steps=20)),
    MetricArm(how=Learning(dimension=4, steps=3, queries=8, keys=24)),
)


def windows(name: str, count: int, length: int = 12) -> list[Window]:
    draw = random.Random(name)
    return [
        Window(
            ExampleRef(name, str(number // 2)),
            tuple(draw.randrange(3, VOCABULARY) for _ in range(length)),
            tuple(range(1, length)),
            length * (number % 2),
        )
        for number in range(count)
    ]


@pytest.fixture
def study() -> Study:
    model = tiny_model("olmoe").requires_grad_(False)
    loaded = LoadedModel("tiny/olmoe", model, None, model_fingerprint(model))
    counts = {"reference": 6, "dev": 4, "test": 4, "general_dev": 4}
    counts |= {"general_test": 4, "general_reference": 6}
    texts = {name: windows(name, count) for name, count in counts.items()}
    return Study(
        loaded, StudyTexts("random", **texts), 0, Progress(quiet=True), Sizes(batch_size=4)
    )


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_an_arm_scores_and_leaves_the_model_as_it_was(study: Study, arm: Arm) -> None:
    before = {name: value.clone() for name, value in study.loaded.model.state_dict().items()}
    plain = study.plain(study.texts.test)
    with arm.fit(study) as fitted:
        scores = fitted.score(study.texts.test)
        assert math.isfinite(scores.nll)
        assert (scores.nll_sums != plain.nll_sums).any()
        assert fitted.budget.fit_s > 0
        assert fitted.budget.s_per_token is not None
        assert (fitted.budget.trained_parameters > 0) == (arm.name == "distilled")
    after = study.loaded.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert (study.score(study.texts.test, None, "").nll_sums == plain.nll_sums).all()


def test_a_boosted_memory_is_that_of_a_build(study: Study) -> None:
    """What is read in an experiment is what the product's own retriever gives."""
    rounds = boosted(study, 1)
    memory = memory_of(rounds.layers[1], rounds.gammas, SETTING)
    settings = wire_settings(SETTING, gammas_at(study.medians(), SETTING.lambda0))
    experts = study.loaded.fingerprint.num_experts
    policies = (memory, policy_of(held(rounds.layers[1], settings), experts))
    sums = [study.score(study.texts.test, policy, "").nll_sums for policy in policies]
    assert sums[0] == pytest.approx(sums[1], abs=1e-3)


def test_rows_of_rounds(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_runner.experiments.boosted._NULL_WEIGHTS", (1.0,))
    rows = list(round_rows(study, "all"))
    assert {row["rounds"] for row in rows if row["split"] == "dev"} == set(range(7))
    assert [row["rounds"] for row in rows if row["kept"] and row["split"] == "test"]
    assert all(math.isfinite(row["left_out_nll"]) for row in rows)


def test_votes_of_the_neighbours(study: Study) -> None:
    """Without weight the memory's own loss is left; with all of it, a vote by hand."""
    rounds = boosted(study, 1)
    memory = memory_of(rounds.layers[0], rounds.gammas, SETTING)
    voting = VotingMemory(memory, successors_of(study.traces()), routes=True)
    mixtures = [Mixture(0.0, 1.0, by_lambda=False), Mixture(0.5, 2.0, by_lambda=True)]
    alone, mixed = mixed_scores(study, study.texts.test, voting, mixtures)
    routed = study.score(study.texts.test, memory, "")
    assert alone.nll_sums == pytest.approx(routed.nll_sums, rel=1e-6)
    assert alone.examples == routed.examples
    batch = make_batch(study.texts.test[:1], study.loaded.device)
    losses = mixed_scores(study, study.texts.test[:1], voting, mixtures)
    assert voting.found is not None
    similarity, rows = voting.found
    at, successor = 3, int(batch.input_ids[0, 4])
    near, said = similarity[at].double(), successors_of(study.traces())[rows[at]]
    share = float((near.square() * (said == successor)).sum() / near.square().sum())
    weight = 0.5 * float(near.sum() / (near.sum() + SETTING.null_weight))
    own = math.exp(-float(losses[0].token_nll[0][at]))
    expected = -math.log((1 - weight) * own + weight * share)
    assert float(losses[1].token_nll[0][at]) == pytest.approx(expected, rel=1e-4)
    assert mixed.nll != alone.nll

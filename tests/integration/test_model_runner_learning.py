"""Learning online, against real services: the entries of a build, one example at a time, read at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from knnmoe.client import AdminClient, ModelMismatch, ServiceRefused
from knnmoe.v1.types_pb2 import MemorySettings

from model_runner import router_client
from model_runner.errors import BadInput, HooksInUse
from model_runner.memory_builder.learner import KnownTokens, Learnt, OnlineLearner
from model_runner.memory_builder.recipes import PAPER, PRESETS, RECOMMENDED
from model_runner.router_hooks import RouterHooks
from model_runner.routing_policy import RetrievalPolicy
from model_runner.scoring import score
from model_runner.texts import Window
from tests.integration.runner_parts import (
    BATCH_SIZE,
    LAYERS,
    PRESET_NAMES,
    QUIET,
    build,
    client_of,
    everything,
    loaded_model,
    stored,
    windows_of,
)
from tests.sidecar import Sidecar

PRESET = pytest.mark.parametrize("preset", PRESET_NAMES)
WINDOWS = windows_of()
ONE, OTHER = ([w for w in WINDOWS if w.ref.example == number] for number in ("1", "2"))
# Everything is close: each token is routed by the nearest entry.
WIDE = MemorySettings(gamma=[1e-7])


@pytest.fixture
def admin(edge_sidecar: Sidecar) -> AdminClient:
    with AdminClient(edge_sidecar.target) as client:
        yield client


def create(admin: AdminClient, name: str, preset: str = "paper") -> str:
    admin.find_or_create(
        name, loaded_model().fingerprint.message(), PRESETS[preset].settings(LAYERS)
    )
    return name


def learner(admin: AdminClient, name: str, **options: Any) -> OnlineLearner:
    loaded = loaded_model()
    options = {"batch_size": BATCH_SIZE} | options
    return OnlineLearner(loaded.model, loaded.fingerprint, admin, name, **options)


def targets(windows: list[Window]) -> int:
    return sum(window.targets for window in windows)


@PRESET
def test_examples_one_by_one_are_what_a_build_writes(
    edge_sidecar: Sidecar, admin: AdminClient, name: str, preset: str
) -> None:
    build(edge_sidecar.target, f"{name}-built", preset)
    with learner(admin, create(admin, name, preset), reference=WINDOWS) as learning:
        for number in dict.fromkeys(w.ref.example for w in WINDOWS):
            learning.learn([w for w in WINDOWS if w.ref.example == number])
    built = everything(edge_sidecar, f"{name}-built")
    for layer, learnt in enumerate(everything(edge_sidecar, name)):
        assert learnt.keys() == built[layer].keys()
        for entry, (key, value) in learnt.items():  # up to the rounding of other batches
            assert key == pytest.approx(built[layer][entry][0], abs=1e-4)
            assert value == pytest.approx(built[layer][entry][1], abs=1e-3)


def test_the_next_look_up_reads_what_was_learnt(
    edge_sidecar: Sidecar, admin: AdminClient, name: str
) -> None:
    create(admin, name)
    admin.update_settings(name, WIDE)
    model, sums, lambdas = loaded_model().model, [], []
    with client_of(edge_sidecar.target, name) as client, learner(admin, name) as learning:
        for _ in range(2):
            policy = RetrievalPolicy(client)
            sums.append(score(model, ONE, policy, QUIET, what="").nll_sums)
            lambdas.append([use.lambda_mean for use in policy.use.values()])
            assert learning.learn(ONE) == Learnt(LAYERS * targets(ONE), 0)
    assert lambdas[0] == [0.0] * LAYERS
    assert min(lambdas[1]) > 0.999
    assert sums[1].sum() < sums[0].sum()


def test_learning_twice_writes_the_same(
    edge_sidecar: Sidecar, admin: AdminClient, name: str
) -> None:
    found = []
    with learner(admin, create(admin, name), reference=WINDOWS) as learning:
        for _ in range(2):
            assert learning.is_there(ONE) == bool(found)
            learning.learn(ONE)
            found.append(everything(edge_sidecar, name))
    assert found[0] == found[1]
    origins = [origin for _, _, origin in stored(edge_sidecar, name, 0).values()]
    assert {(o.source, o.example) for o in origins} == {(ONE[0].ref.source, ONE[0].ref.example)}
    assert sorted(o.position for o in origins) == sorted(
        w.offset + t - 1 for w in ONE for t in range(w.first_target, len(w.token_ids))
    )


@PRESET
def test_running_medians_stand_in_for_a_reference(
    edge_sidecar: Sidecar, admin: AdminClient, name: str, preset: str
) -> None:
    with learner(admin, create(admin, name, preset)) as learning:
        learning.learn(ONE)
        learning.learn(OTHER)
    assert admin.count(name) == LAYERS * (targets(ONE) + targets(OTHER))


def test_a_model_that_is_routing_is_not_learnt_from(admin: AdminClient, name: str) -> None:
    model = loaded_model().model
    with learner(admin, create(admin, name)) as learning:
        with RouterHooks(model, lambda call: None), pytest.raises(HooksInUse):
            learning.learn(ONE)
        assert admin.count(name) == 0
        learning.learn(ONE)


@PRESET
def test_known_tokens_are_left_out(
    edge_sidecar: Sidecar, admin: AdminClient, name: str, preset: str
) -> None:
    create(admin, name, preset)
    again = [replace(w, ref=replace(w.ref, example="copy")) for w in ONE]
    every = LAYERS * targets(ONE)
    with client_of(edge_sidecar.target, name) as client:
        keep = KnownTokens(client, 0.99).keep
        with learner(admin, name, keep=keep) as learning:
            assert learning.learn(ONE) == Learnt(every, 0)
            assert learning.learn(ONE) == Learnt(every, 0)  # the own entries do not count
            assert learning.learn(again) == Learnt(0, every)
    assert admin.count(name) == every


def test_known_tokens_are_looked_up_in_parts(
    edge_sidecar: Sidecar, admin: AdminClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_client, "MAX_REQUEST_BYTES", 1)  # a token per lookup
    create(admin, name)
    copy = [replace(w, ref=replace(w.ref, example="copy")) for w in ONE]
    with (
        client_of(edge_sidecar.target, name) as client,
        learner(admin, name, keep=KnownTokens(client, 0.99).keep) as learning,
    ):
        assert learning.learn(ONE) == Learnt(LAYERS * targets(ONE), 0)
        assert learning.learn(copy) == Learnt(0, LAYERS * targets(ONE))


def test_what_cannot_be_learnt_into(edge_sidecar: Sidecar, admin: AdminClient, name: str) -> None:
    with pytest.raises(ServiceRefused, match=f"memory '{name}' not found"):
        learner(admin, name)
    create(admin, name)
    with pytest.raises(BadInput, match="holds values of kind assignment, this recipe makes logit"):
        learner(admin, name, recipe=RECOMMENDED)
    with learner(admin, name, recipe=replace(PAPER, step_size=1.0)):
        pass
    other = replace(loaded_model().fingerprint, top_k=3)
    with pytest.raises(ModelMismatch, match="top_k: memory 2, this model 3"):
        OnlineLearner(loaded_model().model, other, admin, name)

"""A sidecar that is restarted between two calls of the runner: they are repeated, and nobody notices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from knnmoe.client import AdminClient

from model_runner.memory_builder.builder import MemoryBuilder, Target
from model_runner.memory_builder.learner import OnlineLearner
from model_runner.memory_builder.recipes import PRESETS
from model_runner.router_client import OnError
from model_runner.router_hooks import RouterCall
from model_runner.routing_policy import RetrievalPolicy
from tests.integration.runner_parts import (
    LAYERS,
    build,
    client_of,
    everything,
    loaded_model,
    prefill,
    windows_of,
)
from tests.sidecar import Sidecar

WINDOWS = [window for window in windows_of() if window.offset == 0]
MEMORY = "recommended"


@pytest.fixture
def mortal(data: Path) -> Iterator[Sidecar]:
    """A service that a test may kill, with a filled memory."""
    with Sidecar(data, listen=f"unix:{data.parent}/s") as sidecar:
        build(sidecar.target, MEMORY, MEMORY, windows=WINDOWS)
        sidecar.close_channel()
        yield sidecar


@contextmanager
def restarted(sidecar: Sidecar) -> Iterator[Sidecar]:
    """Killed, and served again at the same address."""
    sidecar.kill()
    with Sidecar(sidecar.data, listen=sidecar.target) as again:
        yield again


def call_of_layer_0() -> RouterCall:
    calls: list[RouterCall] = []
    prefill(loaded_model().model, lambda call: calls.append(call))
    return calls[0]


@pytest.mark.parametrize("on_error", OnError)
def test_a_look_up(mortal: Sidecar, on_error: OnError) -> None:
    call = call_of_layer_0()
    with client_of(mortal.target, MEMORY, on_error) as client:
        policy = RetrievalPolicy(client)
        before = policy(call)
        with restarted(mortal):
            after = policy(call)
    assert not client.fallbacks
    torch.testing.assert_close(after.router_logits, before.router_logits)


def test_an_admin_call(mortal: Sidecar) -> None:
    with AdminClient(mortal.target) as client:
        before = client.count(MEMORY)
        with restarted(mortal):
            assert client.count(MEMORY) == before


def test_learning(mortal: Sidecar) -> None:
    """Over one Upserter: what was acknowledged is kept, what was not is sent again."""
    loaded = loaded_model()
    with AdminClient(mortal.target) as client:
        client.find_or_create(
            "online", loaded.fingerprint.message(), PRESETS[MEMORY].settings(LAYERS)
        )
        with OnlineLearner(
            loaded.model, loaded.fingerprint, client, "online", reference=WINDOWS
        ) as learner:
            learner.learn(WINDOWS[:4])
            with restarted(mortal) as again:
                learner.learn(WINDOWS[4:])
                learnt, built = everything(again, "online"), everything(again, MEMORY)
    assert [layer.keys() for layer in learnt] == [layer.keys() for layer in built]


def test_requests_without_an_acknowledgement(mortal: Sidecar) -> None:
    loaded, target = loaded_model(), Target("law", PRESETS["paper"].recipe)
    with AdminClient(mortal.target) as client:
        client.find_or_create(
            "law", loaded.fingerprint.message(), PRESETS["paper"].settings(LAYERS)
        )
        builder = MemoryBuilder(loaded.model, loaded.fingerprint, client)
        with client.upserter() as upserter:
            sent = builder.write(upserter, builder.trace(WINDOWS), target, [1.0] * LAYERS)
            with restarted(mortal):
                upserter.finish()
                assert client.count("law") == sent

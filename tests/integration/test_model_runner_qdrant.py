"""The Qdrant server behind the service goes away while a model generates, and comes back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from knnmoe.client import ServiceUnavailable

from model_runner.router_client import CircuitBreaker, OnError, RouterClient
from model_runner.routing_policy import RetrievalPolicy
from model_runner.scoring import score
from tests.integration.runner_parts import (
    LAYERS,
    QUIET,
    Recorder,
    build,
    client_of,
    generate,
    loaded_model,
    prefill,
    windows_of,
)
from tests.qdrant_standin.process import StandInProcess
from tests.sidecar import Sidecar, running_sidecar

MEMORY = "recommended"
WINDOWS = [window for window in windows_of() if window.offset == 0]
FIRST_PAUSE_S, LONGEST_PAUSE_S, SLACK_S = 0.2, 2.0, 60.0


@pytest.fixture
def server(data: Path) -> Iterator[StandInProcess]:
    with StandInProcess(data.parent / "qdrant") as running:
        yield running


@pytest.fixture
def service(server: StandInProcess, data: Path) -> Iterator[Sidecar]:
    with running_sidecar(data, backend=server.url) as running:
        build(running.target, MEMORY, MEMORY, windows=WINDOWS)
        yield running


def generating_client(service: Sidecar) -> RouterClient:
    breaker = CircuitBreaker(first_pause_s=FIRST_PAUSE_S, longest_pause_s=LONGEST_PAUSE_S)
    fingerprint = loaded_model().fingerprint
    return RouterClient(service.target, MEMORY, fingerprint, timeout_s=8.0, breaker=breaker)


def test_generation_goes_on_without_the_server_and_resumes_with_it(
    server: StandInProcess, service: Sidecar
) -> None:
    model, killed_at, tokens = loaded_model().model, 2 * LAYERS + 1, 8
    with generating_client(service) as client:
        with_memory = generate(model, RetrievalPolicy(client), tokens)
        recorder = Recorder(RetrievalPolicy(client), {killed_at: server.kill})
        sequences, logits = generate(model, recorder, tokens)
        replies = recorder.replies
        assert len(replies) == tokens * LAYERS
        assert all(reply is not None for reply in replies[:killed_at])
        assert all(reply is None for reply in replies[killed_at:])
        assert client.fallbacks.total() == tokens * LAYERS - killed_at
        reasons = {reason for _, reason in client.fallbacks}
        assert reasons == {"backend_unavailable", "breaker_open"}

        scripted = iter(replies)
        again = generate(model, lambda call: next(scripted), tokens)
        assert torch.equal(sequences, again[0])
        assert torch.equal(logits, again[1])
        plain = generate(model, RetrievalPolicy(client), tokens)
        assert torch.equal(plain[1], generate(model, None, tokens)[1])

        server.restart()
        back = time.monotonic()
        while prefill_falls_back(client):
            assert time.monotonic() < back + LONGEST_PAUSE_S * 1.5 + SLACK_S
            time.sleep(0.02)
        resumed = generate(model, RetrievalPolicy(client), tokens)
    for after, before in zip(resumed, with_memory, strict=True):
        assert torch.equal(after, before)


def prefill_falls_back(client: RouterClient) -> bool:
    before = client.fallbacks.total()
    prefill(loaded_model().model, RetrievalPolicy(client))
    return client.fallbacks.total() > before


def test_scoring_stops_with_the_server(server: StandInProcess, service: Sidecar) -> None:
    with client_of(service.target, MEMORY, OnError.RAISE) as client:
        policy = Recorder(RetrievalPolicy(client), {LAYERS + 2: server.kill})
        with pytest.raises(ServiceUnavailable, match=server.url):
            score(loaded_model().model, WINDOWS, policy, QUIET, what="", batch_size=2)
        assert None not in policy.replies

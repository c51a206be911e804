"""A sidecar that is restarted while a model generates with it, and while replicas follow it."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import torch

from model_runner.router_client import CircuitBreaker, OnError, RouterClient
from model_runner.routing_policy import RetrievalPolicy
from tests.faults.crash import Wrong
from tests.faults.replica import RESTARTS
from tests.faults.replica_world import World
from tests.faults.rounds import Round
from tests.integration.runner_parts import (
    LAYERS,
    Recorder,
    build,
    generate,
    loaded_model,
    windows_of,
)

TOKENS, TIMES = 24, 2
MEMORY = "recommended"


def generation(round_: Round) -> None:
    """Text always comes; each lookup is answered or counted, and what is generated follows from the answers alone."""
    service = round_.serve(listen=f"unix:{round_.directory}/s")
    build(service.target, MEMORY, MEMORY, windows=windows_of()[::3])
    model = loaded_model().model
    calls = np.sort(round_.rng.choice(np.arange(LAYERS, TOKENS * LAYERS), TIMES, replace=False))

    def restart() -> None:
        nonlocal service
        round_.injects()
        service.kill()
        began_s = time.monotonic()
        service = round_.serve_again(service)
        round_.found.recoveries_s.append(time.monotonic() - began_s)

    breaker = CircuitBreaker(first_pause_s=0.05, longest_pause_s=0.2)
    with RouterClient(
        *(service.target, MEMORY, loaded_model().fingerprint),
        on_error=OnError.FALL_BACK,
        timeout_s=30.0,
        breaker=breaker,
    ) as client:
        recorder = Recorder(RetrievalPolicy(client), {int(call): restart for call in calls})
        sequences, logits = generate(model, recorder, TOKENS)
        _compare_counts(recorder, client)
    scripted = iter(recorder.replies)
    again, logits_again = generate(model, lambda _: next(scripted), TOKENS)
    if not (torch.equal(sequences, again) and torch.equal(logits, logits_again)):
        raise Wrong("the text is another than its lookups' answers make it")
    round_.found.lookups += len(recorder.replies)


def _compare_counts(recorder: Recorder, client: RouterClient) -> None:
    counted = Counter(reply is None for reply in recorder.replies)
    if len(recorder.replies) != TOKENS * LAYERS or counted[True] != client.fallbacks.total():
        raise Wrong(f"{counted} of {TOKENS * LAYERS} lookups, and counted {client.fallbacks}")


def replicas(round_: Round) -> None:
    """Stopped or killed, also amid a write: replicas catch up with what was acknowledged, and answer like NumPy."""
    how = RESTARTS[round_.seed % len(RESTARTS)]
    with World(round_.directory / "data") as world:
        world.begin()
        for step in ("upsert", "upsert", how, "upsert"):
            memory, seed = int(round_.rng.integers(2)), int(round_.rng.integers(2**31))
            world.do(step, memory, seed)
            began_s = time.monotonic()
            world.check(seed)
            if step == how:
                round_.injects()
                round_.found.recoveries_s.append(time.monotonic() - began_s)
        round_.found.writes += sum(world.done.values())
        round_.found.lookups += world.looked_up

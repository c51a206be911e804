"""A sidecar that dies, hangs or comes back while a model runs: generation goes on, scoring and building stop."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from knnmoe.client import ServiceUnavailable
from knnmoe.client.direct import DirectStream
from torch import Tensor

from model_runner import router_client
from model_runner.progress import Progress
from model_runner.router_client import CircuitBreaker, OnError, RouterClient
from model_runner.router_hooks import RouterCall, RouterHooks
from model_runner.routing_policy import Lookups, RetrievalPolicy
from model_runner.scoring import score
from tests.integration.runner_parts import (
    BATCH_SIZE,
    LAYERS,
    PROMPT,
    QUIET,
    REPLY_NAMES,
    SENTENCES,
    Recorder,
    build,
    client_of,
    everything,
    generate,
    loaded_model,
    prefill,
    windows_of,
)
from tests.sidecar import Sidecar
from tests.tiny_checkpoint import byte_tokenizer

PATIENCE_S = 60.0
# One window of each sentence.
WINDOWS = [window for window in windows_of() if window.offset == 0]


@pytest.fixture
def mortal(data: Path) -> Iterator[Sidecar]:
    """A service that a test may kill, with a filled memory of each kind."""
    with Sidecar(data, listen=f"unix:{data.parent}/s") as sidecar:
        for preset in REPLY_NAMES:
            build(sidecar.target, preset, preset, windows=WINDOWS)
        sidecar.close_channel()
        yield sidecar


def generating_client(
    target: str, memory: str, breaker: CircuitBreaker | None = None
) -> RouterClient:
    """Falls back; by default its breaker tries again after 50 to 200 ms."""
    return RouterClient(
        target,
        memory,
        loaded_model().fingerprint,
        on_error=OnError.FALL_BACK,
        timeout_s=30.0,
        breaker=breaker or CircuitBreaker(first_pause_s=0.05, longest_pause_s=0.2),
    )


def call_of_layer_0() -> RouterCall:
    calls: list[RouterCall] = []
    prefill(loaded_model().model, lambda call: calls.append(call))
    return calls[0]


def until_it_replies(policy: RetrievalPolicy, call: RouterCall) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while policy(call) is None:
        assert time.monotonic() < give_up, policy.client.fallbacks
        time.sleep(0.01)


@pytest.mark.parametrize("memory", REPLY_NAMES)
def test_generation_outlives_the_sidecar(
    mortal: Sidecar, memory: str, caplog: pytest.LogCaptureFixture
) -> None:
    """From the kill on the own router stands at every layer, whatever was retrieved before."""
    model, killed_at, tokens = loaded_model().model, 2 * LAYERS + 1, 6
    with generating_client(mortal.target, memory) as client:
        recorder = Recorder(RetrievalPolicy(client), {killed_at: mortal.kill})
        with caplog.at_level(logging.WARNING):
            sequences, logits = generate(model, recorder, tokens)
    replies = recorder.replies
    assert len(replies) == tokens * LAYERS
    assert all(reply is not None for reply in replies[:killed_at])
    assert all(reply is None for reply in replies[killed_at:])
    assert client.fallbacks.total() == tokens * LAYERS - killed_at
    assert {reason for _, reason in client.fallbacks} == {"unavailable", "breaker_open"}
    assert sum(n for (_, reason), n in client.fallbacks.items() if reason == "unavailable") >= 5
    assert [record.name for record in caplog.records] == ["model_runner.router_client"]
    assert "the model's own router stands" in caplog.text

    scripted = iter(replies)
    again, logits_again = generate(model, lambda call: next(scripted), tokens)
    assert torch.equal(sequences, again)
    assert torch.equal(logits, logits_again)


def test_generation_without_a_sidecar_is_the_plain_one(tmp_path: Path) -> None:
    model = loaded_model().model
    with generating_client(f"unix:{tmp_path}/nobody", "paper") as client:
        routed = generate(model, RetrievalPolicy(client))
    for with_client, plain in zip(routed, generate(model), strict=True):
        assert torch.equal(with_client, plain)
    assert client.fallbacks.total() == 6 * LAYERS


@pytest.mark.parametrize("memory", REPLY_NAMES)
def test_retrieval_resumes_when_the_sidecar_is_back(mortal: Sidecar, memory: str) -> None:
    call = call_of_layer_0()
    with generating_client(mortal.target, memory) as client:
        policy = RetrievalPolicy(client)
        before = policy(call)
        mortal.kill()
        assert [policy(call) for _ in range(20)] == [None] * 20
        with Sidecar(mortal.data, listen=mortal.target):
            until_it_replies(policy, call)
            after = policy(call)
    assert type(after) is type(before)
    if memory == "recommended":
        torch.testing.assert_close(after.router_logits, before.router_logits)


def test_a_sidecar_that_hangs_is_waited_for_no_longer_than_the_deadline(
    mortal: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor for the time that a first connection may take: this test would not end."""
    monkeypatch.setitem(router_client.CONNECT_TIMEOUT_S, "fall_back", 3600.0)
    call, clock = call_of_layer_0(), [0.0]
    breaker = CircuitBreaker(clock_s=lambda: clock[0])
    with generating_client(mortal.target, "paper", breaker) as client:
        policy = RetrievalPolicy(client)
        assert policy(call) is not None
        client.timeout_s = 0.01
        with mortal.paused():
            assert [policy(call) for _ in range(9)] == [None] * 9
        assert client.fallbacks == {(0, "deadline"): 5, (0, "breaker_open"): 4}
        client.timeout_s, clock[0] = 30.0, 2.0
        assert policy(call) is not None


def test_a_prompt_is_waited_for_longer_than_a_token(mortal: Sidecar) -> None:
    call = call_of_layer_0()
    asked = int(call.valid.sum())
    with client_of(mortal.target, "paper") as client:
        policy = RetrievalPolicy(client)
        assert policy(call) is not None
        client.timeout_s = 0.01
        late = pytest.raises(ServiceUnavailable, match=f"{0.01 + 0.002 * (asked - 1):g} s")
        with mortal.paused(), late:
            policy(call)


def test_a_sidecar_that_hangs_from_the_start(
    mortal: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connecting and asking what the memory is count too; with the patience of describe() this test would not end."""
    monkeypatch.setitem(router_client.CONNECT_TIMEOUT_S, "fall_back", 3600.0)
    model = loaded_model().model
    with mortal.paused(), generating_client(mortal.target, "paper") as client:
        client.timeout_s = 0.01
        assert torch.equal(prefill(model, RetrievalPolicy(client)), prefill(model))
        assert client.lookups == Lookups(LAYERS, {"deadline": LAYERS})
        client.timeout_s = 30.0
        mortal.process.send_signal(signal.SIGCONT)
        assert not torch.equal(prefill(model, RetrievalPolicy(client)), prefill(model))


def test_threads_that_lose_the_sidecar_count_every_lookup(mortal: Sidecar) -> None:
    """And none of them waits, raises or gives another text than the plain model's."""
    model, threads, passes = loaded_model().model, 8, 5
    plain = prefill(model)
    with generating_client(mortal.target, "paper") as client:
        policy = RetrievalPolicy(client)
        ids = byte_tokenizer()([PROMPT, SENTENCES[2]], padding=True, return_tensors="pt")

        def work(_: int) -> list[Tensor]:
            with torch.no_grad():
                return [model(**ids).logits for _ in range(passes)]

        with RouterHooks(model, policy), ThreadPoolExecutor(threads) as pool:
            routed = list(pool.map(work, range(threads)))
            assert client.lookups == Lookups(threads * passes * LAYERS, {})
            mortal.kill()
            left = list(pool.map(work, range(threads)))
        assert all(not torch.equal(logits, plain) for logits in chain(*routed))
        assert all(torch.equal(logits, plain) for logits in chain(*left))
        made = 2 * threads * passes * LAYERS
        assert client.lookups == policy.lookups
        assert (client.lookups.total, client.fallbacks.total()) == (made, made // 2)


def test_an_interrupted_look_up_answers_no_later_one(
    mortal: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between a question and its answer, in a session that goes on."""
    call = call_of_layer_0()
    other = replace(call, router_input=call.router_input + 1, router_logits=call.router_logits + 1)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with client_of(mortal.target, "recommended") as client:
        policy = RetrievalPolicy(client)
        expected = policy(call)
        with monkeypatch.context() as patched:
            patched.setattr(DirectStream, "receive", interrupted)
            with pytest.raises(KeyboardInterrupt):
                policy(other)
        assert torch.equal(policy(call).router_logits, expected.router_logits)


@pytest.mark.parametrize("memory", REPLY_NAMES)
def test_scoring_stops_with_the_sidecar(mortal: Sidecar, memory: str) -> None:
    with client_of(mortal.target, memory) as client:
        policy = Recorder(RetrievalPolicy(client), {LAYERS + 2: mortal.kill})
        with pytest.raises(ServiceUnavailable, match=mortal.target):
            score(
                loaded_model().model,
                WINDOWS,
                policy,
                QUIET,
                what="",
                batch_size=2,
            )
        assert len(policy.replies) == LAYERS + 2
        assert None not in policy.replies
        assert not client.fallbacks


class After(Progress):
    """Acts after the first of the batches."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__(quiet=True)
        self._act = act

    def track(self, items, what, unit="item"):
        for number, item in enumerate(items):
            yield item
            if number == 0:
                self._act()


def test_building_stops_with_the_sidecar_and_goes_on_with_the_next(mortal: Sidecar) -> None:
    with pytest.raises(ServiceUnavailable, match=mortal.target):
        build(mortal.target, "law", windows=WINDOWS, progress=After(mortal.kill))
    with Sidecar(mortal.data, listen=mortal.target) as restarted:
        resumed = build(restarted.target, "law", windows=WINDOWS)
        assert resumed.windows_skipped <= BATCH_SIZE
        assert everything(restarted, "law") == everything(restarted, "paper")


def test_scoring_waits_for_a_sidecar_that_is_slow(mortal: Sidecar) -> None:
    call = call_of_layer_0()
    with client_of(mortal.target, "paper") as client:
        policy = RetrievalPolicy(client)
        assert policy(call) is not None
        with mortal.paused():
            wake_up = threading.Timer(0.3, mortal.process.send_signal, [signal.SIGCONT])
            wake_up.start()
            assert policy(call) is not None
            wake_up.join()

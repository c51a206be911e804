"""A memory that changes, and a sidecar that goes away, while requests are served."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from knnmoe.client import ModelMismatch, ServiceUnavailable

from tests.sidecar import Sidecar
from tests.vllm.ask import apart, ask, engine, generate, report, sampling, text_of
from tests.vllm.models import (
    NEW_TOKENS,
    Checkpoint,
    deleted,
    fill,
    made_for_another_model,
    more,
    prompts,
    with_memory,
)

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

LAYERS, TOLERANCE = 3, 2e-5
TEXTS = prompts(4, length=80, seed=5)
RETRIEVALS = ["replica", "remote"]


@pytest.fixture
def own_sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    with Sidecar(tmp_path / "data") as running:
        yield running


def serve(model: Checkpoint, target: str, retrieval: str, **options: Any) -> Any:
    own = {name: options.pop(name) for name in ("max_num_seqs",) if name in options}
    config = {"target": target, "memories": ["law"], "retrieval": retrieval, **options}
    return engine(model.path, config, enable_prefix_caching=True, block_size=32, **own)


def cached(llm: Any, memory: str | None) -> int:
    """Prompt tokens of TEXTS that are read from the prefix cache."""
    params = sampling(memory, prompt_logprobs=False)
    return sum(output.num_cached_tokens for output in generate(llm, TEXTS, [params] * len(TEXTS)))


def caught_up(llm: Any) -> None:
    """Returns when lookups find all that the sidecar has acknowledged."""
    [serving] = llm.collective_rpc(lambda worker: worker.knn_moe_salt.__self__)
    serving.memories["law"].opened.catch_up()


class Stepped:
    """Requests that are served step by step."""

    def __init__(self, llm: Any, texts: Sequence[Sequence[int]], memory: str) -> None:
        self.engine, self.finished = llm.llm_engine, list[Any]()
        self.ids = [f"stepped-{number}" for number in range(len(texts))]
        for id_, text in zip(self.ids, texts, strict=True):
            params = sampling(memory, prompt_logprobs=False)
            self.engine.add_request(id_, {"prompt_token_ids": list(text)}, params)

    def step(self, times: int) -> None:
        for _ in range(times):
            self.finished += [output for output in self.engine.step() if output.finished]

    def finish(self) -> None:
        while self.engine.has_unfinished_requests():
            self.step(1)
        assert {output.request_id for output in self.finished} == set(self.ids)
        assert all(len(output.outputs[0].token_ids) == NEW_TOKENS for output in self.finished)


@pytest.mark.parametrize("retrieval", RETRIEVALS)
def test_what_changed_is_not_read_from_the_prefix_cache(
    retrieval: str, checkpoint: Callable[[str], Checkpoint], own_sidecar: Sidecar
) -> None:
    model = checkpoint("olmoe")
    fill(own_sidecar, "law", model, prompts(4, length=64, seed=6) + TEXTS[:2])
    with serve(model, own_sidecar.target, retrieval, timeout_s=20) as llm:
        plain, first = (ask(llm, TEXTS, memory, prompt_logprobs=False) for memory in (None, "law"))
        assert cached(llm, "law") == 4 * 64  # of the same memory in the same version
        assert apart(ask(llm, TEXTS, "law", prompt_logprobs=False), first) < TOLERANCE
        assert apart(ask(llm, TEXTS, None, prompt_logprobs=False), plain) < TOLERANCE
        more(own_sidecar, "law", model, TEXTS[2:])
        caught_up(llm)
        assert cached(llm, "law") == 0
        changed = ask(llm, TEXTS, "law", prompt_logprobs=False)
    expected = with_memory(model, own_sidecar.target, "law", TEXTS)
    assert apart(changed, [text.answer() for text in expected]) < TOLERANCE
    assert apart(changed, first) > 100 * TOLERANCE


@pytest.mark.parametrize("retrieval", RETRIEVALS)
def test_a_memory_may_change_while_it_is_read(
    retrieval: str, checkpoint: Callable[[str], Checkpoint], own_sidecar: Sidecar
) -> None:
    model = checkpoint("olmoe")
    fill(own_sidecar, "law", model, prompts(4, length=64, seed=6))
    with serve(model, own_sidecar.target, retrieval, timeout_s=20) as llm:
        running = Stepped(llm, prompts(16, seed=7), "law")
        running.step(4)
        more(own_sidecar, "law", model, TEXTS)
        caught_up(llm)
        running.finish()
        assert all(report(llm, id_)["fell_back"] == 0 for id_ in running.ids)
        changed = ask(llm, TEXTS, "law", prompt_logprobs=False)
    expected = with_memory(model, own_sidecar.target, "law", TEXTS)
    assert apart(changed, [text.answer() for text in expected]) < TOLERANCE


def test_a_sidecar_that_is_killed_costs_its_lookups_and_nothing_else(
    checkpoint: Callable[[str], Checkpoint], own_sidecar: Sidecar
) -> None:
    model = checkpoint("olmoe")
    fill(own_sidecar, "law", model, TEXTS)
    with serve(model, own_sidecar.target, "remote", timeout_s=5) as llm:
        plain, before = (ask(llm, TEXTS, memory, prompt_logprobs=False) for memory in (None, "law"))
        running = Stepped(llm, prompts(16, seed=8), "law")
        running.step(4)
        counted = [report(llm, id_) for id_ in running.ids]
        assert sum(found["lookups"] for found in counted) > 0
        assert all(found["fell_back"] == 0 for found in counted)
        own_sidecar.kill()
        running.finish()
        for id_, found in zip(running.ids, counted, strict=True):
            at_the_end = report(llm, id_)
            assert at_the_end["lookups"] == LAYERS * NEW_TOKENS
            assert at_the_end["fell_back"] == at_the_end["lookups"] - found["lookups"]
            assert sum(at_the_end["reasons"].values()) == at_the_end["fell_back"]
        assert ask(llm, TEXTS, "law", prompt_logprobs=False) == plain  # nothing of it is cached
        with Sidecar(own_sidecar.data, listen=own_sidecar.target):
            while True:  # the breaker tries again by itself
                [output, *_] = generate(llm, TEXTS, [sampling("law", prompt_logprobs=False)] * 4)
                if report(llm, output.request_id)["fell_back"] == 0:
                    break
            assert apart(ask(llm, TEXTS, "law", prompt_logprobs=False), before) < TOLERANCE


def test_a_sidecar_that_hangs_is_not_waited_for(
    checkpoint: Callable[[str], Checkpoint], own_sidecar: Sidecar
) -> None:
    model = checkpoint("olmoe")
    fill(own_sidecar, "law", model, TEXTS)
    with serve(model, own_sidecar.target, "remote", timeout_s=0.5) as llm:
        plain = ask(llm, TEXTS, None, prompt_logprobs=False)
        with own_sidecar.paused():
            outputs = generate(llm, TEXTS, [sampling("law", prompt_logprobs=False)] * 4)
            for output in outputs:
                found = report(llm, output.request_id)
                assert found["fell_back"] == found["lookups"] == LAYERS * NEW_TOKENS
            assert [list(o.outputs[0].token_ids) for o in outputs] == [t.tokens for t in plain]


@pytest.mark.parametrize("retrieval", RETRIEVALS)
def test_another_models_memory_in_its_place_costs_running_requests_their_lookups(
    retrieval: str, checkpoint: Callable[[str], Checkpoint], own_sidecar: Sidecar
) -> None:
    model = checkpoint("olmoe")
    fill(own_sidecar, "law", model, TEXTS)
    with serve(model, own_sidecar.target, retrieval, timeout_s=20) as llm:
        before = ask(llm, TEXTS, "law", prompt_logprobs=False)
        running = Stepped(llm, prompts(4, seed=8), "law")
        running.step(4)
        counted = [report(llm, id_) for id_ in running.ids]
        made_for_another_model(own_sidecar, "law", model)
        [serving] = llm.collective_rpc(lambda worker: worker.knn_moe_salt.__self__)
        follower = serving.memories["law"].opened.follower
        while follower is not None and not isinstance(follower.obstacle(), ModelMismatch):
            pass  # its stream ends, and the next one is refused
        running.finish()
        for id_, found in zip(running.ids, counted, strict=True):
            at_the_end = report(llm, id_)
            fell_back = at_the_end["lookups"] - found["lookups"]
            assert at_the_end["lookups"] == LAYERS * NEW_TOKENS
            assert at_the_end["reasons"] == {"model_mismatch": fell_back}
        deleted(own_sidecar, "law")
        fill(own_sidecar, "law", model, TEXTS)
        caught_up(llm)
        assert apart(ask(llm, TEXTS, "law", prompt_logprobs=False), before) < TOLERANCE


def test_what_fell_back_is_not_read_from_the_prefix_cache_by_requests_that_waited(
    checkpoint: Callable[[str], Checkpoint], own_sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint("olmoe")
    fill(own_sidecar, "law", model, TEXTS)
    with serve(model, own_sidecar.target, "replica", max_num_seqs=1) as llm:
        [serving] = llm.collective_rpc(lambda worker: worker.knn_moe_salt.__self__)
        retriever = serving.memories["law"].opened.retriever
        obstacle = retriever._obstacle
        two = Stepped(llm, [TEXTS[0]] * 2, "law")  # one after the other, admitted together
        monkeypatch.setattr(retriever, "_obstacle", lambda: ServiceUnavailable("away"))
        two.step(1)
        monkeypatch.setattr(retriever, "_obstacle", obstacle)
        two.finish()
        first, second = two.finished
        assert report(llm, first.request_id)["fell_back"] == LAYERS
        assert report(llm, second.request_id)["fell_back"] == 0
        assert second.num_cached_tokens == 0
        [now] = ask(llm, TEXTS[:1], "law", prompt_logprobs=False)
        assert apart([text_of(second)], [now]) < TOLERANCE
        assert apart([text_of(first)], [now]) > 100 * TOLERANCE


def test_a_replica_goes_on_without_its_sidecar(
    checkpoint: Callable[[str], Checkpoint], own_sidecar: Sidecar
) -> None:
    model = checkpoint("olmoe")
    fill(own_sidecar, "law", model, TEXTS)
    with serve(model, own_sidecar.target, "replica") as llm:
        before = ask(llm, TEXTS, "law", prompt_logprobs=False)
        running = Stepped(llm, prompts(16, seed=8), "law")
        running.step(4)
        own_sidecar.kill()
        running.finish()
        assert all(report(llm, id_)["fell_back"] == 0 for id_ in running.ids)
        assert apart(ask(llm, TEXTS, "law", prompt_logprobs=False), before) < TOLERANCE

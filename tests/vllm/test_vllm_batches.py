"""Many requests at once, each with its own memory or none: the answers are those of each alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.sidecar import Sidecar
from tests.vllm.ask import apart, ask, engine, generate, report, sampling
from tests.vllm.models import NEW_TOKENS, Checkpoint, fill, prompts

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

LAYERS, TOLERANCE = 3, 2e-5
MEMORIES = ("law", "medicine", "code")


@pytest.fixture(scope="module", params=["replica", "remote"])
def served(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Checkpoint], sidecar: Sidecar
) -> Iterator[Any]:
    """OLMoE with three memories, a prompt in pieces, and room for some of 32 requests: the others are preempted."""
    model = checkpoint("olmoe")
    names = [f"{name}-{request.param}" for name in MEMORIES]
    for number, name in enumerate(names):
        fill(sidecar, name, model, prompts(8, seed=number), seed=number)
    fill(sidecar, f"silent-{request.param}", model, prompts(2), min_lambda=0.999)
    config = {
        "target": sidecar.target,
        "memories": [*names, f"silent-{request.param}"],
        "retrieval": request.param,
        "timeout_s": 20,
    }
    small = {"max_num_batched_tokens": 64, "num_gpu_blocks_override": 16, "block_size": 32}
    with engine(model.path, config, enable_prefix_caching=True, **small) as llm:
        llm.names = names
        yield llm


def test_a_mixed_batch_is_each_request_alone(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    preempted = list[Any]()
    scheduler = served.llm_engine.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request

    def noted(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request)
        return preempt(request, *args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", noted)
    texts = prompts(32, length=60, seed=9)
    choice = [*served.names, None]
    memories = [choice[number % 4] for number in range(32)]
    together = ask(served, texts, memories)
    assert preempted
    alone = [ask(served, [text], memory)[0] for text, memory in zip(texts, memories, strict=True)]
    assert apart(together, alone) < TOLERANCE
    plain = ask(served, texts)
    assert apart(plain[3::4], together[3::4]) < TOLERANCE
    assert apart(plain[0::4], together[0::4]) > 100 * TOLERANCE


def test_without_a_memory_and_with_a_silent_one_it_is_the_model_bit_for_bit(
    served: Any, checkpoint: Callable[[str], Checkpoint]
) -> None:
    texts = prompts(4, seed=3)
    silent = served.names[0].replace("law", "silent")
    plain, silenced = ask(served, texts), ask(served, texts, silent)
    assert plain == silenced


def test_lookups_are_counted_by_request(served: Any) -> None:
    texts = prompts(2, length=100, seed=4)
    outputs = generate(served, texts, [sampling(served.names[0]), sampling(None)])
    mine, other = (report(served, output.request_id) for output in outputs)
    # a prompt of 100 tokens goes in pieces of 64, shared by both
    assert mine == {
        "memory": served.names[0],
        "lookups": mine["lookups"],
        "fell_back": 0,
        "reasons": {},
    }
    assert mine["lookups"] in {LAYERS * (pieces + NEW_TOKENS - 1) for pieces in (2, 3, 4)}
    assert other == {"memory": None, "lookups": 0, "fell_back": 0, "reasons": {}}


def test_an_unknown_memory_is_refused_naming_both_sides(served: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(
        VLLMValidationError, match=f"'physics', and this server serves {served.names[0]}, "
    ):
        ask(served, prompts(1), "physics")
    assert ask(served, prompts(1), served.names[0])  # and it serves on

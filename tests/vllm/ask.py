"""Offline engines, requests to them, and how far two answers are apart."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.vllm.models import NEW_TOKENS, Text


@contextmanager
def engine(path: Path, knn_moe: dict[str, Any] | None, **options: Any) -> Iterator[Any]:
    """An offline engine within the block."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "seed": 0,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "max_num_seqs": 32,
    }
    config = {} if knn_moe is None else {"knn_moe": knn_moe}
    llm = LLM(str(path), additional_config=config, **(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def ask(
    llm: Any,
    texts: Sequence[Sequence[int]],
    memories: Sequence[str | None] | str | None = None,
    **options: Any,
) -> list[Text]:
    """Each text with the memory of its place; one name is for all of them."""
    each = [memories] * len(texts) if memories is None or isinstance(memories, str) else memories
    params = [sampling(memory, **options) for memory in each]
    return [text_of(output) for output in generate(llm, texts, params)]


def generate(llm: Any, texts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
    """vLLM's own outputs."""
    inputs = [{"prompt_token_ids": list(text)} for text in texts]
    outputs: list[Any] = llm.generate(inputs, params, use_tqdm=False)
    return outputs


def report(llm: Any, request: str) -> dict[str, Any]:
    """What the lookups of a request came to."""
    found: dict[str, Any] = llm.collective_rpc("knn_moe_report", args=(request,))[0]
    return found


def sampling(memory: str | None, *, prompt_logprobs: bool = True, **knn_moe: Any) -> Any:
    """Greedy, with log-probabilities."""
    from vllm import SamplingParams

    extra = {"knn_moe": {"memory": memory, **knn_moe}} if memory or knn_moe else None
    return SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        prompt_logprobs=0 if prompt_logprobs else None,
        logprobs=0,
        detokenize=False,
        extra_args=extra,
    )


def text_of(output: Any) -> Text:
    """Of vLLM's own output."""
    answer = output.outputs[0]
    scored = zip((output.prompt_logprobs or [None])[1:], output.prompt_token_ids[1:], strict=False)
    return Text(
        [place[token].logprob for place, token in scored],
        list(answer.token_ids),
        [
            place[token].logprob
            for place, token in zip(answer.logprobs, answer.token_ids, strict=True)
        ],
    )


def apart(some: Sequence[Text], others: Sequence[Text]) -> float:
    """The largest difference of a log-probability; inf where greedy continuations differ."""
    if [text.tokens for text in some] != [text.tokens for text in others]:
        return float("inf")
    pairs = zip(some, others, strict=True)
    return max(
        abs(a - b)
        for one, other in pairs
        for a, b in zip(one.prompt + one.logprobs, other.prompt + other.logprobs, strict=True)
    )

"""`model-runner generate`: from options to calls."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

from model_runner.errors import BadInput, RoutingUnavailable
from model_runner.models import LoadedModel, load_model
from model_runner.router_client import OnError, RouterClient
from model_runner.router_hooks import RouterHooks
from model_runner.routing_policy import RetrievalPolicy


def run_generate(
    prompt: str,
    memory: str | None,
    model: str,
    target: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    timeout_s: float,
    device: str,
    dtype: str,
) -> None:
    """Streams the text to stdout; says on stderr what the memory did."""
    loaded = load_model(model, device=device, dtype=dtype)
    inputs = loaded.tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise BadInput("--prompt: got no tokens, expected some text")
    torch.manual_seed(seed)
    with ExitStack() as stack:
        policy = None
        if memory is not None:
            policy = stack.enter_context(routed(loaded, memory, target, timeout_s))
        _generate(loaded, inputs, max_new_tokens, temperature)
    if policy is not None:
        sys.stderr.write(_summary(policy) + "\n")


@contextmanager
def routed(
    loaded: LoadedModel, memory: str, target: str, timeout_s: float
) -> Iterator[RetrievalPolicy]:
    """Within it the model routes with the memory, over one stream; a sidecar that fails is done without.

    Raises RoutingRefused or ModelMismatch when the sidecar has no such memory for this model.
    """
    with RouterClient(
        target, memory, loaded.fingerprint, timeout_s=timeout_s, on_error=OnError.FALL_BACK
    ) as client:
        with suppress(RoutingUnavailable):  # each look-up will say so
            client.describe()
        policy = RetrievalPolicy(client)
        with RouterHooks(loaded.model, policy):
            yield policy


def _generate(loaded: LoadedModel, inputs: Any, max_new_tokens: int, temperature: float) -> None:
    from transformers import TextStreamer

    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    model: Any = loaded.model
    with torch.no_grad():
        model.generate(
            **{
                name: rows.to(loaded.device)
                for name, rows in inputs.items()
                if name != "token_type_ids"
            },
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(loaded.tokenizer, skip_special_tokens=True),
            pad_token_id=loaded.tokenizer.eos_token_id,
            **sampling,
        )


def _summary(policy: RetrievalPolicy) -> str:
    lambdas = " ".join(f"{policy.use[layer].lambda_mean:.2f}" for layer in sorted(policy.use))
    by_reason = Counter[str]()
    for (_, reason), number in policy.client.fallbacks.items():
        by_reason[reason] += number
    fallbacks = ", ".join(f"{number} {reason}" for reason, number in sorted(by_reason.items()))
    return f"mean lambda per layer: {lambdas}; look-ups that fell back: {fallbacks or 'none'}"

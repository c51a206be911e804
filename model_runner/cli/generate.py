"""`model-runner generate`: from options to calls."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from knnmoe.client import AdminClient, ServiceUnavailable

from model_runner.cli.lessons import Lessons, lessons_of, talk
from model_runner.errors import BadInput
from model_runner.models import LoadedModel, load_model
from model_runner.router_client import OnError, RouterClient
from model_runner.router_hooks import RouterHooks
from model_runner.routing_policy import RetrievalPolicy


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """Options of `model-runner generate`, as given; one of prompt, learn and interactive."""

    prompt: str | None
    learn: Path | None
    interactive: bool
    memory: str | None
    model: str
    target: str
    max_new_tokens: int
    temperature: float
    seed: int
    timeout_s: float
    durability: str
    device: str
    dtype: str


def run_generate(options: GenerateOptions) -> None:
    """Streams the text to stdout; says on stderr what the memory did."""
    _require_one_mode(options)
    lessons = [] if options.learn is None else list(lessons_of(options.learn))
    with ExitStack() as stack:
        if options.learn is not None and options.memory is not None:
            # What is not there is noticed before the model is loaded.
            stack.enter_context(AdminClient(options.target)).describe(options.memory)
        loaded = load_model(options.model, device=options.device, dtype=options.dtype)
        torch.manual_seed(options.seed)
        policy = None
        if options.memory is not None:
            policy = stack.enter_context(retrieval_policy(loaded, options))
        generator = Generator(loaded, policy, options)
        school = stack.enter_context(
            Lessons(loaded, options.target, options.memory, options.durability)
        )
        if options.prompt is not None:
            generator.generate(options.prompt)
        elif options.interactive:
            talk(generator.generate, school, sys.stdin)
        for lesson in lessons:
            generator.generate(lesson.text)
            school.learn(lesson)
    if policy is not None:
        sys.stderr.write(_summary(policy) + "\n")


@contextmanager
def retrieval_policy(loaded: LoadedModel, options: GenerateOptions) -> Iterator[RetrievalPolicy]:
    """Asks the memory over one stream; a sidecar that fails is done without.

    Raises ServiceRefused or ModelMismatch when the sidecar has no such memory for this model.
    """
    with RouterClient(
        options.target,
        options.memory or "",
        loaded.fingerprint,
        timeout_s=options.timeout_s,
        on_error=OnError.FALL_BACK,
    ) as client:
        with suppress(ServiceUnavailable):  # each lookup will say so
            client.describe()
        yield RetrievalPolicy(client)


class Generator:
    """Generates from prompts, one after the other. Between two the model is the frozen one: it can be learnt from."""

    def __init__(
        self, loaded: LoadedModel, policy: RetrievalPolicy | None, options: GenerateOptions
    ) -> None:
        self._loaded, self._policy, self._options = loaded, policy, options

    def generate(self, prompt: str) -> None:
        """Streams prompt and text to stdout. Raises BadInput when the prompt has no tokens."""
        inputs = self._loaded.tokenizer(prompt, return_tensors="pt")
        if inputs["input_ids"].shape[1] == 0:
            raise BadInput("--prompt: got no tokens, expected some text")
        model, policy = self._loaded.model, self._policy
        hooks = nullcontext() if policy is None else RouterHooks(model, policy)
        with torch.no_grad(), hooks:
            self._stream(inputs)

    def _stream(self, inputs: Any) -> None:
        from transformers import TextStreamer

        model: Any = self._loaded.model
        temperature, tokenizer = self._options.temperature, self._loaded.tokenizer
        sampling = (
            {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        )
        model.generate(
            **{
                name: rows.to(self._loaded.device)
                for name, rows in inputs.items()
                if name != "token_type_ids"
            },
            max_new_tokens=self._options.max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            pad_token_id=tokenizer.eos_token_id,
            **sampling,
        )


def _require_one_mode(options: GenerateOptions) -> None:
    given = [options.prompt is not None, options.learn is not None, options.interactive]
    if sum(given) != 1:
        raise BadInput(
            f"--prompt, --learn, --interactive: got {sum(given)} of them, expected one: "
            "what to generate from"
        )
    if options.learn is not None and options.memory is None:
        raise BadInput("--learn: needs --memory NAME, the memory to learn into")


def _summary(policy: RetrievalPolicy) -> str:
    lambdas = " ".join(f"{policy.use[layer].lambda_mean:.2f}" for layer in sorted(policy.use))
    by_reason = Counter[str]()
    for (_, reason), number in policy.client.fallbacks.items():
        by_reason[reason] += number
    fallbacks = ", ".join(f"{number} {reason}" for reason, number in sorted(by_reason.items()))
    return f"mean lambda per layer: {lambdas}; lookups that fell back: {fallbacks or 'none'}"

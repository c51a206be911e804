"""`model-runner generate`: text from a model that routes with a memory, and right answers that it learns meanwhile.

Imports of torch and gRPC stand inside functions: --help does not wait for them.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from model_runner.cli import options
from model_runner.errors import BadInput

if TYPE_CHECKING:
    from model_runner.memory_builder.learner import OnlineLearner
    from model_runner.models import LoadedModel
    from model_runner.routing_policy import RetrievalPolicy
    from model_runner.texts import Example

# Provenance of what is taught in a session; the example is a digest of the prompt.
SESSION_SOURCE = "session"
LEARN = "/learn"


def generate(
    prompt: Annotated[
        str | None, typer.Option(help="Text to go on from; - reads it from stdin.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Memory to route with; none = the plain model.")
    ] = None,
    learn: Annotated[
        Path | None,
        options.file_option(
            "Instead of --prompt: a .jsonl or .parquet file of `prompt` and `answer`. Each prompt is "
            "generated from, then its answer is learnt into the memory, before the next."
        ),
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive",
            help="Instead of --prompt: a prompt per line of stdin, until it ends. A line "
            "`/learn ANSWER` teaches the memory the right answer to the last prompt.",
        ),
    ] = False,
    model: options.Model = options.DEFAULT_MODEL,
    target: options.Target = options.DEFAULT_TARGET,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Stop after so many tokens, or at the model's end of text.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 = greedy; else the sampling temperature.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    timeout_s: Annotated[
        float,
        typer.Option(
            min=0.001,
            help="Longest wait for one token's lookup (a prompt's: 2 ms more for each further token); "
            "then the own router stands.",
        ),
    ] = 0.05,
    on_error: Annotated[
        options.OnError,
        typer.Option(
            help="When a lookup fails: fall_back (the own router stands, counted), or raise (an error ends the text).",
        ),
    ] = "fall_back",
    durability: options.Durability = "process",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Generate text with a memory, and teach it the right answers meanwhile.

    When the sidecar is slow or gone, or the memory is deleted meanwhile, the model's own router goes on; only learning
    needs it. Ends with a line on stderr: how much the memory spoke, and how many lookups fell back, by reason. At the
    start it waits for the sidecar up to half a second; with --on-error raise up to 10 s. For example:

        model-runner generate --memory law --prompt 'The tenant shall' --max-new-tokens 40

        model-runner generate --memory law --learn answers.jsonl

        model-runner generate --memory law --interactive
    """
    import torch
    from knnmoe.client import AdminClient, ServiceUnavailable

    from model_runner.models import load_model
    from model_runner.router_client import RouterClient
    from model_runner.routing_policy import RetrievalPolicy

    prompt = sys.stdin.read() if prompt == "-" else prompt
    _require_one_mode(prompt, learn, interactive, memory)
    lessons = [] if learn is None else list(lessons_of(learn))
    with ExitStack() as stack:
        if learn is not None and memory is not None:
            # What is not there is noticed before the model is loaded.
            stack.enter_context(AdminClient(target)).describe(memory)
        loaded = load_model(model, device=device, dtype=dtype)
        torch.manual_seed(seed)
        policy = None
        if memory is not None:
            client = stack.enter_context(
                RouterClient(
                    target, memory, loaded.fingerprint, timeout_s=timeout_s, on_error=on_error
                )
            )
            # Each lookup will say so.
            with suppress(ServiceUnavailable) if on_error == "fall_back" else nullcontext():
                client.describe()
            policy = RetrievalPolicy(client)
            stack.callback(_say_use, policy)
        answer = partial(_generate, loaded, policy, max_new_tokens, temperature)
        school = stack.enter_context(Lessons(loaded, target, memory, durability))
        if prompt is not None:
            answer(prompt)
        elif interactive:
            talk(answer, school, sys.stdin)
        for lesson in lessons:
            answer(lesson.text)
            school.learn(lesson)


def _require_one_mode(
    prompt: str | None, learn: Path | None, interactive: bool, memory: str | None
) -> None:
    given = [prompt is not None, learn is not None, interactive]
    if sum(given) != 1:
        raise BadInput(
            f"--prompt, --learn, --interactive: got {sum(given)} of them, expected one: "
            "what to generate from"
        )
    if learn is not None and memory is None:
        raise BadInput("--learn: needs --memory NAME, the memory to learn into")


def _generate(
    loaded: LoadedModel,
    policy: RetrievalPolicy | None,
    max_new_tokens: int,
    temperature: float,
    prompt: str,
) -> None:
    """Streams prompt and text to stdout. Raises BadInput when the prompt has no tokens, UnsupportedModel on NaN.

    Between two prompts the model is the frozen one: it can be learnt from.
    """
    import torch
    from transformers import TextStreamer

    from model_runner.router_hooks import RouterHooks, require_no_nan

    tokenizer, model = loaded.tokenizer, loaded.model
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise BadInput("--prompt: got no tokens, expected some text")
    inputs.pop("token_type_ids", None)  # some tokenizers give them, and no causal LM takes them
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )

    def no_nan(input_ids: Any, scores: Any) -> Any:
        require_no_nan(model, scores, {"input_ids": input_ids}, of="the text so far")
        return scores

    generate: Any = model.generate
    with torch.no_grad(), nullcontext() if policy is None else RouterHooks(model, policy):
        generate(
            **{name: rows.to(loaded.device) for name, rows in inputs.items()},
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            pad_token_id=tokenizer.eos_token_id,
            logits_processor=[no_nan],
            **sampling,
        )


def _say_use(policy: RetrievalPolicy) -> None:
    """The last line on stderr, also of a text that an error or Ctrl-C cuts short."""
    sys.stdout.flush()
    lambdas = " ".join(f"{policy.use[layer].lambda_mean:.2f}" for layer in sorted(policy.use))
    sys.stderr.write(
        f"mean lambda per layer: {lambdas}; lookups that fell back: {policy.lookups}\n"
    )


def lessons_of(path: Path) -> Iterator[Example]:
    """Prompts with answers of a file. Raises BadInput for rows of another form, or none."""
    from model_runner.texts import read_examples

    number = 0
    for number, example in enumerate(read_examples(path), 1):
        if example.answer is None:
            raise BadInput(
                f"{path}: example {number}: expected `prompt` and `answer`, got text only"
            )
        yield example
    if not number:
        raise BadInput(f"{path}: holds no prompt with an answer")


def lesson(prompt: str, answer: str) -> Example:
    """A typed answer. The same prompt again replaces what was learnt for it, token by token.

    A blank is put between the two where neither has one.
    """
    from knnmoe.client import ExampleRef

    from model_runner.texts import Example

    if not (prompt[-1:].isspace() or answer[:1].isspace()):
        answer = " " + answer
    digest = hashlib.blake2b(prompt.encode(errors="surrogatepass"), digest_size=16).hexdigest()
    return Example(ExampleRef(SESSION_SOURCE, digest), prompt, answer)


class Lessons:
    """Teaches one memory, if there is one; connects at the first lesson."""

    def __init__(
        self, loaded: LoadedModel, target: str, memory: str | None, durability: str
    ) -> None:
        self._loaded, self._target, self._memory = loaded, target, memory
        self._durability = durability
        self._learner: OnlineLearner | None = None
        self._open = ExitStack()

    def __enter__(self) -> Lessons:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def learn(self, example: Example) -> None:
        """Learns one answer and says so on stderr. Raises BadInput; ServiceUnavailable and others of the learner."""
        from model_runner.models import window_length
        from model_runner.texts import cut_windows

        if self._memory is None:
            raise BadInput("there is no memory to learn into: start with --memory NAME")
        length = window_length(self._loaded.model, None)
        windows = cut_windows([example], self._loaded.tokenizer, length)
        learnt = self._opened(self._memory).learn(windows)
        sys.stderr.write(f"learnt {learnt.entries} entries\n")

    def _opened(self, memory: str) -> OnlineLearner:
        from knnmoe.client import AdminClient

        from model_runner.memory_builder.learner import DURABILITIES, OnlineLearner

        if self._learner is None:
            model, fingerprint = self._loaded.model, self._loaded.fingerprint
            durability = DURABILITIES[self._durability]
            with ExitStack() as opening:
                client = opening.enter_context(AdminClient(self._target))
                self._learner = opening.enter_context(
                    OnlineLearner(model, fingerprint, client, memory, durability=durability)
                )
                self._open = opening.pop_all()
        return self._learner


def talk(generate: Callable[[str], None], lessons: Lessons, lines: Iterable[str]) -> None:
    """A prompt per line; `/learn ANSWER` gives the right answer to the last one. Ends with the input.

    What cannot be learnt, or has no tokens, is said on stderr, and the session goes on; so is a memory that is gone.
    """
    from knnmoe.client import MemoryNotFound, ServiceUnavailable

    prompt = ""
    for line in _prompted(lines):
        said = line.rstrip("\n")
        try:
            if said == LEARN or said.startswith(LEARN + " "):
                _teach(lessons, prompt, said[len(LEARN) + 1 :])
            elif said.strip():
                prompt = said
                generate(prompt)
        except (BadInput, ServiceUnavailable, MemoryNotFound) as error:
            sys.stderr.write(f"model-runner: {error}\n")


def _teach(lessons: Lessons, prompt: str, answer: str) -> None:
    if not prompt or not answer.strip():
        raise BadInput(f"{LEARN}: expected a prompt before it and an answer after it")
    lessons.learn(lesson(prompt, answer))


def _prompted(lines: Iterable[str]) -> Iterator[str]:
    """The lines; on a terminal with a mark before each."""
    every = iter(lines)
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = next(every, None)
        if line is None:
            return
        yield line

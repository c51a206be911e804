"""`model-runner generate`: text from a model that routes with a memory, and right answers that it learns meanwhile.

Imports of torch and gRPC stand inside functions: --help does not wait for them.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
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
    from model_runner.text_files import Example
    from model_runner.texts import Window

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
            "Instead of --prompt: a file of rows of `prompt` and `answer`, or of `messages`. Each prompt, or "
            "conversation before its last answer, is generated from, then the answer is learnt into the memory, "
            "before the next."
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
            help="Longest wait for one token's lookup in the sidecar (a prompt's: 2 ms more for each further token); "
            "then the own router stands.",
        ),
    ] = 0.05,
    retrieval: options.RetrievalOption = "auto",
    replica_memory: options.ReplicaMemory = None,
    replica_keys: options.ReplicaKeysOption = "f32",
    first_pass: options.FirstPassOption = "auto",
    max_staleness_s: options.MaxStaleness = None,
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

    When the sidecar is gone, a replica of the memory goes on with what it has, and says so. Without a replica, or when
    the memory is deleted meanwhile, the model's own router goes on; only learning needs the sidecar. Ends with a line
    on stderr: how much the memory spoke, and how many lookups fell back, by reason. At the start it waits for the
    sidecar up to half a second, with --on-error raise up to 10 s, and for the replica to be complete. For example:

        model-runner generate --memory law --prompt 'The tenant shall' --max-new-tokens 40

        model-runner generate --memory law --learn answers.jsonl

        model-runner generate --memory law --interactive
    """
    import torch
    from knnmoe.client import AdminClient

    from model_runner.progress import Progress
    from model_runner.retrieval import open_retriever
    from model_runner.routing_policy import RetrievalPolicy
    from model_runner.texts import open_ids, prompt_ids

    _speak_utf8()
    prompt = sys.stdin.read() if prompt == "-" else prompt
    _require_one_mode(prompt, learn, interactive, memory)
    prompt = None if prompt is None else _utf8(prompt)
    how = options.retrieval(retrieval, replica_memory, replica_keys, first_pass, max_staleness_s)
    lessons = [] if learn is None else list(lessons_of(learn))
    with ExitStack() as stack:
        if learn is not None and memory is not None:
            # What is not there is noticed before the model is loaded.
            stack.enter_context(AdminClient(target)).describe(memory)
        loaded = options.load(model, device, dtype)
        torch.manual_seed(seed)
        policy = opened = None
        if memory is not None:
            where = (target, memory, loaded.fingerprint, loaded.device, how, Progress())
            opened = stack.enter_context(
                open_retriever(*where, timeout_s=timeout_s, on_error=on_error)
            )
            policy = RetrievalPolicy(opened.retriever)
            stack.callback(_say_use, policy)
        answer = partial(_generate, loaded, policy, max_new_tokens, temperature)
        catch_up = None if opened is None else opened.catch_up
        school = stack.enter_context(Lessons(loaded, target, memory, durability, catch_up))
        if prompt is not None:
            answer(open_ids(prompt, loaded.tokenizer))
        elif interactive:
            talk(lambda said: answer(open_ids(said, loaded.tokenizer)), school, sys.stdin)
        else:
            for lesson, learn_it in school.planned(lessons):
                answer(prompt_ids(lesson, loaded.tokenizer))
                learn_it()


def _speak_utf8() -> None:
    """Whatever the locale; bytes that are not UTF-8 are found by _utf8."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


def _utf8(prompt: str) -> str:
    """A prompt as its bytes say in UTF-8, where the locale said something else. Raises BadInput."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(prompt).decode()
        except UnicodeError as error:
            raise BadInput(f"prompt: not UTF-8 ({error})") from error
    return prompt


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
    prompt: Sequence[int],
) -> None:
    """Streams prompt (token ids) and text to stdout. Raises BadInput when there are none, UnsupportedModel on NaN.

    Between two prompts the model is the frozen one: it can be learnt from.
    """
    import torch
    from transformers import TextStreamer

    from model_runner.router_hooks import RouterHooks, require_no_nan

    tokenizer, model = loaded.tokenizer, loaded.model
    if not prompt:
        raise BadInput("--prompt: got no tokens, expected some text")
    ids = torch.tensor([prompt], device=loaded.device)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )

    def no_nan(input_ids: Any, scores: Any) -> Any:
        require_no_nan(model, scores, {"input_ids": input_ids}, of="the text so far")
        return scores

    generate: Any = model.generate
    with torch.no_grad(), nullcontext() if policy is None else RouterHooks(model, policy):
        generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
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
    """Prompts or conversations with answers of a file. Raises BadInput for rows of another form, or none."""
    from model_runner.text_files import read_examples

    number = 0
    for number, example in enumerate(read_examples(path), 1):
        if example.answer is None and not example.messages:
            raise BadInput(
                f"{path}: example {number}: expected `prompt` and `answer`, or `messages`, got text only"
            )
        yield example
    if not number:
        raise BadInput(f"{path}: holds no prompt with an answer")


def lesson(prompt: str, answer: str) -> Example:
    """A typed answer. The same prompt again replaces what was learnt for it, token by token.

    A blank is put between the two where neither has one.
    """
    from knnmoe.client import ExampleRef

    from model_runner.text_files import Example

    if not (prompt[-1:].isspace() or answer[:1].isspace()):
        answer = " " + answer
    digest = hashlib.blake2b(prompt.encode(errors="surrogatepass"), digest_size=16).hexdigest()
    return Example(ExampleRef(SESSION_SOURCE, digest), prompt, answer)


class Lessons:
    """Teaches one memory, if there is one; connects at the first lesson."""

    def __init__(
        self,
        loaded: LoadedModel,
        target: str,
        memory: str | None,
        durability: str,
        catch_up: Callable[[], None] | None = None,
    ) -> None:
        """catch_up: see OnlineLearner."""
        self._loaded, self._target, self._memory = loaded, target, memory
        self._durability, self._catch_up = durability, catch_up
        self._learner: OnlineLearner | None = None
        self._open = ExitStack()

    def __enter__(self) -> Lessons:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def learn(self, example: Example) -> None:
        """Learns one answer and says so on stderr. Raises BadInput; ServiceUnavailable and others of the learner."""
        memory = self._named()
        self._learn(memory, self._cut([example]))

    def planned(self, examples: Sequence[Example]) -> Iterator[tuple[Example, Callable[[], None]]]:
        """Examples of one file, and what learns each, as learn() does. What cannot be learnt is refused before."""
        from knnmoe.client import AdminClient

        from model_runner.memory_builder.entries import windows_as_known

        memory, cut = self._named(), self._cut(examples)
        with AdminClient(self._target) as client:
            known = windows_as_known(client, memory, cut)
        windows: dict[tuple[str, str], list[Window]] = defaultdict(list)
        for as_read, as_known in zip(cut, known, strict=True):
            windows[as_read.identity, as_read.name].append(as_known)
        for example in examples:
            if group := windows.get((example.identity, example.name)):
                yield example, partial(self._learn, memory, group)

    def _named(self) -> str:
        if self._memory is None:
            raise BadInput("there is no memory to learn into: start with --memory NAME")
        return self._memory

    def _learn(self, memory: str, windows: Sequence[Window]) -> None:
        learnt = self._opened(memory).learn(windows)
        sys.stderr.write(f"learnt {learnt.entries} entries\n")

    def _cut(self, examples: Sequence[Example]) -> list[Window]:
        from model_runner.models import window_length
        from model_runner.texts import cut_windows

        length = window_length(self._loaded.model, None)
        return cut_windows(examples, self._loaded.tokenizer, length)

    def _opened(self, memory: str) -> OnlineLearner:
        from knnmoe.client import AdminClient

        from model_runner.memory_builder.learner import DURABILITIES, OnlineLearner

        if self._learner is None:
            model, fingerprint = self._loaded.model, self._loaded.fingerprint
            durability = DURABILITIES[self._durability]
            with ExitStack() as opening:
                client = opening.enter_context(AdminClient(self._target))
                learner = OnlineLearner(
                    *(model, fingerprint, client, memory),
                    durability=durability,
                    catch_up=self._catch_up,
                    tokenizer=self._loaded.tokenizer,
                )
                self._learner = opening.enter_context(learner)
                self._open = opening.pop_all()
        return self._learner


def talk(generate: Callable[[str], None], lessons: Lessons, lines: Iterable[str]) -> None:
    """A prompt per line; `/learn ANSWER` gives the right answer to the last one. Ends with the input.

    What cannot be learnt, or has no tokens, is said on stderr, and the session goes on; so is a memory that is gone.
    """
    from knnmoe.client import MemoryNotFound, ServiceUnavailable

    prompt = ""
    for line in _prompted(lines):
        try:
            said = _utf8(line.rstrip("\n"))
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

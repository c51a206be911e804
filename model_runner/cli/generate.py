"""`model-runner generate`: text from a model that routes with a memory, and right answers that it learns meanwhile.

Imports of torch and gRPC stand inside functions: --help does not wait for them.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from model_runner.cli import options
from model_runner.cli.session import (
    Conversation,
    Lessons,
    Prompts,
    conversations_of,
    lessons_of,
    talk,
    utf8,
)
from model_runner.errors import BadInput

if TYPE_CHECKING:
    from model_runner.models import LoadedModel
    from model_runner.routing_policy import RetrievalPolicy


def generate(
    prompt: Annotated[
        str | None, typer.Option(help="Text to go on from; - reads it from stdin.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            help="Memory to route with; none = the plain model.",
            autocompletion=options.complete_memory,
        ),
    ] = None,
    messages: Annotated[
        Path | None,
        options.file_option(
            "Instead of --prompt: a file of rows of `messages`. Each conversation is answered, by the model's chat "
            "template; one that ends with the assistant's turn, from before it."
        ),
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
            "`/learn ANSWER` teaches the memory the right answer to the last prompt and shows what that did.",
        ),
    ] = False,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="The prompt, or each line of --interactive, is a user's turn for the model's chat template. "
            "A session keeps the conversation; a line `/new` begins another.",
        ),
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="With --chat: a system turn before the conversation.")
    ] = None,
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
    from model_runner.texts import prompt_ids

    _speak_utf8()
    prompt = sys.stdin.read() if prompt == "-" else prompt
    _require_one_mode(prompt, messages, learn, interactive, memory)
    _require_chat(chat, system, prompt is not None or interactive)
    prompt = None if prompt is None else utf8(prompt)
    how = options.retrieval(retrieval, replica_memory, replica_keys, first_pass, max_staleness_s)
    lessons = [] if learn is None else list(lessons_of(learn))
    conversations = [] if messages is None else conversations_of(messages)
    with ExitStack() as stack:
        if learn is not None and memory is not None:
            # What is not there is noticed before the model is loaded.
            stack.enter_context(AdminClient(target)).describe(memory)
        loaded = options.load(model, device, dtype)
        session = Conversation(loaded.tokenizer, system) if chat else Prompts(loaded.tokenizer)
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
        only_answer = partial(answer, with_prompt=False)
        school = stack.enter_context(Lessons(loaded, target, memory, durability, opened))
        if prompt is not None:
            (only_answer if chat else answer)(session.ids(prompt))
        elif interactive:
            _suggest_chat(chat, loaded.tokenizer)
            talk(only_answer if chat else answer, session, school, sys.stdin)
        for conversation in conversations:
            if len(conversations) > 1:
                sys.stderr.write(f"conversation {conversation.name}:\n")
            only_answer(prompt_ids(conversation, loaded.tokenizer))
        for lesson, learn_it in school.planned(lessons) if lessons else ():
            answer(prompt_ids(lesson, loaded.tokenizer))
            learn_it()


def _speak_utf8() -> None:
    """Whatever the locale; bytes that are not UTF-8 are found by utf8."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


def _require_one_mode(
    prompt: str | None,
    messages: Path | None,
    learn: Path | None,
    interactive: bool,
    memory: str | None,
) -> None:
    given = [prompt is not None, messages is not None, learn is not None, interactive]
    if sum(given) != 1:
        raise BadInput(
            f"--prompt, --messages, --learn, --interactive: got {sum(given)} of them, expected one: "
            "what to generate from"
        )
    if learn is not None and memory is None:
        raise BadInput("--learn: needs --memory NAME, the memory to learn into")


def _require_chat(chat: bool, system: str | None, is_typed: bool) -> None:
    if system is not None and not chat:
        raise BadInput("--system: needs --chat, which renders turns")
    if chat and not is_typed:
        raise BadInput(
            "--chat: needs --prompt or --interactive; rows of `messages` are conversations as they are"
        )


def _suggest_chat(chat: bool, tokenizer: Any) -> None:
    if not chat and getattr(tokenizer, "chat_template", None) is not None:
        sys.stderr.write(
            "each line is text to go on from; with --chat it is a turn of a conversation\n"
        )


def _generate(
    loaded: LoadedModel,
    policy: RetrievalPolicy | None,
    max_new_tokens: int,
    temperature: float,
    prompt: Sequence[int],
    *,
    with_prompt: bool = True,
) -> str:
    """Streams text to stdout, after its prompt (token ids) or without it; returns it, without the prompt.

    Raises BadInput for a prompt of no tokens or too many, UnsupportedModel on NaN. Between two prompts the model is
    the frozen one: it can be learnt from.
    """
    import torch

    from model_runner.router_hooks import RouterHooks, require_no_nan

    tokenizer, model = loaded.tokenizer, loaded.model
    room = _room(model, len(prompt))
    ids = torch.tensor([prompt], device=loaded.device)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )

    def no_nan(input_ids: Any, scores: Any) -> Any:
        require_no_nan(model, scores, {"input_ids": input_ids}, of="the text so far")
        return scores

    generate: Any = model.generate
    with (
        _streaming(tokenizer, with_prompt) as streamer,
        torch.no_grad(),
        nullcontext() if policy is None else RouterHooks(model, policy),
    ):
        output = generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(max_new_tokens, room or max_new_tokens),
            streamer=streamer,
            pad_token_id=tokenizer.eos_token_id,
            logits_processor=[no_nan],
            **sampling,
        )
    new = output[0, len(prompt) :]
    if room is not None and room < max_new_tokens and len(new) == room:
        sys.stderr.write(
            f"the text ends here: the model was made for {len(prompt) + room} tokens\n"
        )
    return str(tokenizer.decode(new, skip_special_tokens=True))


def _room(model: Any, tokens: int) -> int | None:
    """How many tokens may follow so many; None: nobody knows. Raises BadInput when none may."""
    from model_runner.models import longest_text

    if not tokens:
        raise BadInput("--prompt: got no tokens, expected some text")
    longest = longest_text(model)
    if longest is not None and tokens >= longest:
        raise BadInput(
            f"prompt: got {tokens} tokens, expected fewer than the {longest} that the model was made for; shorten it, "
            "or begin another conversation"
        )
    return None if longest is None else longest - tokens


@contextmanager
def _streaming(tokenizer: Any, with_prompt: bool) -> Iterator[Any]:
    """A streamer to stdout. Text that is cut short ends its line; nothing else is written into it."""
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=not with_prompt, skip_special_tokens=True)
    write, is_within_a_line = streamer.on_finalized_text, False

    def noted(text: str, stream_end: bool = False) -> None:
        nonlocal is_within_a_line
        write(text, stream_end=stream_end)
        is_within_a_line = not stream_end and (is_within_a_line or bool(text))

    streamer.on_finalized_text = noted
    with _stderr_waits():
        try:
            yield streamer
        finally:
            if is_within_a_line:
                streamer.end()
            sys.stdout.flush()


@contextmanager
def _stderr_waits() -> Iterator[None]:
    """Where stdout and stderr are one terminal, pipe or file, what goes to stderr within it comes after it.

    By its descriptor: warnings come from loggers, from torch's and gRPC's C++ and from threads.
    """
    try:
        out, err = sys.stdout.fileno(), sys.stderr.fileno()
    except io.UnsupportedOperation:  # neither is a file
        out = err = -1
    if out < 0 or not os.path.samestat(os.fstat(out), os.fstat(err)):
        yield
        return
    with tempfile.TemporaryFile() as waiting, os.fdopen(os.dup(err), "wb") as real:
        sys.stderr.flush()
        os.dup2(waiting.fileno(), err)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(real.fileno(), err)
            waiting.seek(0)
            real.write(waiting.read())


def _say_use(policy: RetrievalPolicy) -> None:
    """The last line on stderr, also of a text that an error or Ctrl-C cuts short."""
    sys.stdout.flush()
    lambdas = " ".join(f"{policy.use[layer].lambda_mean:.2f}" for layer in sorted(policy.use))
    sys.stderr.write(
        f"mean lambda per layer: {lambdas}; lookups that fell back: {policy.lookups}\n"
    )

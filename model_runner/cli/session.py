"""A session of `model-runner generate`: lines that are typed, conversations, and right answers that are learnt.

Imports of torch and gRPC stand inside functions: --help does not wait for them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_runner.errors import BadInput

if TYPE_CHECKING:
    from knnmoe.client import ExampleRef

    from model_runner.memory_builder.learner import OnlineLearner
    from model_runner.models import LoadedModel
    from model_runner.retrieval import OpenMemory
    from model_runner.text_files import Example
    from model_runner.texts import Window

# Provenance of what is taught in a session; the example is a digest of what comes before the answer.
SESSION_SOURCE = "session"
LEARN, NEW = "/learn", "/new"
EXPECT = (
    "what to expect: the memory changes which experts run and stores no facts. The loss of this answer falls somewhat, "
    "here and in like places; the model will hardly say it word for word. Facts belong in the prompt.\n"
)
_NOTHING_TO_LEARN = f"{LEARN}: expected a prompt before it and an answer after it"


def utf8(prompt: str) -> str:
    """A prompt as its bytes say in UTF-8, where the locale said something else. Raises BadInput."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(prompt).decode()
        except UnicodeError as error:
            raise BadInput(f"prompt: not UTF-8 ({error})") from error
    return prompt


def conversations_of(path: Path) -> list[Example]:
    """Conversations of a file, to be answered. Raises BadInput for rows of another form, or none."""
    from model_runner.text_files import read_examples

    examples = read_examples(path)
    for number, example in enumerate(examples, 1):
        if not example.messages:
            raise BadInput(f"{path}: example {number}: expected `messages`, got `text` or `prompt`")
    if not examples:
        raise BadInput(f"{path}: holds no conversation")
    return examples


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
    from model_runner.text_files import Example

    if not (prompt[-1:].isspace() or answer[:1].isspace()):
        answer = " " + answer
    return Example(_session_ref(prompt), prompt, answer)


def _session_ref(before: str) -> ExampleRef:
    from knnmoe.client import ExampleRef

    digest = hashlib.blake2b(before.encode(errors="surrogatepass"), digest_size=16).hexdigest()
    return ExampleRef(SESSION_SOURCE, digest)


class Lessons:
    """Teaches one memory, if there is one; connects at the first lesson."""

    def __init__(
        self,
        loaded: LoadedModel,
        target: str,
        memory: str | None,
        durability: str,
        opened: OpenMemory | None = None,
    ) -> None:
        """opened: the memory as it is read meanwhile, if it is."""
        self._loaded, self._target, self._memory = loaded, target, memory
        self._durability, self._opened_memory = durability, opened
        self._catch_up = None if opened is None else opened.catch_up
        self._has_said_what_to_expect = False
        self._learner: OnlineLearner | None = None
        self._open = ExitStack()

    def __enter__(self) -> Lessons:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def learn(self, example: Example) -> None:
        """Learns one answer and says on stderr what that did to its loss.

        Raises BadInput; ServiceUnavailable and others of the learner.
        """
        learner, windows = self._opened(self._named()), self._cut([example])
        before = self._loss(windows)
        learnt = learner.learn(windows)
        after = self._loss(windows)
        sys.stderr.write(
            f"learnt {learnt.entries} entries; loss of this answer: {before} before, {after} after\n"
        )
        if not self._has_said_what_to_expect:
            self._has_said_what_to_expect = True
            sys.stderr.write(EXPECT)

    def _loss(self, windows: Sequence[Window]) -> str:
        """Nats per token of the answer, with the memory as it is."""
        from model_runner.progress import Progress
        from model_runner.routing_policy import RetrievalPolicy
        from model_runner.scoring import score

        # Of its own: what the session says at its end is of the texts.
        policy = (
            None if self._opened_memory is None else RetrievalPolicy(self._opened_memory.retriever)
        )
        scores = score(self._loaded.model, windows, policy, Progress(quiet=True), what="")
        fell_back = policy is not None and policy.lookups.fell_back
        return f"{scores.nll:.4f}" + (
            " (partly of the plain model: lookups fell back)" if fell_back else ""
        )

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


class Prompts:
    """A session in which each line is a text to go on from."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._last = tokenizer, ""

    def ids(self, said: str) -> list[int]:
        """What the model reads for a line."""
        from model_runner.texts import open_ids

        self._last = said
        return open_ids(said, self._tokenizer)

    def answered(self, text: str) -> None:
        """Takes note of what the model said."""

    def lesson(self, answer: str) -> Example:
        """The right answer to the last line. Raises BadInput when there is none."""
        if not self._last:
            raise BadInput(_NOTHING_TO_LEARN)
        return lesson(self._last, answer)


class Conversation:
    """A session in which each line is a user's turn; the model reads the whole of it, by its chat template."""

    def __init__(self, tokenizer: Any, system: str | None) -> None:
        """Raises BadInput for a tokenizer without a chat template."""
        from model_runner.texts import require_chat_template

        require_chat_template(tokenizer, "--chat: turns are to be rendered", "leave --chat out")
        self._tokenizer = tokenizer
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._turns, self._asked = list[dict[str, Any]](self._first), ""

    def begin_again(self) -> None:
        """Another conversation, with the same system turn."""
        self._turns = list(self._first)

    def ids(self, said: str) -> list[int]:
        """What the model reads: the conversation so far and this turn."""
        from model_runner.texts import prompt_ids

        self._asked = said
        return prompt_ids(_conversation([*self._turns, _turn("user", said)]), self._tokenizer)

    def answered(self, text: str) -> None:
        """The turn and its answer become part of the conversation."""
        # No loss counts on what the model said itself.
        self._turns += [_turn("user", self._asked), _turn("assistant", text, weight=0)]

    def lesson(self, answer: str) -> Example:
        """The conversation with the right last answer, which takes the place of the model's own from now on.

        Raises BadInput when nothing was asked.
        """
        if len(self._turns) < len(self._first) + 2:
            raise BadInput(_NOTHING_TO_LEARN)
        before = self._turns[:-1]
        self._turns[-1] = _turn("assistant", answer, weight=0)
        return _conversation([*before, _turn("assistant", answer)], named_by=before)


def _turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _conversation(
    turns: Sequence[Mapping[str, Any]], named_by: Sequence[Mapping[str, Any]] = ()
) -> Example:
    """The same turns before another answer are the same example: what was learnt for it is replaced."""
    from model_runner.text_files import Example

    return Example(_session_ref(json.dumps(list(named_by))), "", messages=tuple(turns))


def talk(
    generate: Callable[[list[int]], str],
    session: Prompts | Conversation,
    lessons: Lessons,
    lines: Iterable[str],
) -> None:
    """A prompt, or a user's turn, per line. Ends with the input.

    `/learn ANSWER` gives the right answer to the last one, `/new` begins another conversation. generate: from token
    ids. What cannot be learnt, or has no tokens, is said on stderr, and the session goes on; so is a memory that is
    gone.
    """
    from knnmoe.client import MemoryNotFound, ServiceUnavailable

    for line in _prompted(lines):
        try:
            said = utf8(line.rstrip("\n"))
            if said == LEARN or said.startswith(LEARN + " "):
                _teach(lessons, session, said[len(LEARN) + 1 :])
            elif said.strip() == NEW and isinstance(session, Conversation):
                session.begin_again()
            elif said.strip():
                session.answered(generate(session.ids(said)))
        except (BadInput, ServiceUnavailable, MemoryNotFound) as error:
            sys.stderr.write(f"model-runner: {error}\n")


def _teach(lessons: Lessons, session: Prompts | Conversation, answer: str) -> None:
    if not answer.strip():
        raise BadInput(_NOTHING_TO_LEARN)
    lessons.learn(session.lesson(answer))


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

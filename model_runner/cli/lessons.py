"""Right answers that a generation is given: read, learnt at once, and typed in a session."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from knnmoe.client import AdminClient, ExampleRef, ServiceUnavailable

from model_runner.cli.learn import DURABILITIES
from model_runner.errors import BadInput
from model_runner.memory_builder.learner import OnlineLearner
from model_runner.models import LoadedModel, window_length
from model_runner.texts import Example, cut_windows, read_examples

# Provenance of what is taught in a session; the example is a digest of the prompt.
SESSION_SOURCE = "session"
LEARN = "/learn"


def lessons_of(path: Path) -> Iterator[Example]:
    """Prompts with answers of a file. Raises BadInput for rows of another form, or none."""
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
        self._durability = DURABILITIES[durability]
        self._learner: OnlineLearner | None = None
        self._open = ExitStack()

    def __enter__(self) -> Lessons:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def learn(self, example: Example) -> None:
        """Learns one answer and says so on stderr. Raises BadInput; ServiceUnavailable and others of the learner."""
        if self._memory is None:
            raise BadInput("there is no memory to learn into: start with --memory NAME")
        length = window_length(self._loaded.model, None)
        windows = cut_windows([example], self._loaded.tokenizer, length)
        learnt = self._opened(self._memory).learn(windows)
        sys.stderr.write(f"learnt {learnt.entries} entries\n")

    def _opened(self, memory: str) -> OnlineLearner:
        if self._learner is None:
            with ExitStack() as opening:
                client = opening.enter_context(AdminClient(self._target))
                loaded = self._loaded
                self._learner = opening.enter_context(
                    OnlineLearner(
                        loaded.model,
                        loaded.fingerprint,
                        client,
                        memory,
                        durability=self._durability,
                    )
                )
                self._open = opening.pop_all()
        return self._learner


def talk(generate: Callable[[str], None], lessons: Lessons, lines: Iterable[str]) -> None:
    """A prompt per line; `/learn ANSWER` gives the right answer to the last one. Ends with the input.

    What cannot be learnt, or has no tokens, is said on stderr, and the session goes on.
    """
    prompt = ""
    for line in _prompted(lines):
        said = line.rstrip("\n")
        try:
            if said == LEARN or said.startswith(LEARN + " "):
                _teach(lessons, prompt, said[len(LEARN) + 1 :])
            elif said.strip():
                prompt = said
                generate(prompt)
        except (BadInput, ServiceUnavailable) as error:
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

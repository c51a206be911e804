"""The parts of online learning that need no sidecar: recipes, running norms, lessons."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from knnmoe.client import ServiceUnavailable
from knnmoe.v1.types_pb2 import (
    MEMORY_KIND_ASSIGNMENT,
    MEMORY_KIND_LOGIT_DELTA,
    MEMORY_KIND_LOGITS,
    MemorySettings,
)

from model_runner.cli.session import Prompts, lesson, lessons_of, talk
from model_runner.errors import BadInput
from model_runner.memory_builder.learner import (
    NORMS_REMEMBERED,
    KnownTokens,
    RunningMedians,
)
from model_runner.memory_builder.recipes import PAPER, PAPER_V2, RECOMMENDED, recipe_of
from model_runner.text_files import Example
from tests.tiny_checkpoint import byte_tokenizer


@pytest.mark.parametrize(
    ("preset", "kind", "recipe"),
    [
        ("paper", MEMORY_KIND_ASSIGNMENT, PAPER),
        ("recommended", MEMORY_KIND_LOGIT_DELTA, RECOMMENDED),
        ("paper-v2", MEMORY_KIND_LOGITS, PAPER_V2),
        ("recommended", MEMORY_KIND_ASSIGNMENT, PAPER),
        ("recommended", MEMORY_KIND_LOGITS, PAPER_V2),
        ("paper", MEMORY_KIND_LOGIT_DELTA, RECOMMENDED),
        ("paper-v2", MEMORY_KIND_ASSIGNMENT, PAPER),
    ],
)
def test_the_recipe_is_the_presets_unless_it_makes_another_kind(
    preset: str, kind: Any, recipe: object
) -> None:
    assert recipe_of("law", MemorySettings(preset=preset, kind=kind)) is recipe


def test_a_preset_that_is_not_known() -> None:
    with pytest.raises(BadInput, match=r"memory 'law' has preset 'best', expected paper or"):
        recipe_of("law", MemorySettings(preset="best"))


def traced(*norms: float) -> Any:
    """One layer's tokens with these gradient norms."""
    trace = SimpleNamespace(site=SimpleNamespace(layer=0), gradient=torch.tensor(norms))
    return SimpleNamespace(traces=[trace], gradient_norms=lambda t: t.gradient)


def test_medians_run_over_what_was_seen_last() -> None:
    medians = RunningMedians(1)
    assert medians.with_norms_of(traced(3.0, 1.0, 2.0)) == [2.0]
    assert medians.with_norms_of(traced(9.0, 8.0)) == [3.0]
    assert medians.with_norms_of(traced(*[7.0] * NORMS_REMEMBERED)) == [7.0]


@pytest.mark.parametrize("threshold", [0, -1, 1.5, float("nan")])
def test_a_threshold_that_is_no_similarity(threshold: float) -> None:
    with pytest.raises(BadInput, match="expected a similarity in"):
        KnownTokens(None, threshold)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [("The", "end", " end"), ("The ", "end", "end"), ("The", " end", " end"), ("", "end", " end")],
)
def test_a_blank_between_prompt_and_answer(prompt: str, answer: str, text: str) -> None:
    assert lesson(prompt, answer).answer == text


def test_a_prompt_is_its_lessons_example() -> None:
    one, corrected, other = lesson("a", "b"), lesson("a", "c"), lesson("b", "b")
    assert one.ref == corrected.ref != other.ref
    assert one.ref.source == "session"


def test_lessons_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n")
    [example] = lessons_of(path)
    assert (example.text, example.answer) == ("a", "b")
    path.write_text(json.dumps({"text": "a"}) + "\n")
    with pytest.raises(BadInput, match="example 1: expected `prompt` and `answer`"):
        list(lessons_of(path))
    path.write_text("")
    with pytest.raises(BadInput, match="holds no prompt with an answer"):
        list(lessons_of(path))


class Pupil:
    """Keeps what it is taught; does not learn when it has an error to raise."""

    def __init__(self, error: Exception | None = None) -> None:
        self.learnt: list[Example] = []
        self._error = error

    def learn(self, example: Example) -> None:
        if self._error is not None:
            raise self._error
        self.learnt.append(example)


def session(lines: list[str], pupil: Pupil) -> list[str]:
    """The prompts of a session."""
    prompts, tokenizer = list[str](), byte_tokenizer()

    def say(ids: list[int]) -> str:
        prompts.append(tokenizer.decode(ids))
        return "said"

    typed = [line + "\n" for line in lines]
    talk(say, Prompts(tokenizer), pupil, typed)  # type: ignore[arg-type]
    return prompts


def test_a_session() -> None:
    pupil = Pupil()
    lines = ["one", "", "/learn two", "/learnt is a word", "/learn three"]
    assert session(lines, pupil) == ["one", "/learnt is a word"]
    assert [(e.text, e.answer) for e in pupil.learnt] == [
        ("one", " two"),
        ("/learnt is a word", " three"),
    ]


@pytest.mark.parametrize("lines", [["/learn two"], ["one", "/learn"], ["one", "/learn  "]])
def test_a_lesson_without_a_prompt_or_an_answer(
    lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pupil = Pupil()
    assert session([*lines, "last"], pupil)[-1] == "last"
    assert pupil.learnt == []
    assert "/learn: expected a prompt before it and an answer after it" in capsys.readouterr().err


def test_a_session_outlives_a_lesson_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    pupil = Pupil(ServiceUnavailable("sidecar at x: gone"))
    assert session(["one", "/learn two", "three"], pupil) == ["one", "three"]
    assert "model-runner: sidecar at x: gone" in capsys.readouterr().err

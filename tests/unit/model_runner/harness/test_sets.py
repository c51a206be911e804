"""Rows of every schema become the question that the harness's task asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from model_runner.cli.harness import LARGEST, SMALLEST, SetName
from model_runner.errors import BadInput
from model_runner.harness.reference import SIZES
from model_runner.harness.sets import SETS, read_items
from tests import question_sets
from tests.question_sets import SCHEMAS, choices, question, write

LETTERS = "ABCDEFGHIJ"


def test_the_command_has_the_names_and_sizes() -> None:
    assert get_args(SetName) == tuple(SETS)
    assert {schema[0] for schema in SCHEMAS.values()} == set(SETS)
    assert (SMALLEST, LARGEST) == SIZES


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_schema_is_read(schema: str, tmp_path: Path) -> None:
    name, row, ending = SCHEMAS[schema]
    items = read_items(name, write(tmp_path / f"train.{ending}", [row(n) for n in range(9)]), 0)
    assert [item.question.strip() for item in items] == [question(n) for n in range(9)]
    assert all(item.question.strip() in item.prompt for item in items)
    assert len({item.name for item in items}) == 9
    # Another form of the file says the same.
    other = write(tmp_path / "train.jsonl", [row(n) for n in range(9)])
    assert read_items(name, other, 0) == items


@pytest.mark.parametrize("schema", [s for s in SCHEMAS if "gpqa" not in s and "mbpp" not in s])
def test_the_answer_is_the_letter_of_the_right_choice(schema: str, tmp_path: Path) -> None:
    name, row, ending = SCHEMAS[schema]
    items = read_items(name, write(tmp_path / f"train.{ending}", [row(n) for n in range(9)]), 0)
    for number, item in enumerate(items):
        right = number % 4
        assert item.answer == f" {LETTERS[right]}"
        assert item.explained == f" {LETTERS[right]}. {choices(number)[right]}"
        assert "right" in item.explained
        lines = [f"{LETTERS[n]}. {text}" for n, text in enumerate(choices(number))]
        assert item.prompt.endswith("\n".join([*lines, "Answer:"]))


def test_subjects_and_names(tmp_path: Path) -> None:
    def first(schema: str) -> tuple[str, str]:
        name, row, ending = SCHEMAS[schema]
        [item] = read_items(name, write(tmp_path / f"{schema}.{ending}", [row(1)]), 0)
        return item.subject, item.name

    assert first("gpqa") == ("Iron", "rec1")
    assert first("supergpqa") == ("Iron", "uuid1")
    assert first("mmlu")[0] == "marketing"
    assert first("mmlu_auxiliary")[0] == ""
    assert first("medqa_hf") == ("", "train-00001")
    assert first("medqa")[0] == "step2&3"
    assert first("medmcqa") == ("Surgery", "00000001-ffff")
    assert first("mbpp") == ("", "601")


def test_gpqa_is_shuffled_by_seed_and_question_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "gpqa_main.csv", [question_sets.gpqa(n) for n in range(20)])
    items = read_items("gpqa", path, 3)
    for number, item in enumerate(items):
        at = item.choices.index(f"right {number}. that it is")
        assert item.answer == f" ({LETTERS[at]})"
        assert item.explained == f" ({LETTERS[at]}) right {number}. that it is"
        assert f"wrong {number} 1" in item.choices  # cleaned as the task does
    assert len({item.answer for item in items}) == 4
    assert read_items("gpqa", path, 3) == items != read_items("gpqa", path, 4)
    some = write(tmp_path / "some.csv", [question_sets.gpqa(n) for n in (7, 5)])
    assert read_items("gpqa", some, 3) == [items[7], items[5]]


def test_supergpqa_has_as_many_letters_as_options(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", [question_sets.supergpqa(n) for n in (9, 6)])
    ten, seven = read_items("supergpqa", path, 0)
    assert ten.prompt.endswith("\nJ) answer 9 right\nAnswer:")
    assert ten.answer == " J"
    assert seven.prompt.endswith("\nG) answer 6 right\nAnswer:")


def test_mbpp_ends_as_its_examples_do(tmp_path: Path) -> None:
    full, sanitized = (
        read_items("mbpp", write(tmp_path / f"{n}.parquet", [row(4)]), 0)[0]
        for n, row in enumerate([question_sets.mbpp, question_sets.mbpp_sanitized])
    )
    assert full.answer == "def f4(x):\n  return x + 4\n[DONE]"
    tests = "assert f4(0) == 4\nassert f4(1) == 5\nassert f4(2) == 6"
    assert full.prompt.endswith(f"these tests:\n\n{tests}\n[BEGIN]\n")
    assert sanitized.prompt == full.prompt.replace("assert f4(2) == 6", "")


def test_test_splits_without_answers_are_read(tmp_path: Path) -> None:
    def unanswered(schema: str, **changes: Any) -> str:
        name, row, ending = SCHEMAS[schema]
        [item] = read_items(name, write(tmp_path / f"{schema}.{ending}", [row(1) | changes]), 0)
        return item.answer

    assert unanswered("medmcqa", cop=-1) == unanswered("medqa", answer_idx=None) == ""
    assert unanswered("supergpqa", answer_letter=None) == unanswered("mmlu", answer=None) == ""


BAD = {
    "medmcqa": [
        ({"cop": 4}, "`cop` is 4, expected 0 to 3"),
        ({"question": None}, "expected `question` and `opa` and `opb`"),
        ({"question": 7}, "`question` is 7, expected a string"),
    ],
    "mmlu": [
        ({"choices": "A"}, "`choices` is 'A', expected a list of strings"),
        ({"choices": []}, r"`choices` is \[\], expected a list"),
        ({"answer": True}, "`answer` is True, expected 0 to 3"),
    ],
    "medqa": [
        ({"answer_idx": "E"}, "`answer_idx` is 'E', expected A to D"),
        ({"options": []}, r"`options` is \[\], expected an object of letters"),
    ],
    "mbpp": [({"test_list": [1]}, r"`test_list` is \[1\]"), ({"code": None}, "has .*expected")],
}


@pytest.mark.parametrize(
    ("schema", "changes", "said"), [(s, *case) for s, cases in BAD.items() for case in cases]
)
def test_bad_rows_are_named(
    schema: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    name, row, _ = SCHEMAS[schema]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (row(0), row(1) | changes)))
    with pytest.raises(BadInput, match=rf"train\.jsonl: row 2: .*{said}"):
        read_items(name, path, 0)


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl", "txt"])
def test_the_file_of_another_set_is_named(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"train.{ending}"
    if ending == "txt":
        path.write_text("once upon a time")
    else:
        write(path, [question_sets.medmcqa(1)])
    with pytest.raises(BadInput, match=rf"train\.{ending}.*expected.*`Question`"):
        read_items("gpqa", path, 0)


@pytest.mark.parametrize(("ending", "text"), [("jsonl", ""), ("csv", "question,opa,opb\n")])
def test_a_file_without_rows_is_named(ending: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / f"test.{ending}"
    path.write_text(text)
    with pytest.raises(BadInput, match=rf"test\.{ending}: holds no rows, expected those of"):
        read_items("medmcqa", path, 0)

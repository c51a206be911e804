"""Test items are excluded, the rest is drawn evenly, and the command says all of it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from model_runner.cli.app import app
from model_runner.errors import BadInput
from model_runner.harness.reference import Reason, make_reference
from model_runner.harness.sets import Item
from model_runner.text_files import read_examples
from tests.question_sets import SCHEMAS, medmcqa, mmlu, question, write


def item(name: str, asked: str = "", subject: str = "", choices: str = "1 2") -> Item:
    asked = asked or f"{name} {name} why"
    return Item(name, subject, asked, tuple(choices.split()), f"{asked}?", " A", " A. 1")


TEST = item("test", "Of the seven hills that stand around the old town, which is highest?")


def reasons(*items: Item, common: int = 5, tests: tuple[Item, ...] = (TEST,)) -> list[object]:
    others = [item(f"other{n}") for n in range(20)]
    made = make_reference([*items, *others], tests, 20, 0, common=common)
    assert len(made.items) == 20
    return [(each.item.name, each.reason, each.test_item) for each in made.left_out]


def test_a_question_of_a_test_item_is_left_out_however_it_is_written() -> None:
    said = "OF THE SEVEN HILLS - that stand around the old town: which is\nhighest"
    assert reasons(item("a", said)) == [("a", Reason.TEST_ITEM, "test")]
    short = item("short", "Which is it?")
    assert reasons(item("b", "which is it", choices="3 4"), tests=(short,)) == [
        ("b", Reason.TEST_ITEM, "short")
    ]
    blank = item("blank", "The ___ of the\xad town\u200b is ____?")
    assert reasons(item("c", "the _ of the town is"), tests=(blank,)) == [
        ("c", Reason.TEST_ITEM, "blank")
    ]


def test_eight_words_in_a_row_are_enough_and_seven_are_not() -> None:
    eight, seven = (
        "seven hills that stand around the old town",
        "hills that stand around the old town",
    )
    assert reasons(item("a", f"Name the {eight} has"), item("b", f"Name the five {seven} has")) == [
        ("a", Reason.TEST_WORDS, "test")
    ]


def test_how_an_exam_asks_does_not_count() -> None:
    stem = "which of the following is the most likely diagnosis now"
    tests = tuple(item(f"t{n}", f"{n} days of cough, {stem}?") for n in range(6))
    mine = item("a", f"Blue fingers: {stem}")
    assert reasons(mine, tests=tests) == []
    assert reasons(mine, tests=tests, common=6) == [("a", Reason.TEST_WORDS, "t0")]
    assert reasons(mine, tests=tests, common=0) == [("a", Reason.TEST_WORDS, "t0")]
    # A test file that is given twice is one.
    assert reasons(mine, tests=tests[:3] * 3) == [("a", Reason.TEST_WORDS, "t0")]
    made = make_reference([item(f"o{n}") for n in range(20)], tests, 20, 0)
    assert made.common == 6  # of the seven runs of 8 words all but the one with the number


def test_what_is_asked_of_other_choices_each_time_is_told_apart_by_them() -> None:
    tests = tuple(item(f"t{n}", "Which is true?", choices=f"{n} no") for n in range(6))
    same, other = item("a", "Which is true?", choices="no 3"), item("b", "Which is true?")
    assert reasons(same, other, tests=tests) == [("a", Reason.TEST_ITEM, "t3")]


def test_rows_without_an_answer_and_repeated_ones() -> None:
    silent, once, again = replace(item("s"), answer=""), item("x", "why me"), item("y", "Why, me!")
    assert reasons(silent, once, again) == [
        ("s", Reason.NO_ANSWER, ""),
        ("y", Reason.REPEATED, ""),
    ]


def test_it_is_drawn_evenly_and_the_smaller_is_part_of_the_larger() -> None:
    items = [item(f"{subject}{n}", subject=subject) for subject in "abc" for n in range(40)]
    items += [item(f"d{n}", subject="d") for n in range(3)]
    by_size = {n: make_reference(items, [TEST], n, 7).items for n in (20, 41, 100)}
    assert Counter(i.subject for i in by_size[20])["d"] == 3
    of_41 = Counter(i.subject for i in by_size[41])
    assert of_41.pop("d") == 3
    assert sorted(of_41.values()) == [12, 13, 13]
    assert set(by_size[20]) < set(by_size[41]) < set(by_size[100])
    assert list(by_size[100]) == [i for i in items if i in by_size[100]]  # in the files' order
    assert make_reference(items, [TEST], 41, 7).items == by_size[41]
    assert make_reference(items, [TEST], 41, 8).items != by_size[41]
    assert set(make_reference(list(reversed(items)), [TEST], 41, 7).items) != set()


def test_what_cannot_be_made_is_said() -> None:
    items = [item(f"a{n}", subject="a") for n in range(20)]
    with pytest.raises(BadInput, match=r"size: got 21, but of 21 rows 20 remain \(1 the question"):
        make_reference([*items, TEST], [TEST], 21, 0)
    with pytest.raises(BadInput, match=r"of 1 rows 0 remain \(1 the question of .*\); give more"):
        make_reference([TEST], [TEST], 20, 0)
    with pytest.raises(BadInput, match="subject: got 'b', the files have 'a'"):
        make_reference(items, [TEST], 20, 0, subjects=["b"])
    with pytest.raises(BadInput, match="test files: hold no rows"):
        make_reference(items, [], 20, 0)
    named_twice = [*items, replace(item("other"), name="a3")]
    with pytest.raises(BadInput, match="2 different rows are named 'a3'"):
        make_reference(named_twice, [TEST], 20, 0)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_command_makes_what_build_reads(schema: str, tmp_path: Path) -> None:
    name, row, ending = SCHEMAS[schema]
    train = [row(n) for n in range(80)]
    test = [row(n) for n in (3, 30, *range(100, 110))]
    out, left_out = tmp_path / "reference.jsonl", tmp_path / "left_out.jsonl"
    words = ["reference", name, "--files", str(write(tmp_path / f"train.{ending}", train))]
    words += ["--test-files", str(write(tmp_path / f"test.{ending}", test)), "--out", str(out)]
    words += ["--size", "25", "--left-out", str(left_out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "80 rows, compared with 12 test items" in done.output
    assert "2 left out: the question of a test item" in done.output
    examples = read_examples(out)
    assert len(examples) == 25
    assert all(example.name.startswith(f"{name}-") and example.answer for example in examples)
    asked = [example.text for example in examples]
    assert not any(question(n) in text for n in (3, 30) for text in asked)
    rows = [json.loads(line) for line in left_out.read_text().splitlines()]
    of_tests = [each for each in rows if each["test_item"]]
    assert [each["why"] for each in of_tests] == ["the question of a test item"] * 2
    if schema == "mmlu_medical":  # of three subjects one is not medical
        assert len(rows) == 2 + 27
        assert {json.loads(line)["subject"] for line in out.read_text().splitlines()} == {
            "anatomy",
            "college_biology",
        }


def test_subjects_texts_and_standard_output(tmp_path: Path) -> None:
    train = write(tmp_path / "train.parquet", [medmcqa(n) for n in range(90)])
    test = write(tmp_path / "test.parquet", [medmcqa(n) for n in range(90, 95)])
    words = ["reference", "medmcqa", "--files", str(train), "--test-files", str(test)]
    words += ["--out", "-", "--size", "20", "--subject", "Surgery", "--answer", "text"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["subject"] for row in rows} == {"Surgery"}
    assert all("right" in row["answer"] for row in rows)
    assert "60 left out: of another subject" in done.stderr


def test_several_files_and_a_size_out_of_range(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.parquet", [mmlu(m) for m in range(n, n + 12)]) for n in (0, 12)]
    test = write(tmp_path / "test.parquet", [mmlu(99)])
    words = ["reference", "mmlu", *(w for f in files for w in ("--files", str(f)))]
    words += ["--test-files", str(test), "--out", str(tmp_path / "out.jsonl"), "--size"]
    assert CliRunner().invoke(app, [*words, "24"]).exit_code == 0
    assert CliRunner().invoke(app, [*words, "19"]).exit_code == 2
    assert CliRunner().invoke(app, [*words, "1001"]).exit_code == 2


def test_medical_subjects_that_no_file_has(tmp_path: Path) -> None:
    path = str(write(tmp_path / "law.parquet", [mmlu(n, "law") for n in range(30)]))
    words = ["reference", "mmlu-medical", "--files", path, "--test-files", path, "--out", "-"]
    failed = CliRunner().invoke(app, words).exception
    assert isinstance(failed, BadInput)
    assert "have no rows of the subjects anatomy, clinical_knowledge" in str(failed)

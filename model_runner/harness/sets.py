"""Question sets of the paper as they lie on the Hugging Face hub, and how lm-evaluation-harness asks them.

Files are local; JSON, CSV and Parquet all do. Prompts and targets are those of the harness's tasks (lm_eval 0.4.13;
SuperGPQA, which it does not have: examples/harness/supergpqa.yaml), so that the tokens of a memory are met again.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from model_runner.errors import BadInput
from model_runner.text_files import Columns, read_rows

Row = Mapping[str, Any]
# Of the harness's group `multimedqa`.
MEDICAL_SUBJECTS = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
)
_MBPP_TESTS = 3  # as many as its prompt names


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a set.

    Attributes:
        name: the set's own id, or a digest of the prompt.
        subject: empty where the set names none.
        question: without the choices: what is compared with test items.
        choices: texts in the order of the prompt; of MBPP its solution alone.
        prompt: as the harness's task asks it.
        answer: what the task scores after the prompt; empty: the file does not have it, as those of test splits.
        explained: the same, and the text of the right choice after its letter.

    """

    name: str
    subject: str
    question: str
    choices: tuple[str, ...]
    prompt: str
    answer: str = ""
    explained: str = ""


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """How one set is read.

    Attributes:
        columns: of its files.
        item: makes an item of a row; gets the seed of what the task shuffles.
        subjects: that it is about; empty: all.

    """

    columns: Columns
    item: Callable[[Row, int], Item]
    subjects: tuple[str, ...] = ()


def read_items(name: str, path: Path, seed: int) -> list[Item]:
    """Items of a file of the set, in order, whatever their subject.

    seed: of the order of choices that the task shuffles (GPQA): each item's own, whichever others there are. Raises
    BadInput naming file, row and field.
    """
    items, chosen = list[Item](), SETS[name]
    for number, row in read_rows(path, chosen.columns):
        try:
            items.append(chosen.item(row, seed))
        except BadInput as error:
            raise BadInput(f"{path}: row {number}: {error}") from error
    if not items:
        raise BadInput(f"{path}: holds no rows, expected those of a split of {name}")
    return items


def supergpqa_prompt(row: Row) -> str:
    """The question and up to ten lettered options; also what the task's YAML asks."""
    return f"{_text(row, 'question').strip()}\n{_lettered(row['options'], ') ')}\nAnswer:"


def supergpqa_letters(row: Row) -> list[str]:
    """The letters of a row's options."""
    return list(ascii_uppercase[: len(row["options"])])


def _gpqa(row: Row, seed: int) -> Item:
    question = _text(row, "Question")
    right = _gpqa_choice(row, "Correct Answer")
    choices = [right, *(_gpqa_choice(row, f"Incorrect Answer {n}") for n in (1, 2, 3))]
    random.Random(f"{seed} {question}").shuffle(choices)
    letters = [f"({letter})" for letter in ascii_uppercase[:4]]
    lines = "\n".join(f"{a} {b}" for a, b in zip(letters, choices, strict=True))
    prompt = f"What is the correct answer to this question:{question}\nChoices:\n{lines}\nAnswer:"
    subject = _text(row, "High-level domain", "")
    return _lettered_item(
        row, "Record ID", subject, question, choices, prompt, choices.index(right), letters
    )


def _gpqa_choice(row: Row, field: str) -> str:
    """As the task cleans it."""
    return _text(row, field).strip().replace(" [title]", ". ").replace("  ", " ")


def _supergpqa(row: Row, _seed: int) -> Item:
    choices, right = _strings(row, "options"), None
    if letter := _text(row, "answer_letter", ""):
        right = _position(letter, "answer_letter", len(choices))
    subject = _text(row, "discipline", "")
    prompt = supergpqa_prompt({**row, "options": choices})
    return _lettered_item(row, "uuid", subject, _text(row, "question"), choices, prompt, right)


def _mmlu(row: Row, seed: int) -> Item:
    if isinstance(row.get("train"), dict):  # the rows of auxiliary_train lie one level deeper
        return _mmlu(row["train"], seed)
    question, choices = _text(row, "question"), _strings(row, "choices")
    subject = _text(row, "subject", "")
    about = f" about {subject.replace('_', ' ')}" if subject else ""
    said = (
        f"The following are multiple choice questions (with answers){about}.\n\n" if about else ""
    )
    prompt = f"{said}{question.strip()}\n{_lettered(choices, '. ')}\nAnswer:"
    right = _number(row, "answer", len(choices))
    return _lettered_item(row, "", subject, question, choices, prompt, right)


def _medqa(row: Row, _seed: int) -> Item:
    """Of MedQA-USMLE-4-options, or of MedQA-USMLE-4-options-hf, which the harness reads."""
    if row.get("sent1") is not None:
        question = _text(row, "sent1")
        choices = [_text(row, f"ending{n}") for n in range(4)]
        right = _number(row, "label", 4)
    else:
        question, options = _text(row, "question"), row["options"]
        if not isinstance(options, dict) or not options:
            raise BadInput(f"`options` is {options!r}, expected an object of letters")
        choices = [
            _text(options, letter) for letter in sorted(options) if options[letter] is not None
        ]
        letter = _text(row, "answer_idx", "")
        right = _position(letter, "answer_idx", len(choices)) if letter else None
    prompt = f"Question: {question}\n{_lettered(choices, '. ')}\nAnswer:"
    subject = _text(row, "meta_info", "")
    return _lettered_item(row, "id", subject, question, choices, prompt, right)


def _medmcqa(row: Row, _seed: int) -> Item:
    question, choices = _text(row, "question"), [_text(row, f"op{c}", " ") for c in "abcd"]
    right = None if row.get("cop") in (-1, "-1") else _number(row, "cop", 4)  # -1: the test split
    prompt = f"Question: {question}\nChoices:\n{_lettered(choices, '. ')}\nAnswer:"
    subject = _text(row, "subject_name", "")
    return _lettered_item(row, "id", subject, question, choices, prompt, right)


def _mbpp(row: Row, _seed: int) -> Item:
    """Full or sanitized; the file's CR LF become line ends as a model writes them."""
    question = _text(row, "text", "") or _text(row, "prompt")
    code = _text(row, "code").replace("\r\n", "\n")
    tests = _strings(row, "test_list")[:_MBPP_TESTS]
    tests += [""] * (_MBPP_TESTS - len(tests))
    prompt = (
        f"You are an expert Python programmer, and here is your task: {question} Your code should pass these tests:"
        "\n\n" + "\n".join(tests) + "\n[BEGIN]\n"
    )
    answer = f"{code}\n[DONE]"
    name = _name(row, "task_id", prompt)
    return Item(name, "", question, (code,), prompt, answer, answer)


def _lettered(choices: Sequence[str], after: str) -> str:
    return "\n".join(f"{ascii_uppercase[n]}{after}{text}" for n, text in enumerate(choices))


def _lettered_item(
    row: Row,
    id_field: str,
    subject: str,
    question: str,
    choices: Sequence[str],
    prompt: str,
    right: int | None,
    letters: Sequence[str] = ascii_uppercase,
) -> Item:
    """right: which choice is; None: the file does not say."""
    answer = explained = ""
    if right is not None:
        between = " " if letters[right].endswith(")") else ". "
        answer = f" {letters[right]}"
        explained = f"{answer}{between}{choices[right]}"
    name = _name(row, id_field, prompt)
    return Item(name, subject, question, tuple(choices), prompt, answer, explained)


def _name(row: Row, field: str, prompt: str) -> str:
    own = row.get(field)
    if own not in (None, ""):
        return str(own)
    return hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()


def _text(row: Row, field: str, otherwise: str | None = None) -> str:
    """A string of the row; `otherwise`, if that is given, for none."""
    value = row.get(field)
    if value is None and otherwise is not None:
        return otherwise
    if not isinstance(value, str):
        raise BadInput(f"`{field}` is {value!r}, expected a string")
    return value


def _strings(row: Row, field: str) -> list[str]:
    value = row.get(field)
    if not isinstance(value, list) or not value or not all(isinstance(s, str) for s in value):
        raise BadInput(f"`{field}` is {value!r}, expected a list of strings")
    if len(value) > len(ascii_uppercase):
        raise BadInput(f"`{field}` has {len(value)} items, expected at most 26")
    return value


def _number(row: Row, field: str, count: int) -> int | None:
    """Which of `count` choices, counted from 0; CSV has it as text. None: not given."""
    value = row.get(field)
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        raise BadInput(f"`{field}` is {value!r}, expected 0 to {count - 1}")
    return value


def _position(letter: str, field: str, count: int) -> int:
    found = ascii_uppercase[:count].find(letter)
    if len(letter) != 1 or found < 0:
        raise BadInput(f"`{field}` is {letter!r}, expected A to {ascii_uppercase[count - 1]}")
    return found


def _columns(*forms: str, others: str = "") -> Columns:
    """Forms and others as words in a string each."""
    every = tuple(tuple(form.split(",")) for form in forms)
    wanted = ", or ".join(" and ".join(f"`{field}`" for field in form) for form in every)
    return Columns(every, tuple(others.split(",")) if others else (), wanted)


_MMLU = _columns("question,choices", "train", others="answer,subject")
SETS: Mapping[str, QuestionSet] = {
    "gpqa": QuestionSet(
        _columns(
            "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3",
            others="Record ID,High-level domain",
        ),
        _gpqa,
    ),
    "supergpqa": QuestionSet(
        _columns("question,options", others="uuid,answer_letter,discipline"), _supergpqa
    ),
    "mmlu": QuestionSet(_MMLU, _mmlu),
    "mmlu-medical": QuestionSet(_MMLU, _mmlu, MEDICAL_SUBJECTS),
    "medqa": QuestionSet(
        _columns(
            "sent1,ending0,ending1,ending2,ending3",
            "question,options",
            others="id,label,answer_idx,meta_info",
        ),
        _medqa,
    ),
    "medmcqa": QuestionSet(
        _columns("question,opa,opb", others="opc,opd,id,cop,subject_name"), _medmcqa
    ),
    "mbpp": QuestionSet(
        _columns("text,code,test_list", "prompt,code,test_list", others="task_id"), _mbpp
    ),
}

"""Small files in the schemas that question sets have on the Hugging Face hub; the questions are made up here."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]
# Nothing in them is 8 words long and twice there, whatever the number.
_QUESTIONS = (
    "In a village with {n} wells a {thing} is drawn by rope {n}; who keeps it?",
    "A smith forges {n} nails for one {thing} in winter {n}: what does each cost?",
    "Seen from tower {n}, where does shadow {n} of the {thing} point at hour {n}?",
)
_THINGS = ("bucket", "plough", "lantern", "saddle", "anchor", "kettle", "loom")


def question(number: int) -> str:
    """One for each number."""
    return _QUESTIONS[number % 3].format(n=number, thing=_THINGS[number % 7])


def choices(number: int, count: int = 4) -> list[str]:
    """Their texts, the right one at number % count."""
    return [f"answer {number} {'right' if n == number % count else n}" for n in range(count)]


def gpqa(number: int) -> Row:
    wrong = [f"Incorrect Answer {n}" for n in (1, 2, 3)]
    texts = {field: f" wrong {number}  {field[-1]} " for field in wrong}
    return {
        "Pre-Revision Question": "as it was",
        "Question": question(number),
        "Correct Answer": f"right {number} [title]that it is",
        **texts,
        "Explanation": "since it is",
        "Record ID": f"rec{number}",
        "High-level domain": ("Wells", "Iron", "Towers")[number % 3],
        "Subdomain": "of these",
    }


def supergpqa(number: int) -> Row:
    count = 10 if number % 2 else 7
    options = choices(number, count)
    return {
        "uuid": f"uuid{number}",
        "question": question(number),
        "options": options,
        "answer": options[number % count],
        "answer_letter": "ABCDEFGHIJ"[number % count],
        "discipline": ("Wells", "Iron", "Towers")[number % 3],
        "field": "of these",
        "subfield": "of those",
        "difficulty": "hard",
        "is_calculation": False,
    }


def mmlu(number: int, subject: str = "") -> Row:
    own = ("anatomy", "marketing", "college_biology")[number % 3]
    return {
        "question": f" {question(number)}",
        "subject": subject or own,
        "choices": choices(number),
        "answer": number % 4,
    }


def mmlu_auxiliary(number: int) -> Row:
    return {"train": mmlu(number) | {"subject": ""}}


def medqa_hf(number: int) -> Row:
    endings = {f"ending{n}": text for n, text in enumerate(choices(number))}
    sentences = {"sent1": question(number), "sent2": ""}
    return {"id": f"train-{number:05}", **sentences, **endings, "label": number % 4}


def medqa(number: int) -> Row:
    options = dict(zip("ABCD", choices(number), strict=True))
    return {
        "question": question(number),
        "answer": choices(number)[number % 4],
        "options": options,
        "meta_info": ("step1", "step2&3")[number % 2],
        "answer_idx": "ABCD"[number % 4],
        "metamap_phrases": ["a well"],
    }


def medmcqa(number: int) -> Row:
    options = {f"op{letter}": text for letter, text in zip("abcd", choices(number), strict=True)}
    return {
        "id": f"{number:08}-ffff",
        "question": question(number),
        **options,
        "cop": number % 4,
        "choice_type": "single",
        "exp": None,
        "subject_name": ("Anatomy", "Surgery", "Dental")[number % 3],
        "topic_name": None,
    }


def mbpp(number: int) -> Row:
    return {
        "task_id": 600 + number,
        "text": question(number),
        "code": f"def f{number}(x):\r\n  return x + {number}",
        "test_list": [f"assert f{number}({n}) == {n + number}" for n in range(3)],
        "test_setup_code": "",
        "challenge_test_list": [],
    }


def mbpp_sanitized(number: int) -> Row:
    row = mbpp(number)
    return {
        "source_file": "made up",
        "task_id": row["task_id"],
        "prompt": row["text"],
        "code": row["code"],
        "test_imports": [],
        "test_list": row["test_list"][:2],
    }


# Schema -> the set, how rows are made, how its files end on the hub.
SCHEMAS: Mapping[str, tuple[str, Callable[[int], Row], str]] = {
    "gpqa": ("gpqa", gpqa, "csv"),
    "supergpqa": ("supergpqa", supergpqa, "jsonl"),
    "mmlu": ("mmlu", mmlu, "parquet"),
    "mmlu_auxiliary": ("mmlu", mmlu_auxiliary, "parquet"),
    "mmlu_medical": ("mmlu-medical", mmlu, "parquet"),
    "medqa_hf": ("medqa", medqa_hf, "jsonl"),
    "medqa": ("medqa", medqa, "jsonl"),
    "medmcqa": ("medmcqa", medmcqa, "parquet"),
    "mbpp": ("mbpp", mbpp, "parquet"),
    "mbpp_sanitized": ("mbpp", mbpp_sanitized, "parquet"),
}


def write(path: Path, rows: Sequence[Row]) -> Path:
    """By the name's ending."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

"""What the tasks here ask: how texts that ship with the package, and that no memory was built from, go on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any, Literal

from datasets import Dataset, DatasetDict

from model_runner.small_moe import data_file

CONTEXT_WORDS, NEXT_WORDS, STRIDE_WORDS = 32, 12, 48
CHOICES = 4

Domain = Literal["general", "shifted"]


def documents(domain: Domain = "shifted", **_: Any) -> DatasetDict:
    """`text` of each document of the test split; of the harness's own arguments none matters."""
    return _test_split([{"text": text} for text in _texts(domain)])


def continuations(domain: Domain = "shifted", seed: int = 0, **_: Any) -> DatasetDict:
    """Rows of `context`, four `choices` of what follows it and the index `answer` of what does.

    The others follow other places of other documents; all is of the seed.
    """
    draw, places = random.Random(seed), _places(domain)
    rows = list[dict[str, Any]]()
    for document, context, following in places:
        others = list[str]()
        while len(others) < CHOICES - 1:
            other, _context, text = draw.choice(places)
            if other != document and text not in (following, *others):
                others.append(text)
        choices = [following, *others]
        draw.shuffle(choices)
        row = {"context": context, "choices": choices, "answer": choices.index(following)}
        rows.append(row)
    draw.shuffle(rows)  # --limit takes the first ones: they are of all documents
    return _test_split(rows)


def next_word(row: dict[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Whether the model's first word is the text's."""
    said = answers[0].split()[:1]
    return {"acc": float(said == row["choices"][row["answer"]].split()[:1])}


def _places(domain: Domain) -> list[tuple[int, str, str]]:
    """Document, context and what follows it, side by side."""
    places = list[tuple[int, str, str]]()
    for number, text in enumerate(_texts(domain)):
        words = text.split()
        for start in range(0, len(words) - CONTEXT_WORDS - NEXT_WORDS + 1, STRIDE_WORDS):
            middle = start + CONTEXT_WORDS
            context, following = words[start:middle], words[middle : middle + NEXT_WORDS]
            places.append((number, " ".join(context), " " + " ".join(following)))
    return places


def _texts(domain: Domain) -> list[str]:
    lines = data_file(domain, "test").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def _test_split(rows: list[dict[str, Any]]) -> DatasetDict:
    return DatasetDict({"test": Dataset.from_list(rows)})

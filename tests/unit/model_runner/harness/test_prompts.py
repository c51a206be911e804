"""A reference asks what the tasks of lm-evaluation-harness ask of the same rows, word for word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model_runner.harness.sets import Item, read_items
from tests.question_sets import SCHEMAS, write

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm_eval is not installed, `make test-harness` does it (450 MB)"
)
OWN = Path(__file__).parents[4] / "examples" / "harness"
# Schema -> the task's file.
TASKS = {
    "supergpqa": OWN / "supergpqa.yaml",
    "mmlu": "mmlu/default/mmlu_anatomy.yaml",
    "medqa_hf": "medqa/medqa.yaml",
    "medmcqa": "medmcqa/medmcqa.yaml",
    "gpqa": "gpqa/zeroshot/gpqa_main_zeroshot.yaml",
}


def task(path: str | Path, rows: list[dict[str, Any]]) -> Any:
    """The harness's task, with these rows."""
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / path)
    splits = dict.fromkeys(("train", "validation", "test", "dev"), Dataset.from_list(rows))
    of_rows = {"custom_dataset": lambda **_: DatasetDict(splits), "dataset_path": None}
    return ConfigurableTask(config=dict(config) | of_rows)


def asked(made: Any, row: dict[str, Any]) -> tuple[str, str]:
    """The prompt, and what follows it."""
    prompt = made.fewshot_context(row, num_fewshot=0)
    target = made.doc_to_target(row)
    if isinstance(target, int):
        target = made.doc_to_choice(row)[target]
    return prompt, f"{made.config.target_delimiter}{target}"


def of_subject(schema: str, number: int) -> dict[str, Any]:
    row = SCHEMAS[schema][1](number)
    return row | {"subject": "anatomy"} if schema == "mmlu" else row


@pytest.mark.parametrize("schema", TASKS)
def test_a_reference_asks_what_the_task_asks(schema: str, tmp_path: Path) -> None:
    name, _, ending = SCHEMAS[schema]
    rows = [of_subject(schema, number) for number in range(5)]
    items = read_items(name, write(tmp_path / f"train.{ending}", rows), 0)
    made = task(TASKS[schema], rows)
    docs = [*made.validation_docs()] if made.has_validation_docs() else [*made.test_docs()]
    for item, doc in zip(items, docs, strict=True):
        shuffled = gpqa_as_in(item, doc) if schema == "gpqa" else doc
        assert asked(made, shuffled) == (item.prompt, item.answer)


def gpqa_as_in(item: Item, doc: dict[str, Any]) -> dict[str, Any]:
    """The task's row with the choices, which it shuffles by a seed of its own, in the reference's order."""
    fields = [f"choice{n}" for n in (1, 2, 3, 4)]
    assert sorted(doc[field] for field in fields) == sorted(item.choices)
    return doc | dict(zip(fields, item.choices, strict=True)) | {"answer": item.answer.strip()}


def test_mbpp_is_asked_as_its_template_says(tmp_path: Path) -> None:
    """Without the task itself, whose metric is loaded from the hub."""
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import apply_template

    path = Path(lm_eval.__file__).parent / "tasks" / "mbpp" / "mbpp.yaml"
    config = load_yaml(path, resolve_func=False)
    row = SCHEMAS["mbpp"][1](3)
    [item] = read_items("mbpp", write(tmp_path / "train.parquet", [row]), 0)
    assert item.prompt == apply_template(config["doc_to_text"], row)
    answered = apply_template(config["doc_to_target"], row | {"is_fewshot": True})
    assert item.answer == answered.replace("\r\n", "\n")

"""`model-runner reference` and `lm-eval`: reference text from question sets, and standard tasks with a memory.

Imports of lm_eval and torch stand inside functions: --help does not wait for them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer
from rich.console import Console
from rich.table import Table

from model_runner.cli import options
from model_runner.errors import BadInput

if TYPE_CHECKING:
    from model_runner.harness.reference import Reference
    from model_runner.harness.sets import Item

# Names of sets.SETS, and reference.SIZES; tests compare them.
SetName = Literal["gpqa", "supergpqa", "mmlu", "mmlu-medical", "medqa", "medmcqa", "mbpp"]
SMALLEST, LARGEST = 20, 1000


def reference(
    name: Annotated[
        SetName,
        typer.Argument(
            help="The set. mmlu-medical: the six medical subjects of MMLU; medqa: MedQA-USMLE with four options."
        ),
    ],
    files: Annotated[
        list[Path],
        options.file_option(
            "File of the set's training split: Parquet, JSON, JSON Lines or CSV in the columns that the set has on the "
            "Hugging Face hub. May be given several times."
        ),
    ],
    test_files: Annotated[
        list[Path],
        options.file_option(
            "File of the test items that are to be scored, in the same columns. May be given several times."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="JSON Lines of `id`, `prompt`, `answer` and `subject`, for `build --reference`. - is standard output."
        ),
    ],
    size: Annotated[
        int, typer.Option(min=SMALLEST, max=LARGEST, help="Rows to draw, evenly over subjects.")
    ] = 500,
    seed: Annotated[
        int, typer.Option(help="Of the draw. Of one seed the smaller draw is part of the larger.")
    ] = 0,
    subject: Annotated[
        list[str] | None,
        typer.Option(help="Take this subject only. May be given several times. Default: all."),
    ] = None,
    answer: Annotated[
        Literal["letter", "text"],
        typer.Option(
            help="What counts in the loss: letter (what the task scores), or the letter with the text of the choice."
        ),
    ] = "letter",
    common: Annotated[
        int,
        typer.Option(
            min=0,
            help="8 words in a row that more test questions than this share are how the exam asks, and do not count. "
            "0: all count.",
        ),
    ] = 5,
    left_out: Annotated[
        Path | None,
        typer.Option(
            "--left-out", help="Also write what was left out, and why, as JSON Lines to this file."
        ),
    ] = None,
) -> None:
    """Make reference text from a question set's training split, without what the test items know of it.

    Rows whose question is that of a test item, or shares 8 words in a row with one, are left out; the rest is drawn
    evenly over subjects. Prompts and answers are those of lm-evaluation-harness's tasks. GPQA has no training split:
    give gpqa_main.csv as files and gpqa_diamond.csv as test files. For example:

        model-runner reference medmcqa --files train.parquet --test-files validation.parquet --size 500 --out ref.jsonl

        model-runner build --memory medicine --reference ref.jsonl
    """
    from model_runner.harness.reference import make_reference
    from model_runner.harness.sets import SETS, read_items

    options.require_writable("--out", out)
    options.require_writable("--left-out", left_out)
    items = [item for file in files for item in read_items(name, file, seed)]
    test_items = [item for file in test_files for item in read_items(name, file, seed)]
    chosen = subject or _own_subjects(SETS[name].subjects, items)
    made = make_reference(items, test_items, size, seed, subjects=chosen, common=common)
    options.write_text(out, "".join(_line(_row(name, item, answer)) for item in made.items))
    rows = (
        {"id": f"{name}-{each.item.name}", "why": each.reason.value}
        | {"test_item": each.test_item, "shared": each.shared}
        for each in made.left_out
    )
    options.write_text(left_out, None if left_out is None else "".join(map(_line, rows)))
    _say(made, len(test_items), common, options.words_beside(out, left_out))


def _own_subjects(wanted: Sequence[str], items: Sequence[Item]) -> list[str]:
    """Those of a set that is about some, as far as the files have them. Raises BadInput when they have none."""
    found = {item.subject for item in items} & set(wanted)
    if wanted and not found:
        raise BadInput(f"--files: have no rows of the subjects {', '.join(wanted)}")
    return sorted(found)


def _row(name: str, item: Item, answer: str) -> dict[str, Any]:
    said = item.explained if answer == "text" else item.answer
    own = {"id": f"{name}-{item.name}", "prompt": item.prompt, "answer": said}
    return own | ({"subject": item.subject} if item.subject else {})


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _say(made: Reference, test_items: int, common: int, out: TextIO) -> None:
    console = Console(file=out, highlight=False, soft_wrap=True)
    console.print(f"{made.rows} rows, compared with {test_items} test items")
    for reason, number in made.reasons.most_common():
        console.print(f"  {number} left out: {reason}")
    if made.common:
        console.print(
            f"  {made.common} runs of 8 words are in more than {common} test questions each and did not count"
        )
    table = Table("subject", "remain", "drawn")
    for subject, remain in sorted(made.candidates.items()):
        drawn = sum(item.subject == subject for item in made.items)
        table.add_row(subject or "(none)", str(remain), str(drawn))
    table.add_row("in all", str(made.candidates.total()), str(len(made.items)))
    console.print(table)


def lm_eval(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ARGUMENTS]...",
            help="Of lm-evaluation-harness's own command; `model-runner lm-eval run --help` has them.",
        ),
    ] = None,
) -> None:
    """Run lm-evaluation-harness with the model `knn-moe`, a frozen model and its memory.

    It is the command lm_eval of that package, which up to 0.4.13 has no plug-ins: here it also knows `--model
    knn-moe`. Model arguments are those of `hf`, and memory, target, retrieval, replica_memory, replica_keys,
    first_pass, max_staleness_s, timeout_s; without memory= it is `hf`. A lookup that fails, or a memory that is changed
    meanwhile, ends the run: scores never mix. Needs `pip install 'knn-moe[runner,harness]'`. For example:

        model-runner lm-eval --model knn-moe --model_args pretrained=DIR,memory=law --tasks medqa_4options
    """
    from model_runner.harness.model import run_command

    run_command(arguments or [])

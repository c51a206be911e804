"""`model-runner sample-data`: text that ships with the package, to try the other commands on."""

from __future__ import annotations

import shutil
import sys
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from model_runner.errors import BadInput
from model_runner.small_moe import DATA_DIR, data_file

# File -> the shipped split that it is cut from, the first document, and how many.
FILES = {
    "reference.jsonl": (data_file("shifted", "reference"), 0, 24),
    "new-cases.jsonl": (data_file("shifted", "reference"), 24, 2),
    "held-out.jsonl": (data_file("shifted", "test"), 0, 12),
    "general.jsonl": (data_file("general", "test"), 0, 12),
}
NOTICE = "NOTICE"


def sample_data(
    directory: Annotated[
        Path, typer.Argument(help="Is made if it is not there; no file in it is overwritten.")
    ],
) -> None:
    """Write sample texts: something to remember, to score and to teach, for the small model that is the default.

    reference.jsonl: 24 chapters of the King James Bible, which the model never saw. held-out.jsonl: 12 others.
    new-cases.jsonl: 2 more, for `learn`. general.jsonl: 12 pieces of manuals like those it was trained on, to see what
    a memory harms. The Bible is in the public domain (in the United Kingdom the Crown holds printing rights), the
    manuals are under the licences in NOTICE, which is written beside them. For example:

        model-runner sample-data samples
    """
    if directory.exists() and not directory.is_dir():
        raise BadInput(f"{directory} is a file; expected a directory, or a name that is free")
    if there := [name for name in (*FILES, NOTICE) if (directory / name).exists()]:
        raise BadInput(f"{directory} has {', '.join(there)} already; give another directory")
    directory.mkdir(parents=True, exist_ok=True)
    for name, (split, first, count) in FILES.items():
        with split.open("rb") as lines:
            (directory / name).write_bytes(b"".join(islice(lines, first, first + count)))
        sys.stdout.write(f"{directory / name}: {count} documents\n")
    shutil.copyfile(DATA_DIR / NOTICE, directory / NOTICE)
    sys.stdout.write(f"{directory / NOTICE}: sources and licences\n")

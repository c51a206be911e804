"""Results on disk: a JSON file per experiment, study and part, written whole; what is there is not run again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model_runner.errors import BadInput
from model_runner.evaluation.nll import bootstrap_interval, difference
from model_runner.scoring import Scores

SCHEMA = 1
# Significant digits of what is stored: f32 sums hold no more.
_DIGITS = 6
ONLY_PART = "all"

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """Rows of one experiment on one study, or of a part of it.

    Attributes:
        part: ONLY_PART, or what the experiment calls it, e.g. an arm.
        command: that makes this file, with DIR and names in the place of paths.
        sizes: windows of each split and their length.

    """

    experiment: str
    model: str
    domain: str
    seed: int
    part: str
    command: str
    sizes: Mapping[str, int]
    elapsed_s: float
    rows: Sequence[Row]

    @property
    def path(self) -> Path:
        """Below the directory of results."""
        study = f"{self.model}-{self.domain}-seed{self.seed}"
        return Path(self.experiment) / result_name(study, self.part)


def result_name(study: str, part: str) -> str:
    """Of a file."""
    return f"{study}.json" if part == ONLY_PART else f"{study}-{part}.json"


def write_result(directory: Path, result: Result) -> Path:
    """Whole or not at all. Raises OSError."""
    path = directory / result.path
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, **asdict(result)}
    text = json.dumps(rounded(content), indent=1, ensure_ascii=False) + "\n"
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)
    return path


def read_results(directory: Path) -> list[Result]:
    """All below a directory, in the order of their names. Raises BadInput for what is no result."""
    return [read_result(path) for path in sorted(directory.glob("*/*.json"))]


def read_result(path: Path) -> Result:
    """Raises BadInput."""
    try:
        content = json.loads(path.read_text())
        if content.pop("schema") != SCHEMA:
            raise BadInput(f"{path}: another version's results; run the experiment again")
        return Result(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} holds no result of an experiment ({error}); remove it") from error


def rounded(value: Any) -> Any:
    """The same with floats of _DIGITS digits; null in the place of NaN and infinity, which JSON has not."""
    if isinstance(value, Mapping):
        return {str(name): rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value


def change(scores: Scores, baseline: Scores, seed: int = 0) -> Row:
    """Paired change of NLL per token: delta, se (clustered by document), bootstrapped 95 % interval, windows."""
    paired = difference(scores, baseline)
    low, high = bootstrap_interval(scores, baseline, seed=seed)
    return {
        "delta": paired.delta,
        "se": paired.se,
        "low": low,
        "high": high,
        "windows": paired.windows,
    }


def of_experiment(results: Sequence[Result], name: str) -> list[Result]:
    """Those of one experiment."""
    return [result for result in results if result.experiment == name]


def rows_of(results: Sequence[Result], **having: Any) -> Iterator[tuple[Result, Row]]:
    """Rows, each with its result, of which these columns have these values."""
    for result in results:
        for row in result.rows:
            if all(row.get(name) == value for name, value in having.items()):
                yield result, row

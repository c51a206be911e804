"""What the programs of this directory found: tables and figures in Markdown, and the files that they leave."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """In Markdown, without an end of line.

    `columns`: their names; one that ends in a colon is aligned to the right, as by the colon of `---:`. Cells are shown
    as str() shows them, on one line. Raises ValueError for a row of another length.
    """
    rule = ["---:" if name.endswith(":") else "---" for name in columns]
    lines = [[name.removesuffix(":") for name in columns], rule]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells, expected {len(columns)}: {row}")
        lines.append([_cell(each) for each in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", r"\|")


def quantiles(values: ArrayLike, digits: int) -> dict[str, float]:
    """Median, 99th percentile and maximum of values [n >= 1]."""
    array = np.asarray(values, np.float64)
    found = {"p50": np.quantile(array, 0.5), "p99": np.quantile(array, 0.99), "max": array.max()}
    return {name: round(float(value), digits) for name, value in found.items()}


def spread(found: Mapping[str, float], digits: int) -> str:
    """`p50 / p99 / max` of quantiles()."""
    return " / ".join(f"{found[name]:.{digits}f}" for name in ("p50", "p99", "max"))


def counted(counts: Mapping[str, int]) -> str:
    """`3 late, 1 lost`, in the order given."""
    return ", ".join(f"{count:,} {what}" for what, count in counts.items()) or "none"


def publish(out: Path, name: str, found: Any, shown: str, *, indent: int | None = 1) -> None:
    """Writes `found` to NAME.json and `shown` to NAME.md in a directory, which is made."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(found, indent=indent) + "\n")
    (out / f"{name}.md").write_text(shown)


def say(line: str) -> None:
    """How far it is, on stderr."""
    sys.stderr.write(line + "\n")

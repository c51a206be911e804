"""Tables and figures of what was found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.results import counted, publish, quantiles, spread, table


def test_a_table() -> None:
    shown = table(["fault", "lookups:"], [("a | b,\nc", 3), ("d", "1,000")])
    assert shown.splitlines() == [
        "| fault | lookups |",
        "| --- | ---: |",
        r"| a \| b, c | 3 |",
        "| d | 1,000 |",
    ]


def test_a_row_with_a_cell_too_many() -> None:
    with pytest.raises(ValueError, match="a row of 2 cells, expected 1"):
        table(["fault"], [("a", 1)])


def test_figures() -> None:
    found = quantiles(range(101), 1)
    assert found == {"p50": 50, "p99": 99, "max": 100}
    assert spread(found, 0) == "50 / 99 / 100"
    assert counted({"late": 3000, "lost": 1}) == "3,000 late, 1 lost"
    assert counted({}) == "none"


def test_files(tmp_path: Path) -> None:
    out = tmp_path / "made" / "here"
    publish(out, "it", {"a": [1]}, "shown\n")
    assert json.loads((out / "it.json").read_text()) == {"a": [1]}
    assert (out / "it.md").read_text() == "shown\n"

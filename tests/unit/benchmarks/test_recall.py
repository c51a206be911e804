"""What searches find, in every state of an index and with every compression: the table's command on a small layer."""

from __future__ import annotations

import io
from dataclasses import asdict

from rich.console import Console

from benchmarks.recall import COMPRESSIONS, STATES, Settings, rows, table_of


def test_nothing_that_is_near_is_missed() -> None:
    layouts = ((0.1, 0.5), (0.95,))
    labels = ("none", "int8", "turbo4", "float16")
    found = list(rows(Settings((2500,), 64, 24, layouts, labels)))
    assert {row.state for row in found} == set(STATES)
    assert {row.kind for row in found} == {"same", "own"}
    assert {row.share for row in found} == {0.0, 0.1, 0.5, 0.95}
    missing = [row for row in found if row.recall < 0.99 or row.nearest_wrong]
    assert not missing
    out = io.StringIO()
    Console(file=out, width=200).print(table_of([asdict(row) for row in found]))
    assert "worn" in out.getvalue()


def test_every_method_is_in_the_table() -> None:
    assert set(COMPRESSIONS) > {"none", "int8", "turbo4", "binary"}

"""Tables fit the terminal: one that is too wide becomes several, and no word, number or short cell is broken."""

from __future__ import annotations

import io

import pytest
from knnmoe.v1 import memory_admin_pb2 as pb
from rich.console import Console

from router_service.cli.output import Bytes, FoldedTable, plain, table
from router_service.cli.service_commands import DETAILS

COLUMNS = [f.name for f in pb.LayerStats.DESCRIPTOR.fields if f.name not in DETAILS]
STATS = table(
    COLUMNS,
    [
        plain(pb.LayerStats(layer=layer, entries=12345678, mean_lambda=0.123456))
        for layer in (0, 15)
    ],
    "bible",
)
TEXTS = table(
    ("name", "size", "", "problem"),
    [
        ("monday", Bytes(3 << 20), None, "no problem [at] all, only words that go on and on " * 3),
        ("ein Name", Bytes(5), 1, "x" * 100),
    ],
)


def _printed(made: FoldedTable, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=40, highlight=False)
    console.print(made)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_stats(width: int) -> None:
    lines = _printed(STATS, width)
    assert max(map(len, lines)) <= width
    words = [word for line in lines for word in line.split()]
    for name in COLUMNS:
        assert set(name.split("_")) <= set(words)
    assert words.count("12345678") == 2
    assert words.count("0.123456") == 2
    assert lines[0] == "bible"


def test_every_part_begins_with_the_first_column() -> None:
    lines = _printed(STATS, 60)
    parts = "\n".join(lines[1:]).split("\n\n")
    assert len(parts) > 1
    for part in parts:
        assert [line.split()[0] for line in part.splitlines()][-2:] == ["0", "15"]
        assert " layer " in part
    assert "\n\n" not in "\n".join(_printed(STATS, 160))


@pytest.mark.parametrize("width", [20, 60, 80])
def test_long_cells_take_several_lines(width: int) -> None:
    lines = _printed(TEXTS, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "[at]" in text
    assert "3.0 MiB" in text
    assert text.count("x") == 100
    assert "ein Name" in text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (7 << 40, "7.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_bytes(size: int, text: str) -> None:
    assert str(Bytes(size)) == text
    assert table(("disk",), [[Bytes(size)]]).cells == [[text]]

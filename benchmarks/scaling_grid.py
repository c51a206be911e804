"""A table whose values are numbers until it is printed, as Markdown, on a terminal or as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

Written = Callable[[Any], str]
_PREFIXES = ("", "k", "M", "G", "T", "P")


def text(value: Any) -> str:
    """As it is."""
    return str(value)


def count(number: float) -> str:
    """A whole number with thousands separated; from a million on three digits and a word."""
    if number < 999_500:
        return f"{round(number):,}"
    limit, word = (1e9, "billion") if number >= 999.5e6 else (1e6, "million")
    return f"{short(number / limit)} {word}"


def amount(number: float) -> str:
    """Bytes in powers of 1000, three digits."""
    power = 0
    while number >= 999.5 and power < len(_PREFIXES) - 1:
        number, power = number / 1000, power + 1
    return f"{short(number)} {_PREFIXES[power]}B"


def rate(number: float) -> str:
    """Bytes per second."""
    return f"{amount(number)}/s"


def decimal(digits: int) -> Written:
    """A fixed number of digits after the point."""
    return lambda number: f"{number:,.{digits}f}"


def short(number: float) -> str:
    """Three digits of a number below 1000."""
    return f"{number:.3g}"


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, and how the values below it are written."""

    title: str
    written: Written = text


@dataclass(frozen=True, slots=True)
class Grid:
    """A table with a name, which its place in a document has too, with the program that makes it."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    program: str = "benchmarks.scaling"

    @property
    def begin(self) -> str:
        """The marker before it."""
        return f"<!-- python -m {self.program} --markdown: {self.name} -->"

    def cells(self) -> list[list[str]]:
        """Every row as text; None is empty."""
        return [
            [
                "" if value is None else column.written(value)
                for column, value in zip(self.columns, row, strict=True)
            ]
            for row in self.rows
        ]

    def markdown(self) -> str:
        """The table alone; every column but the first is aligned to the right."""
        head = [column.title for column in self.columns]
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *self.cells()]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def table(self) -> Table:
        """For a terminal."""
        made = Table(title=self.title, box=box.SIMPLE, title_justify="left")
        for number, column in enumerate(self.columns):
            made.add_column(column.title, justify="right" if number else "left")
        for row in self.cells():
            made.add_row(*row)
        return made

    def records(self) -> list[dict[str, Any]]:
        """Rows with their numbers as they are, by title."""
        titles = [column.title for column in self.columns]
        return [dict(zip(titles, row, strict=True)) for row in self.rows]


def placed(grid: Grid) -> str:
    """A grid between the two markers that a page has for it."""
    return f"{grid.begin}\n{grid.markdown()}\n{END}"


END = "<!-- end -->"


def with_grids(page: str, grids: Sequence[Grid]) -> str:
    """A page with what stands between the markers of every grid replaced. Raises ValueError when some are missing."""
    for grid in grids:
        before, found, rest = page.partition(grid.begin)
        _, ended, after = rest.partition(END)
        if not (found and ended):
            raise ValueError(f"the page has no lines {grid.begin!r} and {END!r}; add them")
        page = before + placed(grid) + after
    return page

"""What every command of `router-admin` gets: the client of one service, and where to print.

Results are one JSON document or human-readable tables, on stdout; progress and remarks go to stderr.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import typer
from google.protobuf import json_format
from google.protobuf.message import Message
from knnmoe.client import AdminClient
from knnmoe.v1 import operations_pb2 as operations_pb
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from router_service.cli.errors import BadInput

# Wide enough that a table is not folded when stdout is a file or a pipe.
PIPE_WIDTH = 160
# A space on either side of a column.
_PADDING = 2
# Cells that are longer may take several lines: a time takes 23.
_LONG_CELL = 24
_UNIT = 1024

Rows = Sequence[Sequence[object] | Mapping[str, object]]


class Output:
    """Where results go. With `as_json`, stdout gets exactly one JSON document."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def emit(self, document: dict[str, Any], render: Callable[[Console], None]) -> None:
        """Prints the document, or lets `render` show it."""
        if self.as_json:
            sys.stdout.write(json.dumps(document, indent=2) + "\n")
            sys.stdout.flush()
        else:
            render(_console())

    def table(
        self, document: dict[str, Any], columns: Sequence[str], rows: Rows, title: str = ""
    ) -> None:
        """Prints the document, or these columns of the rows."""
        self.emit(document, lambda console: console.print(table(columns, rows, title)))

    def line(self, document: dict[str, Any], text: str) -> None:
        """Prints the document, or the text; a line of it is never broken."""
        self.emit(document, lambda console: console.print(text, markup=False, soft_wrap=True))

    def remark(self, text: str) -> None:
        """A human-readable line on stderr."""
        Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)

    @contextmanager
    def progress(self, label: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """A bar on stderr when that is a terminal; yields the function that advances it."""
        with _bar(MofNCompleteColumn()) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done: bar.advance(task, done)

    @contextmanager
    def operation(self) -> Iterator[Callable[[operations_pb.Operation], None]]:
        """A bar on stderr when that is a terminal; yields the function that shows how far an operation is."""
        with _bar(TextColumn("{task.completed:.0f}")) as bar:
            task = bar.add_task("", total=None)

            def show(now: operations_pb.Operation) -> None:
                text, total = f"{now.kind}, {now.stage}", now.total or None
                bar.update(task, description=text, completed=now.done, total=total)

            yield show


@dataclass(frozen=True, slots=True)
class Session:
    """The global options, opened."""

    client: AdminClient
    output: Output


def session_of(context: typer.Context) -> Session:
    """The session that the root command opened."""
    session = context.find_object(Session)
    if session is None:
        raise RuntimeError("the root command did not open a session")
    return session


def _bar(amount: ProgressColumn) -> Progress:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        amount,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _console() -> Console:
    columns, lines = shutil.get_terminal_size()  # with both a dumb terminal has them too
    width = columns if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, height=lines, highlight=False)


class Bytes(int):
    """A number of bytes: human-readable in tables, a number in JSON."""

    def __str__(self) -> str:
        amount, units = float(self), iter(("B", "KiB", "MiB", "GiB", "TiB"))
        unit = next(units)
        for larger in units:
            if amount < _UNIT:
                break
            amount, unit = amount / _UNIT, larger
        return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"


@dataclass(frozen=True, slots=True)
class FoldedTable:
    """A plain table; one that is wider than the console becomes several, which each begin with the first column."""

    names: Sequence[str]
    cells: Sequence[Sequence[str]]
    numeric: Sequence[bool]
    title: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield Text(self.title, style="table.title")
        for number, columns in enumerate(self._folds(options.max_width)):
            if number:
                yield ""
            yield self._part(columns)

    def _folds(self, width: int) -> list[dict[int, int]]:
        """By table the widths of its columns, which leave as few lines as they can."""
        least = [self._least(number) + _PADDING for number in range(len(self.names))]
        folds, used = [[0]], least[0]
        for number in range(1, len(least)):
            if used + least[number] > width and len(folds[-1]) > 1:
                folds.append([0])
                used = least[0]
            folds[-1].append(number)
            used += least[number]
        return [self._widths(fold, width) for fold in folds]

    def _least(self, number: int) -> int:
        """Width in which no word of the heading, no number and no short cell is broken."""
        heading = max(map(cell_len, self.names[number].split() or [""]))
        column = max((cell_len(row[number]) for row in self.cells), default=0)
        return max(heading, column if self.numeric[number] else min(column, _LONG_CELL))

    def _widths(self, fold: Sequence[int], width: int) -> dict[int, int]:
        """What is left goes to the columns whose cells or headings take several lines."""
        widths = {number: self._least(number) for number in fold}
        spare = width - sum(widths.values()) - _PADDING * len(fold)
        for number in fold:
            texts = [self.names[number], *(row[number] for row in self.cells)]
            more = max(min(spare, max(map(cell_len, texts)) - widths[number]), min(spare, 0))
            widths[number] = max(widths[number] + more, 1)
            spare -= more
        return widths

    def _part(self, columns: Mapping[int, int]) -> Table:
        made = Table(box=None, header_style="bold")
        for number, width in columns.items():
            justify: JustifyMethod = "right" if self.numeric[number] else "left"
            made.add_column(self.names[number], justify=justify, overflow="fold", width=width)
        for row in self.cells:
            made.add_row(*(Text(row[number]) for number in columns))  # Text: no markup
        return made


def table(columns: Sequence[str], rows: Rows, title: str = "") -> FoldedTable:
    """A plain table; numbers to the right. Of a row that is a mapping the columns are shown."""
    values = [[row[name] for name in columns] if isinstance(row, Mapping) else row for row in rows]
    numeric = [
        bool(values) and all(isinstance(row[number], int | float | None) for row in values)
        for number in range(len(columns))
    ]
    names = [name.replace("_", " ") for name in columns]
    return FoldedTable(names, [list(map(_cell, row)) for row in values], numeric, title)


def _cell(value: object) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_cell(item) for item in value) or "all"
    return str(value)


def utc(unix_ms: int, *, seconds: bool = True) -> str:
    """A time in milliseconds since the epoch, for tables."""
    form = "%Y-%m-%d %H:%M:%S UTC" if seconds else "%Y-%m-%d %H:%M UTC"
    return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime(form)


def plain(message: Any) -> dict[str, Any]:
    """A protobuf message as JSON values: every field, integers as numbers, enums as `rbf` or `logit_delta`."""
    return {
        field.name: _plain_field(field, getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
        if not field.has_presence or message.HasField(field.name)
    }


def _plain_field(field: Any, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {
            key: _plain_value(field.message_type.fields_by_name["value"], value[key])
            for key in sorted(value)
        }
    if field.is_repeated:
        return [_plain_value(field, item) for item in value]
    return _plain_value(field, value)


def _plain_value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return plain(value)
    if field.enum_type is not None:
        return _enum_name(field.enum_type, value)
    return value


def _enum_name(enum: Any, number: int) -> str:
    """`rbf` of Similarity.SIMILARITY_RBF."""
    if number not in enum.values_by_number:
        return str(number)
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enum.name).upper() + "_"
    return enum.values_by_number[number].name.removeprefix(prefix).lower()


def parse_plain(document: Any, message: Message) -> None:
    """Fills a message from what plain() made of one. Raises ValueError on what is no such thing."""
    if not isinstance(document, dict):
        raise ValueError(f"got {type(document).__name__}, expected an object")
    fields = message.DESCRIPTOR.fields_by_name
    named = {
        name: _enum_number(fields[name].enum_type, value)
        if name in fields and fields[name].enum_type is not None
        else value
        for name, value in document.items()
    }
    try:
        json_format.ParseDict(named, message)
    except json_format.ParseError as error:
        raise ValueError(str(error)) from error


def _enum_number(enum: Any, name: Any) -> int:
    known = {_enum_name(enum, number): number for number in enum.values_by_number}
    if name not in known:
        raise ValueError(f"{enum.name}: got {ascii(name)[:50]}, expected one of {', '.join(known)}")
    return int(known[name])


def confirm(command: str, question: Callable[[], str]) -> None:
    """Asks on a terminal, and ends the command on anything but yes. Raises BadInput where nobody can be asked."""
    if not on_terminal():
        raise BadInput(
            f"{command} asks before it removes anything, and stdin is no terminal; pass --yes"
        )
    typer.confirm(question(), abort=True, err=True)


def on_terminal() -> bool:
    """Whether somebody can answer."""
    return sys.stdin.isatty()

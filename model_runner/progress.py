"""Progress of long steps, on stderr: a bar with the remaining time on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress as Bar

Item = TypeVar("Item")

LINE_EVERY_S = 10.0


class Progress:
    """Follows loops, and other work that counts. `quiet` prints nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True)

    def track(self, items: Sequence[Item], what: str, unit: str = "item") -> Iterator[Item]:
        """The items, with progress."""
        with self.counting(len(items), what, unit) as done:
            for number, item in enumerate(items, 1):
                yield item
                done(number)

    @contextmanager
    def counting(
        self, total: int, what: str, unit: str = "item"
    ) -> Iterator[Callable[[int], None]]:
        """Progress of work that is no loop: the function that is given says how many of `total` are done."""
        if self._quiet:
            yield lambda done: None
        elif self._console.is_terminal:
            with Bar(*Bar.get_default_columns(), console=self._console) as bar:
                task = bar.add_task(what, total=total)
                yield lambda done: bar.update(task, completed=done)
        else:
            started = time.monotonic()
            yield _Lines(total, what, unit, started).say_now_and_then
            if total:
                sys.stderr.write(f"{what}: {total} {unit} in {time.monotonic() - started:.0f} s\n")

    def say(self, line: str) -> None:
        """One line."""
        if not self._quiet:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


@dataclass(slots=True)
class _Lines:
    """A line on stderr every LINE_EVERY_S, with the time that is left."""

    total: int
    what: str
    unit: str
    started_s: float
    said_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.said_s = self.started_s

    def say_now_and_then(self, done: int) -> None:
        now = time.monotonic()
        if done and now - self.said_s >= LINE_EVERY_S:
            self.said_s = now
            left_s = (now - self.started_s) / done * (self.total - done)
            sys.stderr.write(f"{self.what}: {done}/{self.total} {self.unit}, {left_s:.0f} s left\n")
            sys.stderr.flush()

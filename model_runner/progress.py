"""Progress of long steps, on stderr: a bar with the remaining time on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")

LINE_EVERY_S = 10.0


class Progress:
    """Follows loops. `quiet` prints nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True)

    def track(self, items: Sequence[Item], what: str, unit: str = "item") -> Iterator[Item]:
        """The items, with progress."""
        if self._quiet:
            yield from items
        elif self._console.is_terminal:
            yield from track(items, description=what, console=self._console)
        else:
            yield from self._lines(items, what, unit)

    def say(self, line: str) -> None:
        """One line."""
        if not self._quiet:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _lines(self, items: Sequence[Item], what: str, unit: str) -> Iterator[Item]:
        started = said = time.monotonic()
        for number, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if now - said >= LINE_EVERY_S:
                said = now
                left_s = (now - started) / number * (len(items) - number)
                sys.stderr.write(f"{what}: {number}/{len(items)} {unit}, {left_s:.0f} s left\n")
                sys.stderr.flush()
        if len(items):
            elapsed_s = time.monotonic() - started
            sys.stderr.write(f"{what}: {len(items)} {unit} in {elapsed_s:.0f} s\n")

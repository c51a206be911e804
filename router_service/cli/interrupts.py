"""Ctrl-C for commands that hold a store open: the work ends where it is sound, not in the middle of a write."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from router_service.cli.errors import Interrupted


@contextmanager
def interruptible(told: str) -> Iterator[Callable[[], None]]:
    """Yields a function that raises Interrupted with `told` once Ctrl-C was pressed; to be called often.

    A second Ctrl-C ends the process at once, which a store survives as it survives SIGKILL. Only the main thread hears
    signals; elsewhere nothing changes.
    """
    pressed = threading.Event()

    def check() -> None:
        if pressed.is_set():
            raise Interrupted(told)

    def on_interrupt(*_: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)

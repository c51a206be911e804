"""The lock between lookups and what changes under them: of a replica's entries, and of hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch


def nothing() -> None:
    """Of a device that does what it is asked for at once."""


def drain_of(device: torch.device) -> Callable[[], None]:
    """Waits until the device has done all that it was asked for, on any stream."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else nothing


class LookupLock:
    """Many lookups, or one commit: `with lock:` is a lookup, `with lock.committing():` a commit.

    A commit that waits holds new lookups back: it waits for those inside only. A thread that is inside may enter again,
    so that several lookups are answered from one version. Layers of one replica may share it, so that a change of
    several takes effect at once.

    Args:
        drain: waits for the device: what lookups inside have asked of it is done before a commit, and a commit is done
            before lookups are let in again, whichever streams they use.

    """

    def __init__(self, drain: Callable[[], None] = nothing) -> None:
        self.drain = drain
        self._changed = threading.Condition(threading.Lock())
        self._inside: dict[int, int] = {}  # how often, by thread
        self._committing = False

    def __enter__(self) -> None:
        thread = threading.get_ident()
        with self._changed:
            entered = self._inside.get(thread, 0)
            while self._committing and not entered:
                self._changed.wait()
            self._inside[thread] = entered + 1

    def __exit__(self, *_: object) -> None:
        thread = threading.get_ident()
        with self._changed:
            self._inside[thread] -= 1
            if not self._inside[thread]:
                del self._inside[thread]
                if self._committing:
                    self._changed.notify_all()

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Within it no lookup is inside."""
        with self._changed:
            while self._committing:
                self._changed.wait()
            self._committing = True
            while self._inside:
                self._changed.wait()
        try:
            self.drain()
            yield
            self.drain()
        finally:
            with self._changed:
                self._committing = False
                self._changed.notify_all()

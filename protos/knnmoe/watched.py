"""Files that are read again when they change: certificates, keys and tokens, at both ends."""

from __future__ import annotations

import logging
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)


class Watched(Generic[T]):
    """What `read` makes of some files. What cannot be used later on is said once, and what was read before stands.

    Args:
        paths: looked at for another inode, size or time of change.
        read: raises one of `unusable` for what cannot be used.
        every_s: they are looked at no more often than so.
        secret: of these that every user of the machine may read, a warning is logged.

    """

    def __init__(
        self,
        paths: Sequence[Path],
        read: Callable[[], T],
        *,
        every_s: float = 0.0,
        secret: Sequence[Path] = (),
        unusable: tuple[type[Exception], ...] = (OSError, ValueError),
    ) -> None:
        """Reads them. Raises what `read` raises."""
        self._paths, self._read, self._every_s, self._secret = paths, read, every_s, secret
        self._unusable = unusable
        self._lock = threading.Lock()
        self._looked_s = time.monotonic()
        self._seen = self._state()  # before it is read: what changes meanwhile is read again
        self._value = read()
        self._warn()

    def get(self, *, look: bool = False) -> T:
        """As of now, give or take `every_s`; `look`: as of now."""
        now_s = time.monotonic()
        if look or now_s - self._looked_s >= self._every_s:
            with self._lock:
                self._looked_s = now_s
                self._read_again()
        return self._value

    def _read_again(self) -> None:
        state = self._state()
        if state == self._seen:
            return
        self._seen = state
        try:
            self._value = self._read()
        except self._unusable as error:
            log.error("%s; what was read before stands", error)
            return
        log.info("read again: %s", ", ".join(map(str, self._paths)))
        self._warn()

    def _state(self) -> list[tuple[int, ...] | None]:
        return [_state_of(path) for path in self._paths]

    def _warn(self) -> None:
        for path, seen in zip(self._paths, self._seen, strict=True):
            if path in self._secret and seen is not None and seen[0] & stat.S_IROTH:
                log.warning(
                    "%s can be read by every user of this machine: chmod o-r %s", path, path
                )


def _state_of(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:  # read() says so
        return None
    return found.st_mode, found.st_ino, found.st_size, found.st_mtime_ns

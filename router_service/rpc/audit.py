"""The audit log: a line for each call that changed something, and of those that were refused what a disk can bear."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import NamedTuple

from router_service.errors import InvalidField, RoutingServiceError

_log = logging.getLogger("router_service.audit")

# Of refusals of one kind, in so many seconds the first lines; the rest are counted.
WINDOW_S, FIRST_LINES = 60.0, 5
# Kinds of unknown callers that are counted apart in that time: a new one costs an attacker no more than a port.
KINDS = 64
OTHERS = "others"
# Of a name that a client gave.
_LONGEST_NAME = 200
# Of a peer: `:41822` of an address, the number of a socket.
_CONNECTION = re.compile(r"[: ]\d+$")


@dataclass(frozen=True, slots=True)
class Line:
    """A call: whose token ("": none that is known), from where, on which memories, and how it ended."""

    who: str
    peer: str
    call: str
    memories: tuple[str, ...]
    result: str


class _Kind(NamedTuple):
    """Refusals that are counted together. `peer`: without what differs between a client's connections; "": any."""

    who: str
    peer: str
    call: str
    result: str


@dataclass(slots=True)
class _Seen:
    """Of one kind since the window began. Times in seconds since the epoch, of what was left out."""

    lines: int = 0
    left_out: int = 0
    since: float = 0.0
    until: float = 0.0


@dataclass
class AuditLog:
    """Writes lines, JSON documents. Every call that changed something has one, whatever else happens.

    Of refusals the first of each kind have one in each window, and its end has one for each kind with how many more
    there were. None is lost from the count, but by a kill within the window.

    Args:
        write: takes a line, without its end.
        clock: seconds since the epoch.

    """

    write: Callable[[str], None] = lambda line: _log.info("%s", line)
    clock: Callable[[], float] = time.time
    _seen: dict[_Kind, _Seen] = field(default_factory=dict)
    _began: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def changed(self, line: Line) -> None:
        """A call that may have changed something."""
        self._write(line, self.clock())

    def refused(self, line: Line) -> None:
        """A call that was not let through."""
        with self._lock:
            now = self._look()
            seen = self._of(line, now)
            if seen.lines < FIRST_LINES:
                seen.lines += 1
                self._write(line, now)
                return
            seen.since = seen.since if seen.left_out else now
            seen.until = now
            seen.left_out += 1

    def look(self) -> None:
        """From time to time: writes what a window that is over has left out."""
        with self._lock:
            self._look()

    def close(self) -> None:
        """Writes what was left out until now."""
        with self._lock:
            self._end()

    def _look(self) -> float:
        now = self.clock()
        if not 0 <= now - self._began < WINDOW_S:  # the clock may have been set back
            self._end()
        return now

    def _of(self, line: Line, now: float) -> _Seen:
        if not self._seen:
            self._began = now
        peer = "" if line.who else _CONNECTION.sub("", line.peer)
        kind = _Kind(line.who, peer, line.call, line.result)
        if kind in self._seen or line.who or sum(not each.who for each in self._seen) < KINDS:
            return self._seen.setdefault(kind, _Seen())
        others = _Kind("", OTHERS, "", line.result)
        return self._seen.setdefault(others, _Seen(lines=FIRST_LINES))

    def _end(self) -> None:
        for (who, peer, call, result), seen in self._seen.items():
            if seen.left_out:
                more = {"left_out": seen.left_out, "since": _time(seen.since)}
                self._write(Line(who, peer, call, (), result), seen.until, **more)
        self._seen = {}

    def _write(self, line: Line, at: float, **more: object) -> None:
        document = {
            "time": _time(at),
            "who": line.who,
            "peer": line.peer,
            "call": line.call,
            "memories": [_cut(name) for name in line.memories],
            "result": line.result,
            **more,
        }
        self.write(json.dumps(document))


def _time(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def _cut(name: str) -> str:
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}... ({len(name)} characters)"


def result_of(error: BaseException | None) -> str:
    """How a call ended: `ok`, the error's name, `client_left` or `failed`."""
    if error is None:
        return "ok"
    if isinstance(error, GeneratorExit):
        return "client_left"
    return type(error).__name__ if isinstance(error, RoutingServiceError) else "failed"


def audit_to(path: Path) -> None:
    """The audit log goes to a file, a JSON document on each line; it may be rotated. Raises InvalidField."""
    try:
        handler = WatchedFileHandler(path, encoding="utf-8")
    except OSError as error:
        raise InvalidField(
            "--audit-log", str(path), f"a file to write to ({error.strerror})"
        ) from error
    handler.setFormatter(logging.Formatter("%(message)s"))
    _log.handlers, _log.propagate = [handler], False
    _log.setLevel(logging.INFO)

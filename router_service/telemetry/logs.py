"""Log lines, as text or as JSON, which say which call they belong to."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Protocol

from typing_extensions import override

from router_service.errors import InvalidField

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# Of the message that a call works on, with what means that it is not given.
_OF_REQUEST = {"memory": "", "layer": None, "request_id": 0}
# version-trace-span-flags
_TRACEPARENT = 4


class Format(StrEnum):
    """Of log lines."""

    TEXT = "text"
    JSON = "json"


class Peer(Protocol):
    """Of a call's context."""

    def peer(self) -> str:
        """Who calls."""
        ...


@dataclass(slots=True)
class Call:
    """What a thread is at: a method, its context, and the message that came last."""

    method: str
    context: Peer
    request: Any = None


class _Current(threading.local):
    call: Call | None = None


_current = _Current()


@contextmanager
def calling(method: str, context: Peer) -> Iterator[None]:
    """Inside, lines of this thread belong to a call."""
    before, _current.call = _current.call, Call(method, context)
    try:
        yield
    finally:
        _current.call = before


def work_on(request: Any) -> None:
    """Lines of the call, from here on, are about this message."""
    if _current.call is not None:
        _current.call.request = request


def configure(level: str, form: str) -> None:
    """Of this process, to stderr. Raises InvalidField."""
    numeric = logging.getLevelNamesMapping().get(level.upper())
    if numeric is None:
        raise InvalidField("--log-level", level, "DEBUG, INFO, WARNING or ERROR")
    if form not in list(Format):
        raise InvalidField("--log-format", form, " or ".join(Format))
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == Format.JSON else logging.Formatter(_TEXT))
    logging.basicConfig(level=numeric, handlers=[handler])


class JsonFormatter(logging.Formatter):
    """An object a line."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_of_call(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _of_call() -> dict[str, Any]:
    call = _current.call
    if call is None:
        return {}
    said: dict[str, Any] = {"method": call.method, "peer": call.context.peer()}
    for name, nothing in _OF_REQUEST.items():
        if (value := getattr(call.request, name, nothing)) != nothing:
            said[name] = value
    if len(parts := getattr(call.request, "traceparent", "").split("-")) == _TRACEPARENT:
        said["trace_id"] = parts[1]
    return said

"""Faults that a server shows on purpose: slow, silent, refusing, of another version."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import grpc

from tests.qdrant_standin.errors import ApiError

# How often a call that is held looks whether its caller is still there.
_LOOK_S = 0.01


class Fault:
    """One fault; lift() ends it, and lets go of the calls that it holds."""

    def __init__(
        self,
        method: str | None,
        calls: int | None,
        delay_s: float = 0.0,
        error: ApiError | None = None,
    ) -> None:
        self.method, self.delay_s, self.error = method, delay_s, error
        self.left = math.inf if calls is None else calls
        self._lifted = threading.Event()

    def matches(self, path: str) -> bool:
        """Whether a call of /qdrant.SERVICE/METHOD has it: METHOD, SERVICE/METHOD or None for all."""
        service, name = path.rsplit("/", 1)
        full = f"{service.rsplit('.', 1)[-1]}/{name}"
        return not self._lifted.is_set() and self.method in (None, name, full)

    def lift(self) -> None:
        """The server is as it was before."""
        self._lifted.set()

    def show(self, context: grpc.ServicerContext) -> None:
        """Waits, but not for longer than the caller; then raises the error, if there is one."""
        if self.delay_s:
            self._wait(context)
        if self.error is not None:
            raise self.error

    def _wait(self, context: grpc.ServicerContext) -> None:
        end = time.monotonic() + self.delay_s
        while context.is_active() and not self._lifted.is_set() and time.monotonic() < end:
            self._lifted.wait(min(_LOOK_S, end - time.monotonic()))


class Faults:
    """The faults of one server; they may change while it serves. `calls`: how many calls show it, None for all.

    `method` is a name such as "QueryBatch" or "Points/Get"; None means every method.
    """

    def __init__(self, version: str) -> None:
        self.version = version
        self.calls: Counter[str] = Counter()
        self._faults: list[Fault] = []
        self._blind: list[str] = []
        self._lock = threading.Lock()

    def delay(self, seconds: float, method: str | None = None, calls: int | None = None) -> Fault:
        """Answers come later by so many seconds."""
        return self._add(Fault(method, calls, delay_s=seconds))

    def black_hole(self, method: str | None = None, calls: int | None = None) -> Fault:
        """No answer until the caller gives up, or until it is lifted."""
        return self._add(Fault(method, calls, delay_s=math.inf))

    def fail(
        self,
        code: grpc.StatusCode,
        text: str = "injected",
        method: str | None = None,
        calls: int | None = None,
        trailing: Sequence[tuple[str, str]] = (),
    ) -> Fault:
        """Calls end with a status and trailing metadata."""
        return self._add(Fault(method, calls, error=ApiError(code, text, tuple(trailing))))

    def rate_limit(
        self, retry_after_s: int, method: str | None = None, calls: int | None = None
    ) -> Fault:
        """RESOURCE_EXHAUSTED with `retry-after`, as the real server's rate limiters send it."""
        text = (
            "Rate limiting exceeded: Read rate limit exceeded: Operation requires 1 tokens "
            f"but only 0.0 were available. Retry after {retry_after_s}s"
        )
        trailing = (("retry-after", str(retry_after_s)),)
        return self.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, text, method, calls, trailing)

    def blind(self, pattern: str) -> None:
        """Searches of collections with such names ("*", "?" as in a shell) find nothing; their counts stay right.

        So does a server whose files are on FUSE after it restored a snapshot.
        """
        with self._lock:
            self._blind.append(pattern)

    def blinds(self, collection: str) -> bool:
        """Whether searches of this collection find nothing."""
        with self._lock:
            return any(fnmatchcase(collection, pattern) for pattern in self._blind)

    def lift(self) -> None:
        """Ends all of them."""
        with self._lock:
            faults, self._faults = self._faults, []
            self._blind.clear()
        for fault in faults:
            fault.lift()

    def before(self, path: str, context: Any) -> None:
        """Shows what a call of this method is to meet. Raises ApiError."""
        for fault in self._met(path):
            fault.show(context)

    def _met(self, path: str) -> list[Fault]:
        with self._lock:
            self.calls[path.rsplit("/", 1)[-1]] += 1
            met = [fault for fault in self._faults if fault.left > 0 and fault.matches(path)]
            for fault in met:
                fault.left -= 1
        return met

    def _add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

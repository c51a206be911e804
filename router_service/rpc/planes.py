"""Planes: the calls of one kind have threads and permits of their own, and so are answered whatever the others do.

A call works with a permit, or waits for its client with a thread alone. Of those that wait there are a few times as
many; beyond that who has waited longest is ended, so clients that say nothing take no place from those that do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from router_service.errors import (
    InvalidField,
    Overloaded,
    RoutingServiceError,
    ShuttingDown,
)
from router_service.telemetry.logs import work_on

log = logging.getLogger(__name__)

# A memory gets another permit while it has fewer than so many times those that are free: one alone three quarters of
# them, two together six sevenths.
_SHARE = 3
# For each permit, calls that wait for it, and calls that wait for their client.
_IN_LINE, _WAITING = 4, 4
# A call waits for a permit this share of its time, and no longer than so many seconds.
_LINE_SHARE, _LINE_S = 0.25, 0.25
# Threads beside those of calls that work or wait: for calls that are being refused or ended.
_SPARE_THREADS = 8
# Copies that are kept in step, each of which has a permit or waits until its client has taken a message, and reports of
# theirs: twice as many as there may be copies, so that all may be of one memory.
_COPIES = 128
# Calls whose errors leave a token to the model's own router.
_LOOKUPS = tuple(f"/knnmoe.v1.RoutingService/{name}" for name in ("Route", "RouteStream"))
# Health checks at a time, and those who watch.
_HEALTH_CHECKS, _WATCHERS = 32, 128


@dataclass(eq=False, slots=True)
class _Place:
    """A call in line for a permit."""

    memory: str
    called: threading.Event = field(default_factory=threading.Event)  # it has its permit


@dataclass(slots=True)
class _Use:
    """What the calls of one memory have."""

    at_work: int = 0
    in_line: int = 0


class Permits:
    """Calls at work, at most so many in all, and of each memory at most its share. A few times as many wait in line.

    Who gets no permit in a part of its time is refused, and at once when the line is full. Refusing at once whoever
    finds no permit costs the others more: clients that ask again and again take the processor from those that are
    answered.
    """

    def __init__(self, most: int) -> None:
        self._most, self._at_work = most, 0
        self._line: list[_Place] = []  # in the order of arrival
        self._of: dict[str, _Use] = {}  # of memories with calls
        self._closed = False
        self._lock = threading.Lock()

    @property
    def in_flight(self) -> int:
        """Calls at work."""
        return self._at_work

    @property
    def refuses(self) -> bool:
        """Whether a call would be refused whatever memory it is for."""
        return self._closed or len(self._line) >= _IN_LINE * self._most

    def close(self) -> None:
        """Refuses new calls; those that have begun go on."""
        self._closed = True

    def refusal(self) -> RoutingServiceError:
        """What is said to those that are refused."""
        if self._closed:
            return ShuttingDown("the service is shutting down; retry on another or later")
        return Overloaded(f"{self._most} calls in flight (--max-in-flight); retry later")

    @contextmanager
    def one(
        self, memory: str = "", left_s: float = float("inf"), *, begun: bool = False
    ) -> Iterator[None]:
        """For work on a memory ("": on none) by a call that has `left_s`.

        Raises Overloaded, and ShuttingDown after close() unless the call had `begun` before.
        """
        with self._lock:
            if self._closed and not begun:
                raise self.refusal()
            place = self._begin(memory)
        if place is not None:
            self._wait(place, left_s)
        try:
            yield
        finally:
            self._end(memory)

    @contextmanager
    def again(self, memory: str = "") -> Iterator[None]:
        """For a call that has only waited for its client in between: it is not refused."""
        with self._lock:
            self._grant(memory)
        try:
            yield
        finally:
            self._end(memory)

    def _begin(self, memory: str) -> _Place | None:
        """None when the call has its permit, else its place in the line."""
        use = self._of.get(memory) or _Use()
        if not use.in_line and self._is_free(memory):
            self._grant(memory)
            return None
        if use.in_line >= _SHARE * (_IN_LINE * self._most - len(self._line)):  # 0 when it is full
            raise self.refusal()
        self._of[memory] = use
        use.in_line += 1
        place = _Place(memory)
        self._line.append(place)
        return place

    def _wait(self, place: _Place, left_s: float) -> None:
        place.called.wait(min(_LINE_SHARE * left_s, _LINE_S))
        with self._lock:
            if place.called.is_set():
                return
            self._line.remove(place)
            self._of[place.memory].in_line -= 1
            self._forget(place.memory)
            raise self.refusal()

    def _end(self, memory: str) -> None:
        with self._lock:
            self._at_work -= 1
            self._of[memory].at_work -= 1
            for place in list(self._line):
                if self._is_free(place.memory):
                    self._call(place)
            self._forget(memory)

    def _call(self, place: _Place) -> None:
        self._of[place.memory].in_line -= 1
        self._line.remove(place)
        self._grant(place.memory)
        place.called.set()

    def _grant(self, memory: str) -> None:
        self._at_work += 1
        self._of.setdefault(memory, _Use()).at_work += 1

    def _forget(self, memory: str) -> None:
        if not (self._of[memory].at_work or self._of[memory].in_line):
            del self._of[memory]

    def _is_free(self, memory: str) -> bool:
        free = self._most - self._at_work
        use = self._of.get(memory)
        return free > 0 and (not memory or use is None or use.at_work < _SHARE * free)


class WaitingRoom:
    """Calls that wait for their client, to send a message or to take one: they have a thread, but no permit."""

    def __init__(self, most: int) -> None:
        self._most = most
        # Until when they may wait, on the monotonic clock; who has waited longest comes first.
        self._waits: dict[grpc.ServicerContext, float] = {}
        self._closed = False
        self._lock = threading.Lock()

    @contextmanager
    def beginning(self, context: grpc.ServicerContext, within_s: float) -> Iterator[None]:
        """Around the wait for a call's first message, in which gRPC raises when the call is ended.

        Raises ShuttingDown.
        """
        if self._closed:
            raise ShuttingDown("the service is shutting down; retry on another or later")
        with self._waiting(context, time.monotonic() + within_s):
            yield

    @contextmanager
    def going_on(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Around the wait for another message, or until an answer is taken; it may take long."""
        with self._waiting(context, float("inf")):
            yield

    def end_overdue(self) -> None:
        """Ends the calls that have waited too long."""
        now = time.monotonic()
        self._end(lambda until: until <= now)

    def close(self) -> None:
        """Ends the calls that wait for their first message, and refuses new ones."""
        self._closed = True
        self._end(lambda until: until < float("inf"))

    @contextmanager
    def _waiting(self, context: grpc.ServicerContext, until: float) -> Iterator[None]:
        with self._lock:
            full = len(self._waits) >= self._most
            longest = next(iter(self._waits)) if full else None
            if longest is not None:
                del self._waits[longest]
            self._waits[context] = until
        if longest is not None:
            log.info("%d calls wait for their clients: ended the first", self._most)
            longest.cancel()
        try:
            yield
        finally:
            with self._lock:
                self._waits.pop(context, None)

    def _end(self, which: Callable[[float], bool]) -> None:
        with self._lock:
            ended = [context for context, until in self._waits.items() if which(until)]
        for context in ended:
            log.info("ended a call of %s whose message does not come", context.peer())
            context.cancel()


class Refusals:
    """Calls that ended in an error, by method (`/knnmoe.v1.RoutingService/Route`) and reason (`overloaded`)."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def add(self, method: str, reason: str) -> None:
        """Counts one."""
        with self._lock:
            self._counts[method, reason] += 1

    def read(self) -> Counter[tuple[str, str]]:
        """Since the service started."""
        with self._lock:
            return self._counts.copy()

    def lookups(self) -> Counter[str]:
        """By reason, those whose error left a token to the model's own router."""
        counts: Counter[str] = Counter()
        for (method, reason), number in self.read().items():
            if method in _LOOKUPS:
                counts[reason] += number
        return counts


class Plane:
    """Calls of one kind, with threads and permits of their own: whatever they do, those of other planes are answered.

    gRPC keeps a thread for a call from its first byte on.
    """

    def __init__(self, name: str, most: int, message_within_s: float) -> None:
        """`message_within_s`: that the first message of a call may take."""
        self.name = name
        self.permits, self.room = Permits(most), WaitingRoom(_WAITING * most)
        self.refused = Refusals()
        self.threads = ThreadPoolExecutor(
            (1 + _IN_LINE + _WAITING) * most + _SPARE_THREADS, thread_name_prefix=name
        )
        self.message_within_s = message_within_s

    def first(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        """The message of a call that has but one. Raises InvalidField."""
        with self.room.beginning(context, self.message_within_s):
            request = next(requests, None)
        if request is None:
            raise InvalidField("request", "no message", "a message of the method's type")
        return request

    @contextmanager
    def working(
        self, request: Any, context: grpc.ServicerContext, *, begun: bool = False
    ) -> Iterator[None]:
        """Around the work on a message; its `timeout_us` counts from when it came. Raises what Permits.one() raises."""
        work_on(request)
        came, of_message_us = time.monotonic(), getattr(request, "timeout_us", 0)
        of_call_s = context.time_remaining()
        left_s = [float("inf") if of_call_s is None else of_call_s]
        if of_message_us:
            left_s.append(of_message_us / 1e6)
        with self.permits.one(memory_of(request), min(left_s), begun=begun):
            if of_message_us:
                waited_us = int((time.monotonic() - came) * 1e6)
                request.timeout_us = max(1, of_message_us - waited_us)
            yield


@dataclass
class Turns(AbstractContextManager["Turns"]):
    """A streaming call: by turns it works, with a permit, and waits for its client, without."""

    plane: Plane
    context: grpc.ServicerContext
    _memory: str = ""
    _begun: bool = False
    _turn: ExitStack = field(default_factory=ExitStack)

    def __exit__(self, *_: object) -> None:
        self._turn.close()

    def work(self, request: Any) -> None:
        """On a message that has arrived. Raises what Permits.one() raises."""
        self._turn.close()
        self._memory = memory_of(request)
        self._turn.enter_context(self.plane.working(request, self.context, begun=self._begun))
        self._begun = True

    def go_on(self) -> None:
        """With the same message, after wait()."""
        self._turn.close()
        self._turn.enter_context(self.plane.permits.again(self._memory))

    def wait(self, wait: AbstractContextManager[None]) -> None:
        """Until the next work()."""
        self._turn.close()
        self._turn.enter_context(wait)

    def only_message(self, requests: Iterator[Any]) -> Any:
        """That of a call which has but one; it works from here on. Raises InvalidField, and as work()."""
        request = self.plane.first(requests, self.context)
        self.work(request)
        return request

    def messages(self, requests: Iterator[Any]) -> Iterator[Any]:
        """The client's messages, each with a permit from its arrival until its answer is there."""
        self.wait(self.plane.room.beginning(self.context, self.plane.message_within_s))
        while (request := next(requests, None)) is not None:
            self.work(request)
            yield request
            self.wait(self.plane.room.going_on(self.context))


def memory_of(request: Any) -> str:
    """The memory that a request is about; "" where it is none."""
    return str(getattr(request, "memory", ""))


class Planes:
    """The planes of a service."""

    def __init__(self, most: int, within_s: float) -> None:
        """`most` calls at work on the data plane, and on the admin plane; `within_s`: see Plane."""
        self._routing = Plane("routing", most, within_s)
        self._admin = Plane("admin", most, within_s)
        self._copies = Plane("copies", _COPIES, within_s)
        self._health = Plane("health", _HEALTH_CHECKS, within_s)
        self._watchers = Plane("watchers", _WATCHERS, within_s)
        self._all = (self._routing, self._admin, self._copies, self._health, self._watchers)

    @property
    def in_flight(self) -> int:
        """Calls at work on memories."""
        return self._routing.permits.in_flight + self._admin.permits.in_flight

    def at_work(self) -> dict[str, int]:
        """Calls at work, by plane."""
        return {plane.name: plane.permits.in_flight for plane in self._all}

    def refused(self) -> Counter[tuple[str, str]]:
        """See Refusals.read(), of all planes."""
        return sum((plane.refused.read() for plane in self._all), Counter())

    @property
    def routing(self) -> Plane:
        """Of lookups."""
        return self._routing

    def of(self, method: str) -> Plane:
        """That of a method, e.g. `/knnmoe.v1.RoutingService/Route`."""
        if method.startswith("/grpc.health."):
            return self._watchers if method.endswith("/Watch") else self._health
        if method.startswith("/knnmoe.v1.ReplicationService/"):
            return self._copies
        return self._routing if method.startswith("/knnmoe.v1.RoutingService/") else self._admin

    def end_overdue(self) -> None:
        """Ends the calls whose message does not come."""
        for plane in self._all:
            plane.room.end_overdue()

    def close(self) -> None:
        """Refuses new calls, except for health checks, and ends those that have not said what they want."""
        for plane in (self._routing, self._admin, self._copies):
            plane.permits.close()
            plane.room.close()

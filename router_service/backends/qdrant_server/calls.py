"""Calls to whichever node answers: another try where one fails, and a second one beside a lookup that is late.

A lookup is late after the time that 95 of 100 of its kind took of late (hedging: Dean and Barroso, The Tail at Scale,
2013). The first answer counts, the other call is cancelled. Second calls are a tenth of all at the most.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any

import grpc

from router_service.backends.qdrant_server.failures import Failure, Meaning, error_of, failure_of
from router_service.backends.qdrant_server.node import Node
from router_service.backends.qdrant_server.nodes import Nodes

# What is short and changes nothing may be asked of two nodes at once; what is long is only asked again.
_SHORT_READS = frozenset(
    (
        "QueryBatch",
        "Get",
        "Count",
        "List",
        "ListAliases",
        "ListCollectionAliases",
        "CollectionExists",
    )
)
_WRITES = frozenset(("Upsert", "Delete"))
_SOON_S = 0.5
_READS = _SHORT_READS | {"Scroll"}
_REMEMBERED, _LATE_SHARE, _JUDGED_EVERY = 128, 0.05, 16
# Until enough answers of a kind have come; and never earlier than this.
_LATE_AT_FIRST_S, _LATE_AT_LEAST_S = 0.1, 0.001
_SECOND_CALLS_SHARE, _SECOND_CALLS_AT_ONCE = 0.1, 16.0

# Method and size of a request (powers of two): what takes about as long.
Kind = tuple[str, int]


class Lateness:
    """When an answer is late, by the last ones of its kind; and whether a second call may be made."""

    def __init__(self, share: float = _SECOND_CALLS_SHARE) -> None:
        """`share`: of calls at the most that are made a second time."""
        self._share = share
        self._lock = threading.Lock()
        self._took: dict[Kind, deque[float]] = {}
        self._seen: dict[Kind, int] = {}
        self._late_s: dict[Kind, float] = {}
        self._allowed = _SECOND_CALLS_AT_ONCE if share else 0.0
        self.calls = self.second_calls = 0

    def late_s(self, kind: Kind) -> float:
        """Seconds after which an answer of this kind is late. Counts the call."""
        with self._lock:
            self.calls += 1
            self._allowed = min(self._allowed + self._share, _SECOND_CALLS_AT_ONCE)
            return self._late_s.get(kind, _LATE_AT_FIRST_S)

    def took(self, kind: Kind, seconds: float) -> None:
        """An answer came after so many seconds; or none did until then, and another one was taken."""
        with self._lock:
            took = self._took.setdefault(kind, deque(maxlen=_REMEMBERED))
            took.append(seconds)
            self._seen[kind] = seen = self._seen.get(kind, 0) + 1
            if seen % _JUDGED_EVERY == 0:
                late_s = sorted(took)[math.ceil(len(took) * (1 - _LATE_SHARE)) - 1]
                self._late_s[kind] = max(late_s, _LATE_AT_LEAST_S)

    def allows_second(self) -> bool:
        """Whether one more second call may be made, and counts it."""
        with self._lock:
            if self._allowed < 1.0:
                return False
            self._allowed -= 1.0
            self.second_calls += 1
            return True


class _Call:
    """A request on its way: who has been asked since when, and when somebody is to be asked next."""

    def __init__(self, request: Any, kind: Kind) -> None:
        self.request, self.kind = request, kind
        self.under_way: dict[Any, tuple[Node, float]] = {}
        self.asked: list[Node] = []
        self.failures, self.half_done = 0, False
        self.late_s = math.inf
        self.due = 0.0


class Calls:
    """Requests of one method that are made together. Raises StorageError, Overloaded."""

    def __init__(
        self,
        nodes: Nodes,
        lateness: Lateness,
        service: str,
        method: str,
        timeout_s: float,
        *,
        repeat: bool = True,
    ) -> None:
        """`repeat`: False for what must not be done twice."""
        self._nodes, self._lateness, self._repeat = nodes, lateness, repeat
        self._service, self._method, self._timeout_s = service, method, timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._ended: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        self._open: dict[int, _Call] = {}

    def replies(self, requests: Sequence[Any]) -> list[Any]:
        """In the order of the requests."""
        self._open = {
            number: _Call(request, (self._method, request.ByteSize().bit_length()))
            for number, request in enumerate(requests)
        }
        replies: dict[int, Any] = {}
        try:
            while self._open:
                for number, future in self._next_ended():
                    call = self._open.get(number)
                    if call is not None and future in call.under_way:
                        self._settle(number, call, future, replies)
        finally:
            for call in self._open.values():
                self._end(call)
        return [replies[number] for number in range(len(requests))]

    def _next_ended(self) -> Iterator[tuple[int, Any]]:
        """Asks where somebody is to be asked, then waits for an answer or until that is so again."""
        now = time.monotonic()
        for number, call in self._open.items():
            if call.due <= now:
                self._ask(number, call, now)
        due = min(call.due for call in self._open.values())
        try:
            yield self._ended.get(timeout=None if due == math.inf else max(due - now, 0.0))
        except Empty:
            return

    def _ask(self, number: int, call: _Call, now: float) -> None:
        call.due, second = math.inf, bool(call.under_way)
        if second and not (self._nodes.others(call.asked) and self._lateness.allows_second()):
            return
        node = self._nodes.pick(call.asked)
        stub = getattr(node.stubs(), self._service)
        future = getattr(stub, self._method).future(
            call.request, timeout=max(self._deadline - now, 0.001), metadata=node.metadata
        )
        call.under_way[future] = node, now
        call.asked.append(node)
        if self._repeat:
            node.under_way.add(future)
        if self._method in _SHORT_READS and not second:
            call.late_s = self._lateness.late_s(call.kind)
            call.due = now + call.late_s
        future.add_done_callback(lambda ended: self._ended.put((number, ended)))

    def _settle(self, number: int, call: _Call, future: Any, replies: dict[int, Any]) -> None:
        node, began = call.under_way.pop(future)
        node.under_way.discard(future)
        took_s = time.monotonic() - began
        try:
            replies[number] = future.result()
        except grpc.FutureCancelledError as error:  # by whoever found that the node is silent
            failure = Failure(Meaning.UNREACHABLE, "CANCELLED", "no sign of life")
            self._failed(call, node, took_s, failure, error)
        except grpc.RpcError as error:
            self._failed(call, node, took_s, failure_of(error), error)
        else:
            if self._method in _SHORT_READS:
                self._judge(call, node, began, took_s)
            self._end(self._open.pop(number))
            if self._service == "points" and self._method in _WRITES:
                troubled = len(call.asked) > 1 or call.failures > 0 or took_s > _SOON_S
                self._nodes.written(call.request.collection_name, troubled=troubled)

    def _judge(self, call: _Call, node: Node, began: float, took_s: float) -> None:
        """What an answer says of the node that gave it, and of one that was asked before it and has given none."""
        self._lateness.took(call.kind, took_s)
        if took_s < call.late_s:
            self._nodes.timely(node)
        for other, since in call.under_way.values():
            if since < began:
                self._lateness.took(call.kind, time.monotonic() - since)
                self._nodes.late(other)

    def _failed(
        self, call: _Call, node: Node, took_s: float, failure: Failure, error: Exception
    ) -> None:
        """Plans another try. Raises what it comes to when there is to be none, and nobody else has been asked."""
        read = self._method in _READS
        call.half_done |= failure.half_done
        if failure.meaning is not Meaning.LATE or took_s >= call.late_s:
            self._nodes.failed(node, failure, read=read)
        if call.under_way:
            return
        now = time.monotonic()
        passes = self._repeat and failure.pause_s(1) is not None and now < self._deadline
        elsewhere = read or failure.meaning is Meaning.UNREACHABLE  # it may do better at once
        if passes and elsewhere and self._nodes.others(call.asked):
            call.due = now
            return
        call.failures += 1
        wait_s = failure.pause_s(call.failures) if passes else None
        if wait_s is None or now + wait_s >= self._deadline:
            name = node.target if self._nodes.several else ""
            failed = error_of(failure, self._nodes.options, self._timeout_s, name)
            failed.half_done = call.half_done
            raise failed from error
        call.due, call.asked = now + wait_s, [node]

    def _end(self, call: _Call) -> None:
        for future, (node, _) in call.under_way.items():
            node.under_way.discard(future)
            future.cancel()

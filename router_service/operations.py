"""Long work: each piece runs in a thread of its own, can be watched, and is cancelled when nobody watches it."""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

from router_service.backends.base import Report
from router_service.errors import (
    Busy,
    Cancelled,
    OperationNotFound,
    RoutingServiceError,
    ShuttingDown,
    shorten,
)

log = logging.getLogger(__name__)

# Ended operations that are still listed.
KEEP_ENDED = 100
# How often a watcher hears of an operation that has nothing new to say.
REPORT_EVERY_S = 0.25

T = TypeVar("T")
Work = Callable[[Report], Iterator[T]]


class State(StrEnum):
    """How far an operation is."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation at one moment; `total` 0: not known, `ended_unix_ms` 0: it runs."""

    id: str
    kind: str
    memory: str
    started_unix_ms: int
    state: State = State.RUNNING
    stage: str = "start"
    done: int = 0
    total: int = 0
    ended_unix_ms: int = 0
    error: str = ""


# What a watcher sees: the operation, and a result when there is one.
Steps = Generator[tuple[Operation, T | None], None, None]


class Operations:
    """The operations of a service. Safe to call from several threads."""

    def __init__(self, keep_ended: int = KEEP_ENDED) -> None:
        self._keep_ended = keep_ended
        self._jobs: dict[str, _Job] = {}  # oldest first
        self._ended: Counter[tuple[str, State]] = Counter()
        self._alone: dict[str, threading.Event] = {}  # memory -> set when none_on() ends
        self._lock = threading.Lock()
        self._closed = False

    def list(self, memory: str = "") -> list[Operation]:
        """Those that run and the last that ended, oldest first; of one memory, or of all."""
        with self._lock:
            found = [job.operation for job in self._jobs.values()]
        return [operation for operation in found if memory in ("", operation.memory)]

    def ended(self) -> Counter[tuple[str, State]]:
        """How many have ended since the service started, by kind and how."""
        with self._lock:
            return self._ended.copy()

    def get(self, operation_id: str) -> Operation:
        """Raises OperationNotFound."""
        return self._find(operation_id).operation

    def are_on(self, memory: str) -> bool:
        """Whether an operation runs that changes a memory."""
        with self._lock:
            jobs = [job for job in self._jobs.values() if job.exclusive]
        return any(
            job.operation.memory == memory and job.operation.state is State.RUNNING for job in jobs
        )

    def cancel(self, operation_id: str) -> Operation:
        """Asks an operation to end; it does at its next report. Raises OperationNotFound."""
        job = self._find(operation_id)
        job.cancel("a client asked for it")
        return job.operation

    def close(self) -> None:
        """Refuses new operations and asks those that run to end."""
        with self._lock:
            self._closed = True
            for job in self._jobs.values():
                job.cancel("the service stops")

    def join(self, timeout_s: float) -> bool:
        """Waits for those that run; whether all have ended."""
        until = time.monotonic() + timeout_s
        with self._lock:
            threads = [job.thread for job in self._jobs.values() if job.thread is not None]
            alone = list(self._alone.values())
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        ended = [event.wait(max(0.0, until - time.monotonic())) for event in alone]
        return all(ended) and not any(thread.is_alive() for thread in threads)

    @contextmanager
    def none_on(self, *memories: str) -> Iterator[None]:
        """Inside, no operation runs on these memories, and none begins. Raises Busy and ShuttingDown."""
        ended = threading.Event()
        with self._lock:
            self._require_open()
            for memory in memories:
                self._require_free(memory, alone=True)
            self._alone |= dict.fromkeys(memories, ended)
        try:
            yield
        finally:
            with self._lock:
                for memory in memories:
                    del self._alone[memory]
            ended.set()

    def run(self, kind: str, memory: str, work: Work[T], *, exclusive: bool = True) -> Steps[T]:
        """Does `work` in a thread; yields the operation at once, then each result with it, and progress in between.

        Closing the iterator cancels the work and waits for its end. `work` gets the Report to call. `exclusive`: the
        memory is changed, and nothing else that changes it runs meanwhile. Raises Busy, and what `work` raises.
        """
        with self._registered(kind, memory, exclusive) as job:
            results: queue.SimpleQueue[tuple[T] | None] = queue.SimpleQueue()
            job.thread = threading.Thread(target=_do, args=(job, work, results), name=kind)
            begun = job.operation
            job.thread.start()
            try:
                yield begun, None
                yield from _watch(job, results)
            finally:
                job.cancel("its client went away")  # nothing happens to one that has ended
                job.thread.join()
            job.raise_failure()

    @contextmanager
    def _registered(self, kind: str, memory: str, exclusive: bool) -> Iterator[_Job]:
        with self._lock:
            self._require_open()
            self._require_free(memory, exclusive=exclusive)
            job = _Job(Operation(_new_id(self._jobs), kind, memory, _now()), exclusive)
            self._jobs[job.operation.id] = job
        try:
            yield job
        finally:
            self._count_and_forget(job)

    def _require_open(self) -> None:
        if self._closed:
            raise ShuttingDown("the service is shutting down; retry on another or later")

    def _require_free(self, memory: str, *, exclusive: bool = True, alone: bool = False) -> None:
        """Raises Busy while an operation runs that cannot be beside an `exclusive` one; beside one `alone` none can."""
        if memory in self._alone:
            raise Busy(f"memory {memory!r} is being replaced, or replaces another; try again soon")
        for job in self._jobs.values():
            other, in_the_way = job.operation, alone or (exclusive and job.exclusive)
            if in_the_way and other.memory == memory and other.state is State.RUNNING:
                raise Busy(
                    f"memory {memory!r} is held by operation {other.id} ({other.kind}, {other.stage}); wait, or end "
                    f"it with: router-admin operations cancel {other.id}"
                )

    def _find(self, operation_id: str) -> _Job:
        with self._lock:
            job = self._jobs.get(operation_id)
        if job is None:
            raise OperationNotFound(
                f"operation {shorten(operation_id)} not found; `router-admin operations list` shows those that run "
                f"and the last {self._keep_ended} that ended"
            )
        return job

    def _count_and_forget(self, last: _Job) -> None:
        """Of those that have ended the oldest are listed no longer."""
        with self._lock:
            self._ended[last.operation.kind, last.operation.state] += 1
            ended = [i for i, job in self._jobs.items() if job.operation.state is not State.RUNNING]
            for operation_id in ended[: max(0, len(ended) - self._keep_ended)]:
                del self._jobs[operation_id]


class _Job:
    """One operation while it runs."""

    def __init__(self, operation: Operation, exclusive: bool) -> None:
        self.operation = operation
        self.thread: threading.Thread | None = None
        self.exclusive = exclusive
        self._cancelled_because = ""
        self._failure: BaseException | None = None

    def report(self, stage: str, done: int, total: int) -> None:
        """A Report. Raises Cancelled after cancel()."""
        self.operation = replace(self.operation, stage=stage, done=done, total=total)
        if self._cancelled_because:
            raise Cancelled(f"{self.operation.kind} was cancelled: {self._cancelled_because}")

    def cancel(self, because: str) -> None:
        """Lets the next report raise; the first reason counts."""
        self._cancelled_because = self._cancelled_because or because

    def end(self, failure: BaseException | None) -> None:
        """Writes down how it ended."""
        self._failure = failure
        state = State.CANCELLED if isinstance(failure, Cancelled) else State.FAILED
        self.operation = replace(
            self.operation,
            state=State.DONE if failure is None else state,
            ended_unix_ms=_now(),
            error="" if failure is None else _reason_of(failure),
        )

    def raise_failure(self) -> None:
        """Raises what the work raised, if it did."""
        if self._failure is not None:
            raise self._failure


def _do(job: _Job, work: Work[T], results: queue.SimpleQueue[tuple[T] | None]) -> None:
    """The thread of one operation; whatever it raises is raised to its watcher."""
    failure: BaseException | None = None
    try:
        job.report("start", 0, 0)
        for result in work(job.report):
            results.put((result,))
    except BaseException as error:  # noqa: BLE001  # raised again in _Job.raise_failure
        failure = error
    finally:
        job.end(failure)
        results.put(None)
        log.info("%s", _summary(job.operation))


def _watch(job: _Job, results: queue.SimpleQueue[tuple[T] | None]) -> Steps[T]:
    while True:
        try:
            result = results.get(timeout=REPORT_EVERY_S)
        except queue.Empty:
            yield job.operation, None
            continue
        if result is None:
            break
        yield job.operation, result[0]
    if job.operation.state is State.DONE:
        yield job.operation, None


def _new_id(taken: dict[str, _Job]) -> str:
    """Short enough to be typed."""
    while (name := secrets.token_hex(4)) in taken:
        pass
    return name


def _now() -> int:
    return time.time_ns() // 1_000_000


def _reason_of(failure: BaseException) -> str:
    if isinstance(failure, RoutingServiceError):
        return str(failure)
    return f"{type(failure).__name__}; see the service's log"


def _summary(operation: Operation) -> str:
    took_s = (operation.ended_unix_ms - operation.started_unix_ms) / 1000
    text = f"operation {operation.id}: {operation.kind} of {shorten(operation.memory)} {operation.state}"
    return f"{text} after {took_s:.1f} s" + (f": {operation.error}" if operation.error else "")

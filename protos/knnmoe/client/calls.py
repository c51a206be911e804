"""How calls are made: retries inside a deadline, streams with a timeout on every wait, and a pool of them."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import grpc

from knnmoe.errors import (
    ClientClosed,
    ConnectionMismatch,
    ServiceError,
    ServiceRefused,
    ServiceUnavailable,
    service_error,
)

Request = TypeVar("Request")
Response = TypeVar("Response")
Request_contra = TypeVar("Request_contra", contravariant=True)
Response_co = TypeVar("Response_co", covariant=True)

# Seconds before each retry: a service that is restarted is back within a second or two.
PAUSES_S = (0.5, 2.5)
NO_PAUSES_S = (0.0, 0.0)
# So long a failed connection is looked at.
WHY_S = 2.0
_SPREAD = (0.75, 1.25)  # so that many clients do not come back at once


@dataclass(slots=True)
class Retries:
    """Retries of one channel's calls: only what failed with UNAVAILABLE, and only once a service has answered on it.

    And once more what was UNAUTHENTICATED: a stream keeps the token that it was opened with, which may be another now.
    Where the service says when to try again, tries go on at its pace for as long as there is time.

    Attributes:
        pauses_s: before each other retry, give or take a quarter; 0 retries at once.
        reached: a service has answered before. Until then an address that nobody listens at is an error at once.
        why: what is wrong with the connection itself, found within so many seconds; None: nothing that can be said.

    """

    pauses_s: tuple[float, ...] = PAUSES_S
    reached: bool = False
    why: Callable[[float], str | None] = lambda _: None

    def run(self, call: Callable[[float], Response], timeout_s: float) -> Response:
        """call(seconds that are left), again while it may succeed; raises what its last try raised."""
        left_s, give_up_s = timeout_s, time.monotonic() + timeout_s
        pauses, before = iter(self.pauses_s), None
        may_renew = self.reached
        while True:
            try:
                return self._reaching(call, left_s)
            except ServiceRefused as error:
                left_s = give_up_s - time.monotonic()
                if (
                    error.code is not grpc.StatusCode.UNAUTHENTICATED
                    or not may_renew
                    or left_s <= 0
                ):
                    raise
                may_renew = False
                continue
            except ServiceUnavailable as error:
                if before is not None and error.cause == "deadline":
                    raise before from error  # says why there was no answer
                before, pause_s = error, error.retry_after_s
                if pause_s is None:
                    pause_s = next(pauses, None)
                if pause_s is None or not (self.reached and error.passing):
                    raise self.explained(error, give_up_s - time.monotonic()) from None
                pause_s *= random.uniform(*_SPREAD)
                left_s = give_up_s - time.monotonic() - pause_s
                if left_s <= 0:
                    raise
            time.sleep(pause_s)

    def explained(self, error: ServiceUnavailable, left_s: float) -> ServiceUnavailable:
        """The error, or, before anybody was reached, one that says what is wrong with the connection."""
        if self.reached or error.reason or error.code is not grpc.StatusCode.UNAVAILABLE:
            return error
        why = self.why(min(left_s, WHY_S)) if left_s > 0 else None
        return (
            error if why is None else ConnectionMismatch(why, code=error.code, target=error.target)
        )

    def _reaching(self, call: Callable[[float], Response], left_s: float) -> Response:
        try:
            reply = call(left_s)
        except ServiceUnavailable as error:
            self.reached |= bool(error.reason)
            raise
        except ServiceError:  # a refusal is an answer too
            self.reached = True
            raise
        self.reached = True
        return reply


def unary(
    method: Callable[..., Response], request: object, timeout_s: float | None, target: str
) -> Response:
    """The reply to one request. Raises ServiceError."""
    try:
        return method(request, timeout=timeout_s)
    except grpc.RpcError as error:
        failed = service_error(error, target, timeout_s)
        if timeout_s is not None and failed.cause == "deadline" and not failed.reason:
            raise no_answer(timeout_s, target) from error  # gRPC's own words name no time
        raise failed from error


def replies(call: Any, timeout_s: float | None, target: str) -> Generator[Any, None, None]:
    """The replies of a started streaming call, each within timeout_s: gRPC's own deadline would bound them all.

    Reads no further than it is asked, so that what is not needed yet waits at the service. Raises ServiceError.
    """
    try:
        while (reply := next_reply(call, timeout_s, target)) is not None:
            yield reply
    finally:
        call.cancel()


def next_reply(call: Any, timeout_s: float | None, target: str) -> Any:
    """The next reply of a started streaming call, None after the last. Raises ServiceError."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        call.cancel()

    clock = threading.Timer(timeout_s, expire) if timeout_s is not None else None
    if clock is not None:
        clock.start()
    try:
        return next(call, None)
    except grpc.RpcError as error:
        if expired.is_set():
            raise no_answer(timeout_s, target) from error
        raise service_error(error, target, timeout_s) from error
    finally:
        if clock is not None:
            clock.cancel()


def no_answer(timeout_s: float | None, target: str) -> ServiceUnavailable:
    """What a wait ends with that took too long."""
    return ServiceUnavailable(
        f"no answer within {timeout_s:.3g} s",
        code=grpc.StatusCode.DEADLINE_EXCEEDED,
        target=target,
        timeout_s=timeout_s,
    )


class Stream(Protocol[Request_contra, Response_co]):
    """Requests out, responses in, in order: DuplexStream, or a DirectStream."""

    @property
    def ended(self) -> bool:
        """No response will come any more: the service ended it, its connection broke, or it was closed."""
        ...

    def send(self, request: Request_contra) -> None:
        """Queues a request; never blocks."""
        ...

    def receive(self, timeout_s: float) -> Response_co:
        """The next response. Raises ServiceError, also when `timeout_s` passes."""
        ...

    def close(self) -> None:
        """Ends the stream. Closing twice is allowed."""
        ...


class DuplexStream(Generic[Request, Response]):
    """Requests out, responses in, in order, with a timeout on every wait. After an error it is closed: open another.

    For one thread at a time; close() may come from any.

    Args:
        method: the stub's stream-stream method.
        target: the service's address, for messages.

    Attributes:
        ended: no response will come any more: the service ended it, its connection broke, or it was closed.

    """

    def __init__(self, method: Callable[[Iterator[Request]], Any], target: str) -> None:
        self.ended = self._closed = False
        self._target = target
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        # Unbounded, yet never longer than the requests that the caller has sent ahead.
        self._responses: queue.SimpleQueue[Response | ServiceError] = queue.SimpleQueue()
        self._call = method(iter(self._requests.get, None))
        threading.Thread(target=self._read, name="duplex-stream", daemon=True).start()

    def send(self, request: Request) -> None:
        """Queues a request; never blocks."""
        self._requests.put(request)

    def receive(self, timeout_s: float) -> Response:
        """The next response. Raises ServiceError, also when `timeout_s` passes."""
        try:
            response = self._responses.get(timeout=timeout_s)
        except queue.Empty:
            self.close()
            raise no_answer(timeout_s, self._target) from None
        if isinstance(response, ServiceError):
            self.close()
            raise response
        return response

    def close(self) -> None:
        """Ends the stream. Closing twice is allowed."""
        self._closed = True
        self._requests.put(None)
        self._call.cancel()

    def _was_ended(self) -> ServiceUnavailable:
        return ServiceUnavailable(
            "it ended the stream", code=grpc.StatusCode.UNAVAILABLE, target=self._target
        )

    def _read(self) -> None:
        try:
            for response in self._call:
                self._responses.put(response)
            error: ServiceError = self._was_ended()
        except grpc.RpcError as failed:
            error = service_error(failed, self._target)
            # A service that is short of threads cancels streams that wait: another one may be opened.
            if error.code is grpc.StatusCode.CANCELLED and not (error.reason or self._closed):
                error = self._was_ended()
        self.ended = True
        self._responses.put(error)


# Streams kept open for the next lookups: each takes a thread of the service for as long as it is open.
IDLE_STREAMS = 16
# A burst's streams are closed when so much later there has been no use for them.
IDLE_STREAM_S = 10.0


class StreamPool(Generic[Request, Response]):
    """Streams of one connection, as many as there are calls at the same time; each is one call's until it is answered.

    A stream whose call failed is closed, never used again: what is still on its way would answer another call.

    Args:
        open_stream: makes another.

    """

    def __init__(self, open_stream: Callable[[], Stream[Request, Response]]) -> None:
        self._open_stream = open_stream
        self._lock = threading.Lock()
        # (time.monotonic() of its last use, stream), the last used at the end.
        self._idle: deque[tuple[float, Stream[Request, Response]]] = deque()
        self._taken: set[Stream[Request, Response]] = set()
        self._closed = False

    @contextmanager
    def stream(self) -> Iterator[Stream[Request, Response]]:
        """A stream for one call. Raises ClientClosed."""
        stream = self._take()
        try:
            yield stream
        except BaseException:  # Ctrl-C too
            with self._lock:
                self._taken.discard(stream)
            stream.close()
            raise
        self._give_back(stream)

    def close_idle(self) -> None:
        """After a connection broke: its other streams are of no use either."""
        with self._lock:
            idle = [stream for _, stream in self._idle]
            self._idle.clear()
        _close_all(idle)

    def close(self) -> None:
        """Ends all streams, also those of calls that are waiting. Closing twice is allowed."""
        with self._lock:
            self._closed = True
            streams = [*self._taken, *(stream for _, stream in self._idle)]
            self._idle.clear()
        _close_all(streams)

    def _take(self) -> Stream[Request, Response]:
        ended = []
        with self._lock:
            while self._idle and self._idle[-1][1].ended:
                ended.append(self._idle.pop()[1])
            found = self._idle.pop()[1] if self._idle else None
            if found is not None:
                self._taken.add(found)
        _close_all(ended)
        return self._opened() if found is None else found

    def _opened(self) -> Stream[Request, Response]:
        stream = self._open_stream()
        with self._lock:
            closed = self._closed
            if not closed:
                self._taken.add(stream)
        if closed:
            stream.close()
            raise ClientClosed("this client was closed")
        return stream

    def _give_back(self, stream: Stream[Request, Response]) -> None:
        now_s = time.monotonic()
        too_many = []
        with self._lock:
            self._taken.discard(stream)
            if self._closed:
                too_many.append(stream)
            else:
                self._idle.append((now_s, stream))
            while self._idle and (
                len(self._idle) > IDLE_STREAMS or now_s - self._idle[0][0] > IDLE_STREAM_S
            ):
                too_many.append(self._idle.popleft()[1])
        _close_all(too_many)


def _close_all(streams: Iterable[Stream[Any, Any]]) -> None:
    for stream in streams:
        stream.close()

"""What every call goes through: a permit or RESOURCE_EXHAUSTED, errors to statuses, a log line for defects.

Bytes that are no message of the method's type are refused here too: gRPC itself answers them with INTERNAL.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from router_service.errors import InvalidField, Overloaded, RoutingServiceError, ShuttingDown
from router_service.rpc.status import internal_status, status_of

log = logging.getLogger(__name__)

_UNGUARDED = "/grpc.health.v1.Health/"


class Permits:
    """Counts the calls in flight; refuses rather than queues."""

    def __init__(self, most: int) -> None:
        self._most, self._in_flight = most, 0
        self._closed = False
        self._lock = threading.Lock()

    @property
    def in_flight(self) -> int:
        """Calls that run now."""
        return self._in_flight

    def close(self) -> None:
        """Refuses new calls; those in flight go on."""
        self._closed = True

    @contextmanager
    def one(self) -> Iterator[None]:
        """Raises Overloaded when all are taken and ShuttingDown after close()."""
        with self._lock:
            if self._closed:
                raise ShuttingDown("the service is shutting down; retry on another or later")
            if self._in_flight >= self._most:
                raise Overloaded(f"{self._most} calls in flight (--max-in-flight); retry later")
            self._in_flight += 1
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that could not be decoded, in the place of a request."""

    size: int


class Guard(grpc.ServerInterceptor):
    """Wraps every handler but the health service's."""

    def __init__(self, permits: Permits) -> None:
        self._permits = permits

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Returns the handler with its behaviour guarded."""
        handler = continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_UNGUARDED):
            return handler
        if handler.response_streaming:
            return self._streaming(handler, method)
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler.unary_unary, method),
            _tolerant(handler.request_deserializer),
            handler.response_serializer,
        )

    def _unary(self, behaviour: Any, method: str) -> Any:
        def call(request: Any, context: grpc.ServicerContext) -> Any:
            with _errors_to_status(context, method), self._permits.one():
                return behaviour(_well_formed(request), context)

        return call

    def _streaming(self, handler: Any, method: str) -> Any:
        behaviour = handler.stream_stream or handler.unary_stream
        check = _each_well_formed if handler.request_streaming else _well_formed

        def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with _errors_to_status(context, method), self._permits.one():
                yield from behaviour(check(request), context)

        make: Any = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
        return make(call, _tolerant(handler.request_deserializer), handler.response_serializer)


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return Malformed(len(data))

    return decode


def _well_formed(request: Any) -> Any:
    if isinstance(request, Malformed):
        raise InvalidField("request", f"{request.size} bytes", "a message of the method's type")
    return request


def _each_well_formed(requests: Iterator[Any]) -> Iterator[Any]:
    return map(_well_formed, requests)


@contextmanager
def _errors_to_status(context: Any, method: str) -> Iterator[None]:  # stubs lack context.code()
    try:
        yield
    except RoutingServiceError as error:
        context.abort_with_status(status_of(error))
    except Exception as error:
        # Aborted already, or the client left.
        if context.code() is not None or not context.is_active():
            raise
        log.exception("%s failed", method)
        context.abort_with_status(
            internal_status(f"{method} failed: {type(error).__name__}; see the service's log")
        )

"""What stands before every handler: a permit, requests that can be read, and the one table from errors to statuses."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from knnmoe.channels import ERROR_DOMAIN
from knnmoe.v1 import errors_pb2 as reasons

from router_service import errors
from router_service.errors import InvalidField, Overloaded, RoutingServiceError, ShuttingDown

log = logging.getLogger(__name__)

_UNGUARDED = "/grpc.health.v1.Health/"

_TABLE: dict[type[RoutingServiceError], tuple[int, int]] = {
    errors.InvalidField: (code_pb2.INVALID_ARGUMENT, reasons.ERROR_REASON_INVALID_FIELD),
    errors.InvalidTensor: (code_pb2.INVALID_ARGUMENT, reasons.ERROR_REASON_INVALID_TENSOR),
    errors.WidthMismatch: (code_pb2.FAILED_PRECONDITION, reasons.ERROR_REASON_MODEL_MISMATCH),
    errors.NotFinite: (code_pb2.INVALID_ARGUMENT, reasons.ERROR_REASON_NOT_FINITE),
    errors.MemoryNotFound: (code_pb2.NOT_FOUND, reasons.ERROR_REASON_MEMORY_NOT_FOUND),
    errors.MemoryExists: (code_pb2.ALREADY_EXISTS, reasons.ERROR_REASON_MEMORY_EXISTS),
    errors.LayerNotFound: (code_pb2.FAILED_PRECONDITION, reasons.ERROR_REASON_LAYER_NOT_FOUND),
    errors.ModelMismatch: (code_pb2.FAILED_PRECONDITION, reasons.ERROR_REASON_MODEL_MISMATCH),
    errors.KindMismatch: (code_pb2.FAILED_PRECONDITION, reasons.ERROR_REASON_KIND_MISMATCH),
    errors.Overloaded: (code_pb2.RESOURCE_EXHAUSTED, reasons.ERROR_REASON_OVERLOADED),
    errors.DeadlineTooShort: (code_pb2.DEADLINE_EXCEEDED, reasons.ERROR_REASON_DEADLINE),
    errors.DiskFull: (code_pb2.RESOURCE_EXHAUSTED, reasons.ERROR_REASON_DISK_FULL),
    errors.Busy: (code_pb2.UNAVAILABLE, reasons.ERROR_REASON_BUSY),
    errors.Cancelled: (code_pb2.CANCELLED, reasons.ERROR_REASON_CANCELLED),
    errors.OperationNotFound: (code_pb2.NOT_FOUND, reasons.ERROR_REASON_OPERATION_NOT_FOUND),
    errors.SnapshotNotFound: (code_pb2.NOT_FOUND, reasons.ERROR_REASON_SNAPSHOT_NOT_FOUND),
    errors.ShuttingDown: (code_pb2.UNAVAILABLE, reasons.ERROR_REASON_SHUTTING_DOWN),
    errors.CollectionClosed: (code_pb2.UNAVAILABLE, reasons.ERROR_REASON_BUSY),
    errors.BackendUnavailable: (code_pb2.UNAVAILABLE, reasons.ERROR_REASON_BACKEND_UNAVAILABLE),
    errors.BackendMisconfigured: (
        code_pb2.FAILED_PRECONDITION,
        reasons.ERROR_REASON_BACKEND_MISCONFIGURED,
    ),
    errors.CorruptMemory: (code_pb2.DATA_LOSS, reasons.ERROR_REASON_CORRUPT),
    errors.ForeignCollection: (code_pb2.DATA_LOSS, reasons.ERROR_REASON_CORRUPT),
    errors.SnapshotInvalid: (code_pb2.DATA_LOSS, reasons.ERROR_REASON_SNAPSHOT_INVALID),
    errors.DirectoryInUse: (code_pb2.FAILED_PRECONDITION, reasons.ERROR_REASON_STORAGE),
    errors.StorageError: (code_pb2.INTERNAL, reasons.ERROR_REASON_STORAGE),
}


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
    """Bytes that could not be decoded, where a request should be."""

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
        check = partial(map, _well_formed) if handler.request_streaming else _well_formed

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


def status_of(error: RoutingServiceError) -> grpc.Status:
    """The status of an error, with an ErrorInfo and, for a caller's mistake, the field violation."""
    code, reason = _TABLE[next(base for base in type(error).__mro__ if base in _TABLE)]
    if not isinstance(error, errors.InvalidRequest):
        return _status(code, str(error), reason, {})
    found = {"field": error.field, "value": error.value, "expected": error.expected}
    violation = error_details_pb2.BadRequest.FieldViolation(
        field=error.field, description=f"got {error.value}, expected {error.expected}"
    )
    request = error_details_pb2.BadRequest(field_violations=[violation])
    return _status(code, str(error), reason, found, request)


def internal_status(message: str) -> grpc.Status:
    """The status of a defect of the service."""
    return _status(code_pb2.INTERNAL, message, reasons.ERROR_REASON_INTERNAL, {})


def _status(
    code: int, message: str, reason: int, metadata: dict[str, str], *more: Message
) -> grpc.Status:
    info = error_details_pb2.ErrorInfo(
        reason=reasons.ErrorReason.Name(reason), domain=ERROR_DOMAIN, metadata=metadata
    )
    status = status_pb2.Status(code=code, message=message)
    for detail in (info, *more):
        status.details.add().Pack(detail)
    return rpc_status.to_status(status)

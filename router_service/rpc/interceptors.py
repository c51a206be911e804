"""What stands before every handler: threads and permits of its plane, requests that can be read, errors to statuses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from knnmoe.errors import ERROR_DOMAIN
from knnmoe.v1 import errors_pb2 as reasons
from typing_extensions import override

from router_service import errors
from router_service.backends.disk import exhaustion
from router_service.errors import InvalidField, RoutingServiceError
from router_service.rpc.authority import Authority
from router_service.rpc.planes import Plane, Refusals, Turns
from router_service.telemetry.logs import calling

log = logging.getLogger(__name__)

T = TypeVar("T")

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
    errors.OutOfDescriptors: (code_pb2.RESOURCE_EXHAUSTED, reasons.ERROR_REASON_STORAGE),
    errors.Busy: (code_pb2.UNAVAILABLE, reasons.ERROR_REASON_BUSY),
    errors.Cancelled: (code_pb2.CANCELLED, reasons.ERROR_REASON_CANCELLED),
    errors.OperationNotFound: (code_pb2.NOT_FOUND, reasons.ERROR_REASON_OPERATION_NOT_FOUND),
    errors.SnapshotNotFound: (code_pb2.NOT_FOUND, reasons.ERROR_REASON_SNAPSHOT_NOT_FOUND),
    errors.ReplicaBehind: (code_pb2.OUT_OF_RANGE, reasons.ERROR_REASON_REPLICA_BEHIND),
    errors.Unauthenticated: (code_pb2.UNAUTHENTICATED, reasons.ERROR_REASON_UNAUTHENTICATED),
    errors.PermissionDenied: (code_pb2.PERMISSION_DENIED, reasons.ERROR_REASON_PERMISSION_DENIED),
    errors.ShuttingDown: (code_pb2.UNAVAILABLE, reasons.ERROR_REASON_SHUTTING_DOWN),
    errors.CollectionClosed: (code_pb2.UNAVAILABLE, reasons.ERROR_REASON_BUSY),
    errors.CollectionExists: (code_pb2.UNAVAILABLE, reasons.ERROR_REASON_BUSY),
    errors.EngineStopped: (code_pb2.UNAVAILABLE, reasons.ERROR_REASON_BACKEND_UNAVAILABLE),
    errors.BackendUnavailable: (code_pb2.UNAVAILABLE, reasons.ERROR_REASON_BACKEND_UNAVAILABLE),
    errors.BackendMisconfigured: (
        code_pb2.FAILED_PRECONDITION,
        reasons.ERROR_REASON_BACKEND_MISCONFIGURED,
    ),
    errors.CorruptMemory: (code_pb2.DATA_LOSS, reasons.ERROR_REASON_CORRUPT),
    errors.NewerFormat: (code_pb2.FAILED_PRECONDITION, reasons.ERROR_REASON_NEWER_FORMAT),
    errors.ForeignCollection: (code_pb2.DATA_LOSS, reasons.ERROR_REASON_CORRUPT),
    errors.KeysNotFound: (code_pb2.DATA_LOSS, reasons.ERROR_REASON_CORRUPT),
    errors.SnapshotInvalid: (code_pb2.DATA_LOSS, reasons.ERROR_REASON_SNAPSHOT_INVALID),
    errors.NewerSnapshot: (code_pb2.FAILED_PRECONDITION, reasons.ERROR_REASON_NEWER_FORMAT),
    errors.DirectoryInUse: (code_pb2.FAILED_PRECONDITION, reasons.ERROR_REASON_STORAGE),
    errors.StorageError: (code_pb2.INTERNAL, reasons.ERROR_REASON_STORAGE),
}


_REASON_PREFIX, _INTERNAL = "ERROR_REASON_", "internal"


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that could not be decoded, where a request should be."""

    size: int


class _AtOnce(ThreadPoolExecutor):
    """Runs what it is given in the thread that gives it: gRPC's own, which must not wait."""

    @override
    def submit(self, call: Callable[..., T], /, *args: Any, **keywords: Any) -> Future[T]:
        done: Future[T] = Future()
        done.set_result(call(*args, **keywords))
        return done


_AT_ONCE = _AtOnce(1)


class Guard(grpc.ServerInterceptor):
    """Wraps every handler. Asked by gRPC's own thread, before a call gets one of its plane."""

    def __init__(self, plane_of: Callable[[str], Plane], authority: Authority) -> None:
        """`plane_of` a method, e.g. `/knnmoe.v1.RoutingService/Route`."""
        self._plane_of, self._authority = plane_of, authority
        self._guarded: dict[str, Any] = {}

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Returns the handler with its behaviour guarded, or one that refuses the call."""
        method = handler_call_details.method
        guarded = self._guarded.get(method)
        if guarded is None:
            handler = continuation(handler_call_details)
            if handler is None:
                return handler
            guarded = _guarded(handler, method, self._plane_of(method), self._authority)
            self._guarded[method] = guarded
        plane = self._plane_of(method)
        if plane.permits.refuses and not guarded.response_streaming:
            refusal = plane.permits.refusal()
            plane.refused.add(method, _reason_of(refusal))
            return _refusing(refusal)
        return guarded


def _guarded(handler: Any, method: str, plane: Plane, authority: Authority) -> Any:
    """The handler of a stream of messages, which a call with one message is on the wire.

    For that one gRPC would wait before it calls the behaviour: in a thread of the plane, and without end.
    """
    if handler.response_streaming:
        make: Any = grpc.stream_stream_rpc_method_handler
        call = _streaming(handler, method, plane, authority)
    else:
        make, call = (
            grpc.stream_unary_rpc_method_handler,
            _unary(handler, method, plane, authority),
        )
    call.experimental_thread_pool = plane.threads
    return make(call, _tolerant(handler.request_deserializer), handler.response_serializer)


def _refusing(error: RoutingServiceError) -> Any:
    """The handler that ends a call with one answer before its message is there, and takes no thread to do so."""

    def call(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        context.abort_with_status(status_of(error))

    call.experimental_thread_pool = _AT_ONCE  # type: ignore[attr-defined]
    return grpc.stream_unary_rpc_method_handler(call)


def _unary(handler: Any, method: str, plane: Plane, authority: Authority) -> Any:
    def call(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        begun = authority.begun(method, context)
        with errors_to_status(context, method, plane.refused), begun:
            begun.goes_on()
            request = plane.first(map(begun.require, map(_well_formed, requests)), context)
            with plane.working(request, context):
                return handler.unary_unary(request, context)

    return call


def _streaming(handler: Any, method: str, plane: Plane, authority: Authority) -> Any:
    def answers(requests: Iterator[Any], context: grpc.ServicerContext, turns: Turns) -> Any:
        if handler.request_streaming:
            return handler.stream_stream(turns.messages(requests), context)
        return handler.unary_stream(turns.only_message(requests), context)

    def call(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        begun = authority.begun(method, context)
        with (
            errors_to_status(context, method, plane.refused),
            begun,
            Turns(plane, context) as turns,
        ):
            begun.goes_on()
            allowed = map(begun.require, map(_well_formed, requests))
            for answer in answers(allowed, context, turns):
                begun.goes_on()
                turns.wait(plane.room.going_on(context))
                yield answer
                if not handler.request_streaming:
                    turns.go_on()

    return call


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
def errors_to_status(  # stubs lack context.code()
    context: Any, method: str, refused: Refusals
) -> Iterator[None]:
    """What a handler raises ends its call with a status, and is counted; what the service did not foresee is logged."""
    with calling(method, context):
        try:
            with exhaustion(f"answer {method}"):
                yield
        except RoutingServiceError as error:
            log.debug("%s was refused: %s", method, error)
            refused.add(method, _reason_of(error))
            context.abort_with_status(status_of(error))
        except Exception as error:
            # Aborted already, or the client left.
            if context.code() is not None or not context.is_active():
                raise
            log.exception("%s failed", method)
            refused.add(method, _INTERNAL)
            context.abort_with_status(
                internal_status(f"{method} failed: {type(error).__name__}; see the service's log")
            )


def status_of(error: RoutingServiceError) -> grpc.Status:
    """The status of an error, with an ErrorInfo and, where it fits, the field violation or when to try again."""
    code, reason = _entry_of(error)
    if not isinstance(error, errors.InvalidRequest):
        return _status(code, str(error), reason, {}, *_retry_info(error))
    found = {"field": error.field, "value": error.value, "expected": error.expected}
    violation = error_details_pb2.BadRequest.FieldViolation(
        field=error.field, description=f"got {error.value}, expected {error.expected}"
    )
    request = error_details_pb2.BadRequest(field_violations=[violation])
    return _status(code, str(error), reason, found, request)


def _entry_of(error: RoutingServiceError) -> tuple[int, int]:
    return _TABLE[next(base for base in type(error).__mro__ if base in _TABLE)]


def _reason_of(error: RoutingServiceError) -> str:
    """`overloaded` of ERROR_REASON_OVERLOADED."""
    name: str = reasons.ErrorReason.Name(_entry_of(error)[1])
    return name.removeprefix(_REASON_PREFIX).lower()


def _retry_info(error: RoutingServiceError) -> list[Message]:
    if error.retry_after_s is None:
        return []
    after = error_details_pb2.RetryInfo()
    after.retry_delay.FromMilliseconds(round(error.retry_after_s * 1000))
    return [after]


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

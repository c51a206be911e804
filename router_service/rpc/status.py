"""The one table from the service's errors to gRPC statuses."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from knnmoe.channels import ERROR_DOMAIN
from knnmoe.v1 import errors_pb2 as reasons

from router_service import errors

_TABLE: dict[type[errors.RoutingServiceError], tuple[int, int]] = {
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
    errors.BackendUnavailable: (
        code_pb2.UNAVAILABLE,
        reasons.ERROR_REASON_BACKEND_UNAVAILABLE,
    ),
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


def status_of(error: errors.RoutingServiceError) -> grpc.Status:
    """The status of an error, with an ErrorInfo and, for a caller's mistake, the field violation."""
    code, reason = _TABLE[_listed_class(type(error))]
    return rpc_status.to_status(
        status_pb2.Status(code=code, message=str(error), details=_details(error, reason))
    )


def internal_status(message: str) -> grpc.Status:
    """The status of a defect of the service."""
    info = error_details_pb2.ErrorInfo(
        reason=reasons.ErrorReason.Name(reasons.ERROR_REASON_INTERNAL), domain=ERROR_DOMAIN
    )
    return rpc_status.to_status(
        status_pb2.Status(code=code_pb2.INTERNAL, message=message, details=[_packed(info)])
    )


def _listed_class(error: type[errors.RoutingServiceError]) -> type[errors.RoutingServiceError]:
    return next(base for base in error.__mro__ if base in _TABLE)


def _details(error: errors.RoutingServiceError, reason: int) -> list[any_pb2.Any]:
    info = error_details_pb2.ErrorInfo(reason=reasons.ErrorReason.Name(reason), domain=ERROR_DOMAIN)
    details = [_packed(info)]
    if isinstance(error, errors.InvalidRequest):
        info.metadata.update(
            {"field": error.field, "value": error.value, "expected": error.expected}
        )
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=f"got {error.value}, expected {error.expected}"
        )
        details = [
            _packed(info),
            _packed(error_details_pb2.BadRequest(field_violations=[violation])),
        ]
    return details


def _packed(message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed

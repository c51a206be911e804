"""What a call to the service can end with: one tree, and one table from statuses and reasons to it.

    ServiceError                 code, reason, message, target, metadata, violations
      +-- ServiceUnavailable     no answer in time, or none to be had now: another try, or none at all, is the remedy
      |     +-- ConnectionMismatch   it is there, and speaks TLS where this client does not, or trusts another authority
      +-- ServiceRefused         the service understood the call and refused it
            +-- ModelMismatch    the memory is another model's
            +-- KindMismatch     the memory holds another kind of values
            +-- MemoryNotFound   there is no memory of that name
            +-- ReplicaBehind    a copy's position is not known any more
      +-- BadCredentials         a file with a certificate, a key or a token cannot be used, or not for this address
      +-- ClientClosed           the call was made through a client that is closed, or another process's

Clients branch on the class, or on `reason`; never on a message. gRPC's own exceptions never leave knnmoe.client.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from typing_extensions import override

from knnmoe.v1 import errors_pb2 as reasons

# In what a status carries, both ends agree on it: whose reason it is.
ERROR_DOMAIN = "knnmoe.dev"


class ServiceError(Exception):
    """Base of the tree above.

    Attributes:
        message: the service's own words, human-readable.
        code: the gRPC status.
        reason: name of an ErrorReason, e.g. `ERROR_REASON_BUSY`; "" when the error is not the service's own.
        target: the address that was called; "" when none was.
        metadata: of a bad request the field, its value and what was expected.
        violations: field -> description.
        timeout_s: how long the caller waited, when that is why it ended.
        retry_after_s: when the same call may succeed, in seconds, where the service says so.

    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        target: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.code, self.reason, self.target = message, code, reason, target
        self.metadata, self.violations = dict(metadata or {}), dict(violations or {})
        self.timeout_s, self.retry_after_s = timeout_s, retry_after_s

    @property
    def cause(self) -> str:
        """A word to count by: `deadline`, `unavailable`, `overloaded`, `shutting_down`, ..."""
        if self.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return "deadline"
        return (self.reason.removeprefix("ERROR_REASON_") or self.code.name).lower()


class ServiceUnavailable(ServiceError):
    """The service did not answer in time, cannot be reached, or cannot do it now."""

    @property
    def passing(self) -> bool:
        """Whether the same call may succeed in a moment."""
        return self.code is grpc.StatusCode.UNAVAILABLE or self.retry_after_s is not None

    @override
    def __str__(self) -> str:
        if not self.target:
            return self.message
        return f"sidecar at {self.target}: {self.code.name}: {self.message}"


class ConnectionMismatch(ServiceUnavailable):
    """The service is there, and one side speaks TLS, or wants or trusts a certificate, where the other does not."""

    @override
    def __str__(self) -> str:
        return f"sidecar at {self.target}: {self.message}"


class ServiceRefused(ServiceError):
    """The service understood the call and refused it."""

    @override
    def __str__(self) -> str:
        return f"{self.message} ({self.reason or self.code.name})"


class ModelMismatch(ServiceRefused):
    """The memory was made for another model; the message names the fields that differ, on both sides."""

    @override
    def __str__(self) -> str:
        return self.message


class KindMismatch(ServiceRefused):
    """The memory holds values of another kind (assignments, logit deltas, logits) than are meant."""

    @override
    def __str__(self) -> str:
        return self.message


class MemoryNotFound(ServiceRefused):
    """The service holds no memory of that name."""


class ReplicaBehind(ServiceRefused):
    """A copy cannot go on from where it is: ask again with what it holds."""


class BadCredentials(ServiceError, ValueError):
    """A certificate, key or token of the client's cannot be used, or would be seen by others."""


class ClientClosed(ServiceError):
    """The client was closed, before the call or during it; or it was made before this process was forked."""


# Every reason that the contract knows.
BY_REASON: dict[int, type[ServiceError]] = {
    reasons.ERROR_REASON_INVALID_FIELD: ServiceRefused,
    reasons.ERROR_REASON_INVALID_TENSOR: ServiceRefused,
    reasons.ERROR_REASON_NOT_FINITE: ServiceRefused,
    reasons.ERROR_REASON_MEMORY_NOT_FOUND: MemoryNotFound,
    reasons.ERROR_REASON_MEMORY_EXISTS: ServiceRefused,
    reasons.ERROR_REASON_LAYER_NOT_FOUND: ServiceRefused,
    reasons.ERROR_REASON_MODEL_MISMATCH: ModelMismatch,
    reasons.ERROR_REASON_KIND_MISMATCH: KindMismatch,
    reasons.ERROR_REASON_OVERLOADED: ServiceUnavailable,
    reasons.ERROR_REASON_DEADLINE: ServiceUnavailable,
    reasons.ERROR_REASON_DISK_FULL: ServiceUnavailable,
    reasons.ERROR_REASON_BUSY: ServiceUnavailable,
    reasons.ERROR_REASON_STORAGE: ServiceUnavailable,
    reasons.ERROR_REASON_CORRUPT: ServiceRefused,
    reasons.ERROR_REASON_SHUTTING_DOWN: ServiceUnavailable,
    reasons.ERROR_REASON_INTERNAL: ServiceUnavailable,
    reasons.ERROR_REASON_CANCELLED: ServiceRefused,
    reasons.ERROR_REASON_OPERATION_NOT_FOUND: ServiceRefused,
    reasons.ERROR_REASON_SNAPSHOT_INVALID: ServiceRefused,
    reasons.ERROR_REASON_SNAPSHOT_NOT_FOUND: ServiceRefused,
    reasons.ERROR_REASON_BACKEND_UNAVAILABLE: ServiceUnavailable,
    reasons.ERROR_REASON_BACKEND_MISCONFIGURED: ServiceUnavailable,
    reasons.ERROR_REASON_REPLICA_BEHIND: ReplicaBehind,
    reasons.ERROR_REASON_NEWER_FORMAT: ServiceRefused,
    reasons.ERROR_REASON_UNAUTHENTICATED: ServiceRefused,
    reasons.ERROR_REASON_PERMISSION_DENIED: ServiceRefused,
}
# Every status that comes without a reason: from gRPC itself, a proxy, or a program that is not the service.
BY_CODE: dict[grpc.StatusCode, type[ServiceError]] = {
    grpc.StatusCode.OK: ServiceUnavailable,  # a stream that ended where an answer was due
    grpc.StatusCode.CANCELLED: ServiceUnavailable,
    grpc.StatusCode.UNKNOWN: ServiceUnavailable,
    grpc.StatusCode.INVALID_ARGUMENT: ServiceRefused,
    grpc.StatusCode.DEADLINE_EXCEEDED: ServiceUnavailable,
    grpc.StatusCode.NOT_FOUND: ServiceUnavailable,
    grpc.StatusCode.ALREADY_EXISTS: ServiceUnavailable,
    grpc.StatusCode.PERMISSION_DENIED: ServiceUnavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ServiceUnavailable,
    grpc.StatusCode.FAILED_PRECONDITION: ServiceUnavailable,
    grpc.StatusCode.ABORTED: ServiceUnavailable,
    grpc.StatusCode.OUT_OF_RANGE: ServiceUnavailable,
    grpc.StatusCode.UNIMPLEMENTED: ServiceRefused,
    grpc.StatusCode.INTERNAL: ServiceUnavailable,
    grpc.StatusCode.UNAVAILABLE: ServiceUnavailable,
    grpc.StatusCode.DATA_LOSS: ServiceUnavailable,
    grpc.StatusCode.UNAUTHENTICATED: ServiceRefused,
}


def service_error(failed: Any, target: str = "", timeout_s: float | None = None) -> ServiceError:
    """The ServiceError of a failed call (a grpc.RpcError, which is also a grpc.Call)."""
    reason, metadata, violations, retry_after_s = "", {}, {}, None
    for key, value in failed.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        for detail in status_pb2.Status.FromString(value).details:
            info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
            again = error_details_pb2.RetryInfo()
            if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
                reason, metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(bad):
                violations = {v.field: v.description for v in bad.field_violations}
            elif detail.Unpack(again):
                retry_after_s = again.retry_delay.ToMilliseconds() / 1000
    return _class_of(failed.code(), reason)(
        failed.details() or "",
        code=failed.code(),
        reason=reason,
        target=target,
        metadata=metadata,
        violations=violations,
        timeout_s=timeout_s,
        retry_after_s=retry_after_s,
    )


def _class_of(code: grpc.StatusCode, reason: str) -> type[ServiceError]:
    known = reasons.ErrorReason.DESCRIPTOR.values_by_name.get(
        reason
    )  # a newer service may have others
    return BY_CODE[code] if known is None else BY_REASON[known.number]

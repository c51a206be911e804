"""What a failed call to a sidecar means to the runner."""

from __future__ import annotations

import grpc
from knnmoe.channels import service_error
from knnmoe.v1 import errors_pb2 as reasons

from model_runner.errors import ModelMismatch, RoutingRefused, RoutingUnavailable, RunnerError

# The sidecar's trouble, not the caller's mistake: another try, or none at all, is the remedy.
_PASSING = frozenset(
    reasons.ErrorReason.Name(reason)
    for reason in (
        reasons.ERROR_REASON_OVERLOADED,
        reasons.ERROR_REASON_DEADLINE,
        reasons.ERROR_REASON_BUSY,
        reasons.ERROR_REASON_STORAGE,
        reasons.ERROR_REASON_DISK_FULL,
        reasons.ERROR_REASON_SHUTTING_DOWN,
        reasons.ERROR_REASON_INTERNAL,
        reasons.ERROR_REASON_BACKEND_UNAVAILABLE,
        reasons.ERROR_REASON_BACKEND_MISCONFIGURED,
    )
)
_TRANSPORT_REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.UNAUTHENTICATED,
    }
)
_MISMATCH = reasons.ErrorReason.Name(reasons.ERROR_REASON_MODEL_MISMATCH)
# RoutingUnavailable.reason of every call that took too long.
DEADLINE = "deadline"
MEMORY_NOT_FOUND = reasons.ErrorReason.Name(reasons.ERROR_REASON_MEMORY_NOT_FOUND)


def runner_error(failed: grpc.RpcError, target: str) -> RunnerError:
    """Unavailable, refused, or the wrong model."""
    error = service_error(failed)
    if error.reason == _MISMATCH:
        return ModelMismatch(error.message)
    if error.reason in _PASSING or (not error.reason and error.code not in _TRANSPORT_REFUSALS):
        reason = error.reason.removeprefix("ERROR_REASON_") or error.code.name
        if error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            reason = DEADLINE
        return RoutingUnavailable(
            f"sidecar at {target}: {error.code.name}: {error.message}",
            reason.lower(),
            passing=error.code is grpc.StatusCode.UNAVAILABLE,
        )
    return RoutingRefused(error.reason or error.code.name, error.message)

"""What `router-admin` ends with: one line on stderr and a documented exit code."""

from __future__ import annotations

from enum import IntEnum

import grpc
from knnmoe.client import ServiceError, service_error

__all__ = [
    "AdminError",
    "BadInput",
    "ExitCode",
    "Interrupted",
    "ServiceRefused",
    "Unreachable",
    "admin_error",
]


class ExitCode(IntEnum):
    """Exit codes of `router-admin`, as its --help documents them."""

    OK = 0
    REFUSED = 1
    BAD_INPUT = 2
    UNREACHABLE = 3
    INTERRUPTED = 130


class AdminError(Exception):
    """A message for the user; `exit_code` is the process's."""

    exit_code = ExitCode.REFUSED


class BadInput(AdminError):
    """An option or an input file that cannot be used."""

    exit_code = ExitCode.BAD_INPUT


class ServiceRefused(AdminError):
    """The service answered with an error; `error` is its structured form."""

    def __init__(self, message: str, error: ServiceError) -> None:
        super().__init__(message)
        self.error = error


class Unreachable(AdminError):
    """Nobody answers at the target."""

    exit_code = ExitCode.UNREACHABLE


class Interrupted(AdminError):
    """Ctrl-C during a long operation, which then ended."""

    exit_code = ExitCode.INTERRUPTED


def admin_error(failed: grpc.RpcError, target: str, timeout_s: float | None) -> AdminError:
    """What a failed call means to the user of `router-admin`."""
    error = service_error(failed)
    if error.reason:
        return ServiceRefused(error.message, error)
    if error.code is grpc.StatusCode.UNAVAILABLE:
        return Unreachable(
            f"nothing listens on {target}; start it with: router-service serve --data DIR --listen {target} "
            f"({error.message})"
        )
    # A call is cancelled only by this program's own clock.
    if error.code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return Unreachable(
            f"no answer from {target} within {timeout_s} s; raise --timeout-s, or look at the service's log"
        )
    if error.code is grpc.StatusCode.UNIMPLEMENTED:
        return ServiceRefused(
            f"{target} does not speak knnmoe.v1 (another program, or another version?)", error
        )
    return ServiceRefused(f"{error.code.name}: {error.message}", error)

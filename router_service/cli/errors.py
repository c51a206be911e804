"""What `router-admin` ends with: one line on stderr and a documented exit code."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # --help does not wait for gRPC
    from knnmoe.client import ServiceError


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


class Unreachable(AdminError):
    """Nobody answers at the target."""

    exit_code = ExitCode.UNREACHABLE


class Interrupted(AdminError):
    """Ctrl-C during a long operation, which then ended."""

    exit_code = ExitCode.INTERRUPTED


def admin_error(error: ServiceError) -> AdminError:
    """What a failed call means to the user of `router-admin`."""
    import grpc
    from knnmoe.client import BadCredentials, ConnectionMismatch

    if isinstance(error, BadCredentials):
        return BadInput(error.message)
    if isinstance(error, ConnectionMismatch):
        return Unreachable(f"{error.target}: {error.message}")
    if error.reason:
        return AdminError(error.message)
    if error.code is grpc.StatusCode.UNAVAILABLE:
        start = f"router-service serve --data DIR --listen {error.target}"
        return Unreachable(
            f"nothing listens on {error.target}; start it with: {start} ({error.message})"
        )
    # A call is cancelled only by this program's own clock.
    if error.code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return Unreachable(
            f"no answer from {error.target} within {error.timeout_s} s; raise --timeout-s, or look at the service's log"
        )
    if error.code is grpc.StatusCode.UNIMPLEMENTED:
        return AdminError(
            f"{error.target} does not speak knnmoe.v1 (another program, or another version?)"
        )
    return AdminError(f"{error.code.name}: {error.message}")

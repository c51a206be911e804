"""Failures inside of a cluster, as its nodes word them to each other and in the end to a client."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from tests.qdrant_standin.errors import ApiError


@dataclass(frozen=True)
class Kind:
    """`shown` is how one failure quotes another, `said` what a client is told."""

    code: grpc.StatusCode
    shown: str
    said: str
    said_of_several: str
    transient: bool = True


_INTERNAL = grpc.StatusCode.INTERNAL
_SERVICE = "Service internal error: {}"
_CANCELLED = "Service internal error: Operation cancelled: {}"
SERVICE = Kind(_INTERNAL, _SERVICE, _SERVICE, _SERVICE)
CANCELLED = Kind(_INTERNAL, "Operation Cancelled: {}", _CANCELLED, _CANCELLED)
PRECONDITION = Kind(
    grpc.StatusCode.FAILED_PRECONDITION,
    "Precondition failed: {}",
    "Pre-condition failure: Precondition failed: {}",
    "Pre-condition failure: {}",
)
NOT_FOUND = Kind(
    grpc.StatusCode.NOT_FOUND,
    "{} not found",
    "Not found: {} not found",
    "Not found: {}",
    transient=False,
)
_PREFIXES = {
    grpc.StatusCode.INVALID_ARGUMENT: "Wrong input: ",
    grpc.StatusCode.NOT_FOUND: "Not found: ",
    grpc.StatusCode.INTERNAL: "Service internal error: ",
}


class ShardError(ApiError):
    """A failure of one replica or one shard."""

    def __init__(self, kind: Kind, description: str) -> None:
        super().__init__(kind.code, kind.said.format(description))
        self.kind, self.shown = kind, kind.shown.format(description)


class Gone(ApiError):
    """The node that works on a call has been killed meanwhile; its client's connection is closed."""

    def __init__(self) -> None:
        super().__init__(grpc.StatusCode.UNAVAILABLE, "the node is gone")


def service_error(description: str) -> ShardError:
    """Something that passes, in the server's words an internal error."""
    return ShardError(SERVICE, description)


def refused() -> ShardError:
    """Nothing listens where another node was."""
    message = "tcp connect error: Connection refused (os error 111)"
    text = f"code: 'The service is currently unavailable', message: \"{message}\""
    return service_error(f"Tonic status error: {text}")


def silent() -> ShardError:
    """Another node did not answer in time."""
    text = "code: 'The operation was cancelled', message: \"Timeout expired\""
    return ShardError(CANCELLED, text)


def missing_there(error: ApiError) -> ShardError:
    """Another node does not know of the collection, yet or any more."""
    text = f"code: 'Some requested entity was not found', message: \"{error.text}\""
    return ShardError(NOT_FOUND, text)


def shown(error: ApiError) -> str:
    """An error as another one quotes it."""
    return error.shown if isinstance(error, ShardError) else error.text


def is_transient(error: ApiError) -> bool:
    """Whether a replica is to be blamed rather than the request."""
    if isinstance(error, ShardError):
        return error.kind.transient
    return error.code == grpc.StatusCode.INTERNAL


def of_some_shards(failed: int, total: int, first: ApiError) -> ApiError:
    """A write that some of its shards applied."""
    text = f"{failed} out of {total} shards failed to apply operation. First error captured: "
    text += shown(first)
    if isinstance(first, ShardError):
        return ApiError(first.code, first.kind.said_of_several.format(text))
    return ApiError(first.code, _PREFIXES.get(first.code, "") + text)

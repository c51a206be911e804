"""What failures of a Qdrant server mean: every row of the table, in the words that the server uses."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from router_service import errors
from router_service.backends.qdrant_server.failures import (
    TABLE,
    Failure,
    Meaning,
    Row,
    error_of,
    failure_of,
)
from router_service.backends.qdrant_server.options import ServerOptions
from router_service.rpc.interceptors import status_of

OPTIONS = ServerOptions("http://qdrant:6334")
INTERNAL = "Service internal error: "
SHARDS = f"{INTERNAL}2 out of 3 shards failed to apply operation. First error captured: {INTERNAL}"
# Of a peer, as another one repeats it; tonic 0.12 and 0.14 write it differently.
PEER = (
    'Tonic status error: status: Unavailable, message: "error trying to connect: tcp connect'
    ' error: Connection refused (os error 111)", details: [], metadata: MetadataMap {'
    " headers: {} }"
)
NEW_PEER = (
    "Tonic status error: code: 'The service is currently unavailable', message: \"tcp connect"
    ' error", source: tonic::transport::Error(Transport, ConnectError)'
)
FAILED_PEER = f"Failed peer: 42, error: {INTERNAL}{PEER}"

SAID: list[tuple[str, str, Meaning]] = [
    # replica_set/update.rs
    (
        "INTERNAL",
        f"{INTERNAL}The replica set for shard 2 on peer 42 has no active replica",
        Meaning.PASSING,
    ),
    (
        "INTERNAL",
        f"{INTERNAL}Cannot update shard law:1 with Medium ordering because no leader could be"
        " selected",
        Meaning.PASSING,
    ),
    (
        "INTERNAL",
        f"{INTERNAL}Failed to apply update with Strong ordering via leader peer 42:"
        f" {INTERNAL}{PEER}",
        Meaning.PASSING,
    ),
    (
        "INTERNAL",
        f"{INTERNAL}Failed to apply operation UpsertPoints after 3 attempts, all attempts were"
        " rejected",
        Meaning.PASSING,
    ),
    (
        "INTERNAL",
        f"{INTERNAL}Some replica of shard 0 failed to apply operation and deactivation timed out"
        f" after 30s. Consistency of this update is not guaranteed. Please retry. {FAILED_PEER}",
        Meaning.PASSING,
    ),
    (
        "INTERNAL",
        f"{INTERNAL}Failed to apply operation to at least one `Active` replica. Consistency of"
        f" this update is not guaranteed. Please retry. {FAILED_PEER}",
        Meaning.PASSING,
    ),
    (
        "INTERNAL",
        f"{INTERNAL}Cannot forward update to shard 1 because was removed from the replica set",
        Meaning.PASSING,
    ),
    ("INTERNAL", f"{SHARDS}{PEER}", Meaning.PASSING),
    ("INTERNAL", f"{SHARDS}{NEW_PEER}", Meaning.PASSING),
    (
        "INTERNAL",
        f'{SHARDS}Internal error: status: Internal, message: "{INTERNAL}..."',
        Meaning.PASSING,
    ),
    (
        "DEADLINE_EXCEEDED",
        "Timeout: 1 out of 3 shards failed to apply operation. First error captured: Timeout"
        " error: Deadline Exceeded: status: DeadlineExceeded",
        Meaning.LATE,
    ),
    (
        "RESOURCE_EXHAUSTED",
        "Rate limiting exceeded: Write rate limit exceeded: Operation requires 9 tokens but only"
        " 0.0 were available. Retry after 3s",
        Meaning.OVERLOADED,
    ),
    (
        "RESOURCE_EXHAUSTED",
        "Rate limiting exceeded: Write rate limit exceeded, Please split your request into"
        " smaller ones",
        Meaning.MISCONFIGURED,
    ),
    # replica_set/execute_read_operation.rs, replica_set/mod.rs
    (
        "INTERNAL",
        f"{INTERNAL}The replica set for shard 0 on peer 42 does not have enough active replicas",
        Meaning.PASSING,
    ),
    ("INTERNAL", f"{INTERNAL}2 of 2 read operations failed:\n  {INTERNAL}Error", Meaning.PASSING),
    ("INTERNAL", f"{INTERNAL}Failed to wait for replica set state: channel", Meaning.PASSING),
    ("NOT_FOUND", "Not found: Local shard 2 not found not found", Meaning.PASSING),
    ("INTERNAL", f"{INTERNAL}local shard law:2 does not exist or is unavailable", Meaning.PASSING),
    (
        "UNAVAILABLE",
        "Shard temporarily unavailable: partial snapshot recovery is in progress",
        Meaning.PASSING,
    ),
    # dummy_shard.rs
    (
        "INTERNAL",
        f"{INTERNAL}Failed to add points,  Dirty shard - shard is not fully initialized",
        Meaning.PASSING,
    ),
    (
        "INTERNAL",
        f"{INTERNAL}Failed to search,  Local shard is being cleared for snapshot recovery",
        Meaning.PASSING,
    ),
    (
        "INTERNAL",
        f"{INTERNAL}Failed to search,  Qdrant is in recovery mode by the operator",
        Meaning.MISCONFIGURED,
    ),
    # consensus_manager.rs, toc/transfer.rs, channel_service.rs
    (
        "INTERNAL",
        f"{INTERNAL}Waiting for consensus operation commit failed. Timeout set at: 10 seconds",
        Meaning.PASSING,
    ),
    (
        "INTERNAL",
        f"{INTERNAL}Error occurred while waiting for consensus operation. Channel sender dropped"
        " (channel closed)",
        Meaning.PASSING,
    ),
    (
        "INTERNAL",
        f"{INTERNAL}Failed to propose operation: leader is not established within 10s",
        Meaning.PASSING,
    ),
    (
        "INTERNAL",
        f"{INTERNAL}Failed to propose and confirm set replica set state operation through"
        " consensus: x",
        Meaning.PASSING,
    ),
    ("INTERNAL", f"{INTERNAL}Failed to submit consensus proposal: x", Meaning.PASSING),
    ("INTERNAL", f"{INTERNAL}Error in Raft consensus: proposal dropped", Meaning.PASSING),
    ("INTERNAL", f"{INTERNAL}Channel closed: sending on a closed channel", Meaning.PASSING),
    (
        "INTERNAL",
        f"{INTERNAL}Failed to wait for consensus commit on peer 42, has diverged commit/term or"
        " timed out.",
        Meaning.PASSING,
    ),
    # transfers, resharding, cleaning
    (
        "INTERNAL",
        f"{INTERNAL}Cannot proxify local shard 1 to peer 42 because it is already queue proxified",
        Meaning.PASSING,
    ),
    (
        "INVALID_ARGUMENT",
        "Bad request: Shard 1 is already involved in transfer 41 -> 42",
        Meaning.PASSING,
    ),
    ("INVALID_ARGUMENT", "Bad request: another resharding is in progress:\nx", Meaning.PASSING),
    (
        "INTERNAL",
        f"{INTERNAL}Failed to clean shard points due to cancellation, please try again",
        Meaning.PASSING,
    ),
    (
        "INTERNAL",
        f"{INTERNAL}Cannot get WAL version, shard replica set does not have local shard",
        Meaning.PASSING,
    ),
    (
        "FAILED_PRECONDITION",
        "Pre-condition failure: Precondition failed: status: FailedPrecondition",
        Meaning.PASSING,
    ),
    # between nodes: types.rs, channel_service.rs
    ("INTERNAL", f"{INTERNAL}{PEER}", Meaning.PASSING),
    ("INTERNAL", f"{INTERNAL}{NEW_PEER}", Meaning.PASSING),
    ("INTERNAL", f"{INTERNAL}Tonic transport error: transport error", Meaning.PASSING),
    (
        "INTERNAL",
        f"{INTERNAL}transport error: connection error: Connection reset by peer (os error 104)",
        Meaning.PASSING,
    ),
    (
        "INTERNAL",
        f'{INTERNAL}Internal error: status: Internal, message: "h2 protocol error: error reading a'
        ' body from connection"',
        Meaning.PASSING,
    ),
    ("INTERNAL", f"{INTERNAL}no address found for peer 42", Meaning.PASSING),
    ("INTERNAL", f"{INTERNAL}Address for peer ID is not found.", Meaning.PASSING),
    ("UNKNOWN", "transport error", Meaning.PASSING),
    (
        "DEADLINE_EXCEEDED",
        "Timeout: Timeout error: Deadline Exceeded: status: DeadlineExceeded",
        Meaning.LATE,
    ),
    (
        "DEADLINE_EXCEEDED",
        "Timeout: Timeout error: Operation 'Search' timed out after 1s",
        Meaning.LATE,
    ),
    (
        "NOT_FOUND",
        'Not found: status: NotFound, message: "Not found: Collection `law` doesn\'t exist!" not'
        " found",
        Meaning.PASSING,
    ),
    ("NOT_FOUND", "Not found: Shard 3 not found", Meaning.PASSING),
    # a node that stops
    ("INTERNAL", f"{INTERNAL}Can't reach one of the workers: channel closed", Meaning.PASSING),
    (
        "INTERNAL",
        f"{INTERNAL}Operation cancelled: Deferred points wait interrupted: update worker restarted",
        Meaning.PASSING,
    ),
    (
        "INTERNAL",
        f"{INTERNAL}Can't resolve filter operation: update worker stopped before draining the"
        " queue",
        Meaning.PASSING,
    ),
    ("INTERNAL", f"{INTERNAL}Tokio task join error: task 9 was cancelled", Meaning.PASSING),
    (
        "INTERNAL",
        f"{INTERNAL}Can't create collection with name law. Collection data already exists at"
        " ./storage/law",
        Meaning.PASSING,
    ),
    # gRPC on the way
    ("INTERNAL", "Received RST_STREAM with error code 2", Meaning.PASSING),
    ("UNKNOWN", "Stream removed", Meaning.PASSING),
    ("UNAVAILABLE", "Socket closed", Meaning.UNREACHABLE),
    (
        "UNAVAILABLE",
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:1.2.3.4:6334: Failed to"
        " connect to remote host: connect: Connection refused (111)",
        Meaning.UNREACHABLE,
    ),
    ("CANCELLED", "CANCELLED", Meaning.UNREACHABLE),
    ("DEADLINE_EXCEEDED", "Deadline Exceeded", Meaning.LATE),
    ("RESOURCE_EXHAUSTED", "Received message larger than max (9 vs. 4)", Meaning.MISCONFIGURED),
    (
        "OUT_OF_RANGE",
        "Error, decoded message length too large: found 9 bytes, the limit is: 4 bytes",
        Meaning.MISCONFIGURED,
    ),
    # not there, already there
    ("NOT_FOUND", "Not found: Collection `law` doesn't exist!", Meaning.NOT_THERE),
    ("NOT_FOUND", "Not found: Collection law not found", Meaning.NOT_THERE),
    ("ALREADY_EXISTS", "Wrong input: Collection `law` already exists!", Meaning.ALREADY_THERE),
    (
        "INVALID_ARGUMENT",
        "Wrong input: Can't create collection with name law. Alias with the same name already"
        " exists",
        Meaning.ALREADY_THERE,
    ),
    # what somebody has to change
    ("UNAUTHENTICATED", "Invalid API key or JWT", Meaning.KEY_REFUSED),
    ("PERMISSION_DENIED", "Forbidden: Global manage access is required", Meaning.KEY_REFUSED),
    ("UNIMPLEMENTED", "Qdrant is running in standalone mode", Meaning.MISCONFIGURED),
    ("FAILED_PRECONDITION", "Storage locked: for an upgrade", Meaning.MISCONFIGURED),
    (
        "INVALID_ARGUMENT",
        'Bad request: Limit exceeded 256 > 64 for "upsert". Help: Reduce the "upsert" parameter'
        " to or below 64.",
        Meaning.MISCONFIGURED,
    ),
    (
        "INVALID_ARGUMENT",
        "Bad request: Resident memory usage is at 91% of total memory, exceeding the configured"
        " limit of 90%. Help: Reduce memory usage",
        Meaning.FULL,
    ),
    ("RESOURCE_EXHAUSTED", "Insufficient storage: disk quota of the node is reached", Meaning.FULL),
    (
        "INTERNAL",
        f"{INTERNAL}No space left on device: WAL buffer size exceeds available disk space",
        Meaning.FULL,
    ),
    ("INTERNAL", f"{SHARDS}File IO error: No space left on device (os error 28)", Meaning.FULL),
    ("INTERNAL", f"{INTERNAL}Out of memory, free: 12, x", Meaning.FULL),
    (
        "INVALID_ARGUMENT",
        "Wrong input: Vector dimension error: expected dim: 8, got 16",
        Meaning.FOREIGN,
    ),
    ("INVALID_ARGUMENT", "Wrong input: Not existing vector name error: ", Meaning.FOREIGN),
    # defects
    ("INTERNAL", f"{INTERNAL}Mutex lock poisoned: x", Meaning.BROKEN),
    ("INTERNAL", f"{INTERNAL}Tokio task join error: task 9 panicked", Meaning.BROKEN),
    ("INTERNAL", f"{INTERNAL}Wal error: x", Meaning.BROKEN),
    ("INVALID_ARGUMENT", "Validation error in body: [x]", Meaning.BROKEN),
    ("DATA_LOSS", "Checksum mismatch: expected a, actual b", Meaning.BROKEN),
]
RAISED = {
    Meaning.UNREACHABLE: errors.BackendUnavailable,
    Meaning.LATE: errors.BackendUnavailable,
    Meaning.PASSING: errors.BackendUnavailable,
    Meaning.OVERLOADED: errors.Overloaded,
    Meaning.NOT_THERE: errors.CollectionClosed,
    Meaning.ALREADY_THERE: errors.CollectionExists,
    Meaning.KEY_REFUSED: errors.BackendMisconfigured,
    Meaning.FULL: errors.DiskFull,
    Meaning.MISCONFIGURED: errors.BackendMisconfigured,
    Meaning.FOREIGN: errors.ForeignCollection,
    Meaning.BROKEN: errors.StorageError,
}


class Failed(grpc.RpcError):
    """A failed call, as gRPC hands it over."""

    def __init__(self, status: str, text: str, trailing: tuple[tuple[str, str], ...] = ()) -> None:
        self._status, self._text, self._trailing = grpc.StatusCode[status], text, trailing

    def code(self) -> grpc.StatusCode:
        return self._status

    def details(self) -> str:
        return self._text

    def trailing_metadata(self) -> Any:
        return self._trailing


def row_of(status: str, text: str) -> Row:
    return next(
        row
        for row in TABLE
        if (not row.statuses or status in row.statuses) and row.words.search(text)
    )


@pytest.mark.parametrize(("status", "text", "meaning"), SAID)
def test_what_the_server_says(status: str, text: str, meaning: Meaning) -> None:
    failure = failure_of(Failed(status, text))
    assert failure.meaning is meaning
    error = error_of(failure, OPTIONS, 10.0)
    assert type(error) is RAISED[meaning]
    assert OPTIONS.url in str(error)
    passing = meaning in (Meaning.PASSING, Meaning.UNREACHABLE, Meaning.LATE)
    assert (error.retry_after_s is not None) == passing
    code = status_of(error).code
    assert (code is grpc.StatusCode.INTERNAL) == (meaning is Meaning.BROKEN)
    assert (code is grpc.StatusCode.UNAVAILABLE) >= passing


def test_every_row_is_what_a_server_says() -> None:
    used = {id(row_of(status, text)) for status, text, _ in SAID}
    assert [row for row in TABLE if id(row) not in used] == []


def test_a_rate_limit_says_how_long_to_wait() -> None:
    failure = failure_of(Failed("RESOURCE_EXHAUSTED", "later", (("retry-after", "3"),)))
    assert failure.pause_s(1) == failure.retry_s == 3.0
    assert error_of(failure, OPTIONS, 1.0).retry_after_s == 3.0
    assert failure_of(Failed("RESOURCE_EXHAUSTED", "later")).pause_s(1) is None


def test_what_passes_is_tried_for_longer_than_what_cannot_be_reached() -> None:
    def tries(meaning: Meaning) -> int:
        failure = Failure(meaning, "", "", None)
        return next(tried for tried in range(1, 99) if failure.pause_s(tried) is None)

    assert tries(Meaning.PASSING) > tries(Meaning.UNREACHABLE) > tries(Meaning.BROKEN) == 1


def test_words_of_a_server_are_no_format() -> None:
    """They may have braces: metadata of tonic has."""
    assert "{x}" in str(error_of(failure_of(Failed("INTERNAL", "a {x} {0}")), OPTIONS, 1.0))

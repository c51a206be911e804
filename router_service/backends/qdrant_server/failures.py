"""What a failure of a Qdrant server means: one table from status and wording to an error of the service.

A cluster answers INTERNAL to most of what it does by design (a node that goes, a leader that is elected, a replica that
is filled again), and says which only in words. Wordings are those of Qdrant 1.13 to 1.20 and of gRPC.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

from router_service.backends.qdrant_server.options import ServerOptions
from router_service.errors import (
    BackendMisconfigured,
    BackendUnavailable,
    CollectionClosed,
    CollectionExists,
    DiskFull,
    ForeignCollection,
    Overloaded,
    RoutingServiceError,
    StorageError,
    shorten,
)

# Seconds after which another try may succeed: of a message on its way, of a node or leader that others take over from.
_SOON_S, _NODE_S = 0.5, 2.0
# Before the tries after the first: in the end every channel has tried to connect again; and a cluster has changed.
_CONNECTING_S = (0.02, 0.35)
_CHANGING_S = (*_CONNECTING_S, 0.7, 1.4, 2.5)
_RETRY_AFTER = "retry-after"
_AROUND = re.compile(
    r"failed to connect to all addresses; last error: \w+: \S+: (Failed to connect to remote host: )?"
)


class Meaning(Enum):
    """What a failure is to whoever runs the service."""

    UNREACHABLE = auto()  # nobody answers
    LATE = auto()  # no answer in time; what was asked may have been done
    PASSING = auto()  # a cluster that changes: what was asked may have been done, or half of it
    OVERLOADED = auto()
    NOT_THERE = auto()
    ALREADY_THERE = auto()
    KEY_REFUSED = auto()
    FULL = auto()  # no disk or RAM left on a node
    MISCONFIGURED = auto()  # passes only when somebody changes the server's settings, or these
    FOREIGN = auto()  # a collection of the right name, and of another shape
    BROKEN = auto()  # a defect, of the server or of this service


@dataclass(frozen=True, slots=True)
class Row:
    """Failures of some statuses (none: all) whose words match; `retry_s`: when another try may succeed, None: none."""

    statuses: frozenset[str]
    words: re.Pattern[str]
    meaning: Meaning
    retry_s: float | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed call: its meaning, what it said, and the seconds to wait before another try; None: for nothing."""

    meaning: Meaning
    status: str
    text: str
    retry_s: float | None = None

    def pause_s(self, tried: int) -> float | None:
        """Seconds to wait before a try after `tried` that failed within one call; None when there is to be none."""
        pauses: tuple[float, ...] = _PAUSES_S.get(self.meaning, ())
        if self.meaning is Meaning.OVERLOADED and self.retry_s is not None:
            pauses = (self.retry_s, self.retry_s)
        return pauses[tried - 1] if tried <= len(pauses) else None

    @property
    def half_done(self) -> bool:
        """Whether what was asked for may have been done, or some of it."""
        return self.meaning in _HALF_DONE or "shards failed" in self.text


_HALF_DONE = (
    Meaning.UNREACHABLE,
    Meaning.LATE,
    Meaning.PASSING,
    Meaning.FULL,
    Meaning.BROKEN,
)
_PAUSES_S = {
    Meaning.UNREACHABLE: _CONNECTING_S,
    Meaning.PASSING: _CHANGING_S,
    Meaning.LATE: _CHANGING_S,
}


def _row(
    statuses: str, words: str, meaning: Meaning, retry_s: float | None = None, *, flags: int = 0
) -> Row:
    return Row(frozenset(statuses.split()), re.compile(words, flags), meaning, retry_s)


_ANY = ""
# The first row that fits counts: causes that stay come before the failures that they are wrapped in.
TABLE = (
    _row("UNAUTHENTICATED PERMISSION_DENIED", _ANY, Meaning.KEY_REFUSED),
    _row(
        _ANY,
        r"No space left on device|Insufficient storage: |Out of memory, free: |Resident memory usage is at ",
        Meaning.FULL,
    ),
    _row(_ANY, r"panicked|lock poisoned|Checksum mismatch|corrupted", Meaning.BROKEN),
    _row("RESOURCE_EXHAUSTED", r"rate limit exceeded, |message larger than", Meaning.MISCONFIGURED),
    _row("RESOURCE_EXHAUSTED", _ANY, Meaning.OVERLOADED),
    _row("OUT_OF_RANGE", r"message length too large", Meaning.MISCONFIGURED),
    _row("UNIMPLEMENTED", _ANY, Meaning.MISCONFIGURED),
    _row("INVALID_ARGUMENT", r"\. Help: ", Meaning.MISCONFIGURED),  # strict mode
    _row("FAILED_PRECONDITION", r"Storage locked: ", Meaning.MISCONFIGURED),
    _row(
        "INVALID_ARGUMENT",
        r"Vector dimension error|Not existing vector name|Wrong vector dimension",
        Meaning.FOREIGN,
    ),
    _row(
        "ALREADY_EXISTS INVALID_ARGUMENT",
        r"Collection `[^`]*` already exists|Alias with the same name already exists",
        Meaning.ALREADY_THERE,
    ),
    # A peer that was asked by the peer that was asked has not heard of it yet, or has lost it.
    _row("NOT_FOUND", r"status: |code: |[Ss]hard |[Rr]eplica ", Meaning.PASSING, _SOON_S),
    _row("NOT_FOUND", _ANY, Meaning.NOT_THERE),
    _row("UNAVAILABLE", r"Shard temporarily unavailable", Meaning.PASSING, _SOON_S),
    _row("UNAVAILABLE CANCELLED", _ANY, Meaning.UNREACHABLE, _SOON_S),
    _row("DEADLINE_EXCEEDED", _ANY, Meaning.LATE, _SOON_S),
    # A replica that is not loaded: on its way back, else in recovery mode or damaged.
    _row(
        _ANY,
        r"Dirty shard - |being cleared for snapshot recovery|Failed to restore local replica",
        Meaning.PASSING,
        _NODE_S,
    ),
    _row(_ANY, r"Failed to [\w ]+,  ", Meaning.MISCONFIGURED),
    # Replicas: too few take part, or a part of them took the write.
    _row(
        _ANY,
        r"active replica|`Active` replica|deactivation timed out|Consistency of this update is not guaranteed|"
        r"all attempts were rejected|Failed to wait for replica set state",
        Meaning.PASSING,
        _NODE_S,
    ),
    # Who orders writes to a shard.
    _row(
        _ANY,
        r"ordering via leader peer|no leader could be selected|removed from the replica set",
        Meaning.PASSING,
        _NODE_S,
    ),
    # Consensus: no leader yet, or no majority in time. What was proposed may be agreed upon later.
    _row(
        _ANY,
        r"consensus operation|leader is not established|through consensus|consensus proposal|consensus commit|"
        r"Raft consensus|Channel closed: |[Cc]hannel sender dropped",
        Meaning.PASSING,
        _NODE_S,
    ),
    # Shards that move, are filled again or are cut anew.
    _row(
        _ANY,
        r"proxified|shard transfer|involved in transfer|resharding|hashring|"
        r"[Ll]ocal shard \S+ (does not exist|not found)|\b[Ss]hard \d+ (does not exist|doesn't exist|is not found)|"
        r"does not have local shard|partial snapshot|Failed to clean shard points|Failed to drain update queue",
        Meaning.PASSING,
        _NODE_S,
    ),
    # Between nodes.
    _row(
        _ANY,
        r"\btonic|transport error|tcp connect error|error trying to connect|connection (refused|reset|error|closed)|"
        r"broken pipe|h2 protocol error|http2 error|error reading a body|no address found for peer|"
        r"Address for peer ID|operation timed out|Timeout expired|Deadline Exceeded|service is currently unavailable",
        Meaning.PASSING,
        _NODE_S,
        flags=re.IGNORECASE,
    ),
    # A node that stops, or a worker of a shard that is started again.
    _row(
        _ANY,
        r"Can't reach one of the workers|[Oo]peration [Cc]ancelled|update worker (re)?st|optimization worker stopped|"
        r"task \d+ was cancelled|channel closed|Collection data already exists",
        Meaning.PASSING,
        _SOON_S,
    ),
    # On its way to this service.
    _row(
        "INTERNAL UNKNOWN",
        r"RST_STREAM|Stream removed|GOAWAY|Socket closed|stream error",
        Meaning.PASSING,
        _SOON_S,
    ),
    # A replica in another state than the write needs.
    _row("FAILED_PRECONDITION", r"Pre-?condition fail", Meaning.PASSING, _NODE_S),
    # A write or a read that some shards or replicas answered, whatever the others met.
    _row(
        _ANY,
        r"\d+ out of \d+ shards failed|\d+ of \d+ read operations failed",
        Meaning.PASSING,
        _NODE_S,
    ),
    _row(_ANY, _ANY, Meaning.BROKEN),
)


def failure_of(error: Any) -> Failure:
    """What a failed call (grpc.RpcError) means."""
    failure = classified(error.code().name, cause(error))
    if failure.meaning is Meaning.OVERLOADED:
        return replace(failure, retry_s=_asked_to_wait_s(error))
    return failure


def classified(status: str, text: str) -> Failure:
    """What a server means that says this, in an answer or in what it reports."""
    row = next(
        row
        for row in TABLE
        if (not row.statuses or status in row.statuses) and row.words.search(text)
    )
    return Failure(row.meaning, status, text, row.retry_s)


def cause(error: Any) -> str:
    """What a failure says, without what gRPC says around it."""
    return _AROUND.sub("", error.details() or error.code().name)


_ERRORS: dict[Meaning, tuple[type[StorageError | Overloaded], str]] = {
    Meaning.LATE: (
        BackendUnavailable,
        "{where} did not answer within {timeout_s:.3g} s ({text}; lookups: --qdrant-timeout-s)",
    ),
    Meaning.PASSING: (
        BackendUnavailable,
        "{where} cannot do it at this moment, which passes when its nodes are whole: try again ({text})",
    ),
    Meaning.OVERLOADED: (Overloaded, "{where} asks to come back later: {text}"),
    Meaning.NOT_THERE: (CollectionClosed, "a collection of {where} ({text})"),
    Meaning.ALREADY_THERE: (
        CollectionExists,
        "{where} has it already, another service may have made it: try again ({text})",
    ),
    Meaning.KEY_REFUSED: (
        BackendMisconfigured,
        "{where} refuses {given} ({text}); set ROUTER_SERVICE_QDRANT_API_KEY or --qdrant-api-key-file",
    ),
    Meaning.FULL: (
        DiskFull,
        "a node of {where} has no room left ({text}); free disk or RAM there, remove memories, or add nodes",
    ),
    Meaning.MISCONFIGURED: (
        BackendMisconfigured,
        "{where} refuses it as it is set up ({text}); change the server's settings (version, limits, strict mode, "
        "locks, recovery mode), or the --qdrant-... options of this service",
    ),
    Meaning.FOREIGN: (
        ForeignCollection,
        "a collection of {where} is not of the memory's shape ({text}): another program's, or another model's; choose "
        "another --qdrant-prefix (ROUTER_SERVICE_QDRANT_PREFIX), or remove it",
    ),
    Meaning.BROKEN: (StorageError, "{where} failed with {status}: {text}"),
}


def error_of(
    failure: Failure, options: ServerOptions, timeout_s: float, node: str = ""
) -> RoutingServiceError:
    """The service's error, with a remedy. `timeout_s`: how long the call waited at the most; `node`: which failed."""
    text = shorten(f"{node}: {failure.text}" if node else failure.text, 300)
    if failure.meaning is Meaning.UNREACHABLE:
        return unreachable(options, text)
    kind, said = _ERRORS[failure.meaning]
    error = kind(
        said.format(
            where=options.where,
            given="the API key" if options.api_key else "a call without an API key",
            text=text,
            status=failure.status,
            timeout_s=timeout_s,
        )
    )
    error.retry_after_s = failure.retry_s
    return error


def unreachable(options: ServerOptions, text: str) -> BackendUnavailable:
    """What a start or a call ends with when nobody answers."""
    return BackendUnavailable(
        f"{options.where} cannot be reached ({text}); start it, or change "
        f"{options.named_by} to its gRPC port, which is 6334 unless the server is told otherwise",
        _SOON_S,
    )


def _asked_to_wait_s(error: Any) -> float | None:
    for key, value in error.trailing_metadata() or ():
        if key == _RETRY_AFTER and re.fullmatch(r"\d+(\.\d+)?", str(value)):
            return float(value)
    return None

"""The exception tree of the service. `rpc/interceptors.py` maps each to one gRPC status and one ErrorReason.

RoutingServiceError
├── InvalidRequest            a caller's mistake; names the field, the value and what was expected
│   ├── InvalidField
│   ├── InvalidTensor
│   ├── WidthMismatch         a tensor made for another model
│   └── NotFinite
├── MemoryNotFound
├── MemoryExists
├── LayerNotFound
├── ModelMismatch
├── KindMismatch
├── Overloaded
├── DeadlineTooShort
├── Busy                      a maintenance job holds the layer
├── Cancelled                 somebody ended a long operation
├── OperationNotFound
├── SnapshotNotFound
├── ReplicaBehind             a copy's position is not known any more
├── Unauthenticated           no token, or an unknown one
├── PermissionDenied          a token of a lower role, or for other memories
├── ShuttingDown
└── StorageError              the engine or the file system failed
    ├── DiskFull
    ├── OutOfDescriptors      the process may open no further file
    ├── DirectoryInUse
    ├── CollectionClosed      deleted, replaced or shut down while a call was on its way
    ├── EngineStopped         an engine process that ended, and is started again
    ├── CollectionExists      another service has just made it on the same server
    ├── BackendUnavailable    a Qdrant server that is away, changes, or does not answer in time
    ├── BackendMisconfigured  one that cannot be used with these settings
    ├── CorruptMemory
    │   ├── NewerFormat       sound, but of a later version of the service: nothing of it is read or changed
    │   ├── ForeignCollection a collection of the memory's name that is not what the memory needs
    │   └── KeysNotFound      entries are there, and searches do not find them
    └── SnapshotInvalid
        └── NewerSnapshot
"""

from __future__ import annotations

from router_service import __version__

_MAX_NAMES = 20


class RoutingServiceError(Exception):
    """Base of every error that the service raises on purpose.

    Attributes:
        retry_after_s: seconds after which the same call may succeed, where that is known.
        half_done: whether what was asked for may have been done all the same, or some of it.

    """

    retry_after_s: float | None = None
    half_done = False


class InvalidRequest(RoutingServiceError):
    """A field of a request cannot be used."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        self.field, self.value, self.expected = field, shorten(value), expected
        super().__init__(f"{field}: got {self.value}, expected {expected}")


class InvalidField(InvalidRequest):
    """A scalar, name or list that is missing, malformed or out of range."""


class InvalidTensor(InvalidRequest):
    """A tensor whose bytes, shape or dtype disagree with each other or with the request."""


class WidthMismatch(InvalidRequest):
    """A tensor whose width is not that of the memory's model."""


class NotFinite(InvalidRequest):
    """NaN, infinity, or a value whose square overflows f32."""


class MemoryNotFound(RoutingServiceError):
    """No memory of that name."""

    def __init__(self, name: str, known: list[str]) -> None:
        have = ", ".join(known[:_MAX_NAMES]) or "none; create one with router-admin memory create"
        more = f" and {len(known) - _MAX_NAMES} more" if len(known) > _MAX_NAMES else ""
        super().__init__(f"memory {shorten(name)} not found; this service has: {have}{more}")


class MemoryExists(RoutingServiceError):
    """A memory of that name is already there."""

    def __init__(self, name: str) -> None:
        super().__init__(f"memory {name!r} already exists; delete it first or choose another name")


class LayerNotFound(RoutingServiceError):
    """The memory has no such MoE layer."""

    def __init__(self, layer: int, layers: int) -> None:
        super().__init__(
            f"layer: got {layer}, expected 0 to {layers - 1} (MoE layers are counted from 0)"
        )


class ModelMismatch(RoutingServiceError):
    """The client's model is not the one that the memory was made for."""


class KindMismatch(RoutingServiceError):
    """Assignments where logits are needed, or the other way round."""


class Overloaded(RoutingServiceError):
    """Too many calls in flight."""


class DeadlineTooShort(RoutingServiceError):
    """The caller's deadline has passed or leaves no time to search."""


class Busy(RoutingServiceError):
    """Another maintenance job holds the layer."""


class Cancelled(RoutingServiceError):
    """A long operation was ended by a client, or by the service's stop."""


class OperationNotFound(RoutingServiceError):
    """No operation of that id, or one that ended long ago."""


class SnapshotNotFound(RoutingServiceError):
    """No snapshot of that name, or nothing at that path."""


class ReplicaBehind(RoutingServiceError):
    """A copy cannot go on from where it is."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{why}; ask again with the entries that the copy holds")


class Unauthenticated(RoutingServiceError):
    """A call without a token, or with one that is not known."""


class PermissionDenied(RoutingServiceError):
    """A caller who is known, and may not do this."""


class ShuttingDown(RoutingServiceError):
    """The service is draining."""


class StorageError(RoutingServiceError):
    """The storage engine or the file system failed."""


class DiskFull(StorageError):
    """Too little free disk to accept a write; on a Qdrant server also too little RAM."""


class OutOfDescriptors(StorageError):
    """The process, or the machine, may open no further file for now; nothing is damaged."""


class DirectoryInUse(StorageError):
    """Another process has the data directory or a collection open."""


class CollectionClosed(StorageError):
    """The memory was deleted, replaced or shut down while a call was on its way to it."""

    def __init__(self, collection: object) -> None:
        super().__init__(f"{collection} is closed: deleted, replaced, or the service stops; retry")


class EngineStopped(StorageError):
    """An engine process ended or was ended, and is started again at the next call."""


class CollectionExists(StorageError):
    """A server's collection of that name was made by somebody else meanwhile."""


class BackendUnavailable(StorageError):
    """The Qdrant server is away, is changing (a node comes or goes), or does not answer in time."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BackendMisconfigured(StorageError):
    """The Qdrant server cannot be used with the settings at hand: its key, its version, its limits."""


class CorruptMemory(StorageError):
    """The entries of a memory disagree with its manifest."""


class NewerFormat(CorruptMemory):
    """Files or records that a later version of the service, or of its engine, has written; they stay as they are."""


class ForeignCollection(CorruptMemory):
    """A collection that is there under a memory's name, with another dimension or distance."""


class KeysNotFound(CorruptMemory):
    """Searches do not find entries that are there: the file system does not do what the engine needs."""


class SnapshotInvalid(StorageError):
    """A snapshot or an archive of one that is damaged, incomplete, or of a newer format."""


class NewerSnapshot(SnapshotInvalid):
    """A snapshot that a later version of the service has made."""


def newer_format(what: str, found: object, reads: object, written_by: object) -> str:
    """The words for what a later version has written: both versions, and what helps. `written_by` may be None."""
    by = "" if written_by is None else f", written by router-service {shorten(str(written_by), 40)}"
    return (
        f"{what} is of format {found}{by}; this version, router-service {__version__}, reads up to {reads}. It stays "
        "as it is: start the version that wrote it or a later one, or go back as docs/operations.md says (Upgrades)"
    )


def shorten(value: object, limit: int = 120) -> str:
    """A value in ASCII, cut to fit: messages travel as HTTP/2 metadata, which holds 8 KiB."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"

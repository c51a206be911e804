"""Calls to a Qdrant server: raw gRPC stubs with deadlines to the millisecond, retries within them, errors by cause.

The high-level client rounds deadlines up to whole seconds; its generated stubs do not.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from router_service.backends.qdrant_server.options import ServerOptions
from router_service.backends.qdrant_server.wire import q
from router_service.errors import (
    BackendMisconfigured,
    BackendUnavailable,
    CollectionClosed,
    Overloaded,
    RoutingServiceError,
    StorageError,
    shorten,
)

OLDEST, FIRST_TOO_NEW = (1, 13), (2, 0)
WRITE_TIMEOUT_S = 10.0
ADMIN_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 5.0
# Tries after the first, of what failed with UNAVAILABLE, or with RESOURCE_EXHAUSTED and a time to wait.
_RETRIES = 2
_PAUSES_S = (0.02, 0.35)  # in the end every channel has tried to connect again
_RETRY_AFTER = "retry-after"
_AROUND = re.compile(
    r"failed to connect to all addresses; last error: \w+: \S+: (Failed to connect to remote host: )?"
)
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Back soon after the server's return, and aware within seconds of a peer that only vanished.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # In spite of its name the time that one attempt gets: in 100 ms a busy machine does not always accept.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 250),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Else channels with equal options share one connection.
    ("grpc.use_local_subchannel_pool", 1),
]


class Stubs:
    """The services of a server behind one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.points = q.PointsStub(channel)
        self.collections = q.CollectionsStub(channel)
        self.snapshots = q.SnapshotsStub(channel)
        self.server = q.QdrantStub(channel)


class Connection:
    """A few channels to one server. Safe to call from several threads."""

    def __init__(self, options: ServerOptions) -> None:
        """Connects. Raises BackendUnavailable, or BackendMisconfigured on a wrong key or version."""
        self.options = options
        self._metadata = (("api-key", options.api_key),) if options.api_key else ()
        target, self.version = self._find()
        self._target = target
        self._pool = [Stubs(self._open(target)) for _ in range(options.connections)]
        self._next = itertools.count()
        try:
            # The server's health needs no key: this does.
            self.call("collections", "List", q.ListCollectionsRequest(), _CONNECT_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    @property
    def host_and_port(self) -> str:
        """Of the server's gRPC side."""
        return self._target

    def call(
        self, service: str, method: str, request: Any, timeout_s: float, *, repeat: bool = True
    ) -> Any:
        """The reply, of a second or third try if need be and time is left. Raises StorageError, Overloaded.

        `repeat`: False for what must not be done twice.
        """
        deadline = time.monotonic() + timeout_s
        for pause_s in (*_PAUSES_S[: _RETRIES if repeat else 0], None):
            try:
                left = max(deadline - time.monotonic(), 0.001)
                stub = getattr(self._stubs(), service)
                return getattr(stub, method)(request, timeout=left, metadata=self._metadata)
            except grpc.RpcError as error:
                wait_s = None if pause_s is None else _wait_before_retry(error, pause_s)
                if wait_s is None or time.monotonic() + wait_s >= deadline:
                    raise self.error_of(error, timeout_s) from error
                time.sleep(wait_s)
        raise AssertionError("unreachable")

    def exists(self, collection: str) -> bool:
        """Whether the server has a collection. Raises StorageError."""
        request = q.CollectionExistsRequest(collection_name=collection)
        reply = self.call("collections", "CollectionExists", request, WRITE_TIMEOUT_S)
        return bool(reply.result.exists)

    def wait_for(self, collection: str) -> None:
        """Until every connection finds a collection: they may lead to different nodes of a cluster."""
        deadline = time.monotonic() + ADMIN_TIMEOUT_S
        for stubs in self._pool:
            while not self._finds(stubs, collection):
                if time.monotonic() > deadline:
                    raise BackendUnavailable(
                        f"a node of {self.options.url} does not learn of {collection!r}; is the cluster whole?"
                    )
                time.sleep(_PAUSES_S[0])

    def _finds(self, stubs: Stubs, collection: str) -> bool:
        request = q.GetCollectionInfoRequest(collection_name=collection)
        try:
            with self.failures(WRITE_TIMEOUT_S):
                stubs.collections.Get(request, timeout=WRITE_TIMEOUT_S, metadata=self._metadata)
        except CollectionClosed:
            return False
        return True

    def begin(self, service: str, method: str, request: Any, timeout_s: float) -> Any:
        """A call under way; `result()` of what it returns within `failures()`."""
        stub = getattr(self._stubs(), service)
        return getattr(stub, method).future(request, timeout=timeout_s, metadata=self._metadata)

    @contextmanager
    def failures(self, timeout_s: float) -> Iterator[None]:
        """Maps what a call raises inside."""
        try:
            yield
        except grpc.RpcError as error:
            raise self.error_of(error, timeout_s) from error

    def error_of(self, error: Any, timeout_s: float) -> RoutingServiceError:
        """What a failed call (grpc.RpcError) means to whoever runs the service."""
        code, text = error.code(), shorten(_cause(error), 300)
        where = f"the Qdrant server at {self.options.url}"
        match code:
            case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
                return self._unreachable(text)
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return BackendUnavailable(
                    f"{where} did not answer within {timeout_s:.3g} s (lookups: --qdrant-timeout-s)"
                )
            case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
                given = "the API key" if self.options.api_key else "a call without an API key"
                return BackendMisconfigured(
                    f"{where} refuses {given} ({text}); set ROUTER_SERVICE_QDRANT_API_KEY or --qdrant-api-key-file"
                )
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                return Overloaded(f"{where} asks to come back later: {text}")
            case grpc.StatusCode.NOT_FOUND:
                return CollectionClosed(f"a collection of {where} ({text})")
        return StorageError(f"{where} failed with {code.name}: {text}")

    def close(self) -> None:
        """Closing twice is allowed."""
        for stubs in self._pool:
            stubs.channel.close()

    def _unreachable(self, details: str) -> BackendUnavailable:
        return BackendUnavailable(
            f"the Qdrant server at {self.options.url} cannot be reached ({details}); start it, or change "
            f"{self.options.named_by} to its gRPC port, which is 6334 unless the server is told otherwise"
        )

    def _stubs(self) -> Stubs:
        return self._pool[next(self._next) % len(self._pool)]

    def _open(self, target: str) -> grpc.Channel:
        if not self.options.secure:
            return grpc.insecure_channel(target, _CHANNEL_OPTIONS)
        credentials = grpc.ssl_channel_credentials(self.options.ca_certificate)
        return grpc.secure_channel(target, credentials, _CHANNEL_OPTIONS)

    def _find(self) -> tuple[str, str]:
        """The address that speaks Qdrant's gRPC, and the server's version."""
        failures = []
        for target in self.options.targets:
            with self._open(target) as channel:
                try:
                    reply = q.QdrantStub(channel).HealthCheck(
                        q.HealthCheckRequest(), timeout=_CONNECT_TIMEOUT_S, metadata=self._metadata
                    )
                except grpc.RpcError as error:
                    failures.append(f"{target}: {_cause(error)}")
                    continue
            self._require_version(reply.version)
            return target, reply.version
        raise self._unreachable(shorten("; ".join(failures), 300))

    def _require_version(self, version: str) -> None:
        numbers = re.match(r"(\d+)\.(\d+)", version)
        known = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
        if not OLDEST <= known < FIRST_TOO_NEW:
            raise BackendMisconfigured(
                f"the server at {self.options.url} is Qdrant {shorten(version, 40)}, this service speaks to "
                f"{OLDEST[0]}.{OLDEST[1]} and later 1.x; change {self.options.named_by} to another server, or "
                "upgrade this one"
            )


def _cause(error: Any) -> str:
    """What a failure says, without what gRPC says around it."""
    return _AROUND.sub("", error.details() or error.code().name)


def _wait_before_retry(error: Any, pause_s: float) -> float | None:
    """Seconds to wait before another try; None when there is to be none."""
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return pause_s
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        for key, value in error.trailing_metadata() or ():
            if key == _RETRY_AFTER and re.fullmatch(r"\d+(\.\d+)?", str(value)):
                return float(value)
    return None

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

from router_service.backends.qdrant_server.failures import (
    cause,
    error_of,
    failure_of,
    unreachable,
)
from router_service.backends.qdrant_server.options import ServerOptions
from router_service.backends.qdrant_server.wire import q
from router_service.errors import (
    BackendMisconfigured,
    BackendUnavailable,
    CollectionClosed,
    shorten,
)

OLDEST, FIRST_TOO_NEW = (1, 13), (2, 0)
WRITE_TIMEOUT_S = 10.0
ADMIN_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 5.0
_LOOK_S = 0.02
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
        """The reply, of a further try while failures pass and time is left. Raises StorageError, Overloaded.

        `repeat`: False for what must not be done twice.
        """
        deadline, half_done = time.monotonic() + timeout_s, False
        for tried in itertools.count(1):
            try:
                left = max(deadline - time.monotonic(), 0.001)
                stub = getattr(self._stubs(), service)
                return getattr(stub, method)(request, timeout=left, metadata=self._metadata)
            except grpc.RpcError as error:
                failure = failure_of(error)
                half_done |= failure.half_done
                wait_s = failure.pause_s(tried) if repeat else None
                if wait_s is None or time.monotonic() + wait_s >= deadline:
                    failed = error_of(failure, self.options, timeout_s)
                    failed.half_done = half_done
                    raise failed from error
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
                time.sleep(_LOOK_S)

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
            raise error_of(failure_of(error), self.options, timeout_s) from error

    def close(self) -> None:
        """Closing twice is allowed."""
        for stubs in self._pool:
            stubs.channel.close()

    def _stubs(self) -> Stubs:
        return self._pool[next(self._next) % len(self._pool)]

    def _open(self, target: str) -> grpc.Channel:
        if not self.options.secure:
            return grpc.insecure_channel(target, _CHANNEL_OPTIONS)
        credentials = grpc.ssl_channel_credentials(self.options.ca_certificate)
        return grpc.secure_channel(target, credentials, _CHANNEL_OPTIONS)

    def _find(self) -> tuple[str, str]:
        """The address that speaks Qdrant's gRPC, and the server's version."""
        refusals = []
        for target in self.options.targets:
            with self._open(target) as channel:
                try:
                    reply = q.QdrantStub(channel).HealthCheck(
                        q.HealthCheckRequest(), timeout=_CONNECT_TIMEOUT_S, metadata=self._metadata
                    )
                except grpc.RpcError as error:
                    refusals.append(f"{target}: {cause(error)}")
                    continue
            self._require_version(reply.version)
            return target, reply.version
        raise unreachable(self.options, shorten("; ".join(refusals), 300))

    def _require_version(self, version: str) -> None:
        numbers = re.match(r"(\d+)\.(\d+)", version)
        known = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
        if not OLDEST <= known < FIRST_TOO_NEW:
            raise BackendMisconfigured(
                f"the server at {self.options.url} is Qdrant {shorten(version, 40)}, this service speaks to "
                f"{OLDEST[0]}.{OLDEST[1]} and later 1.x; change {self.options.named_by} to another server, or "
                "upgrade this one"
            )

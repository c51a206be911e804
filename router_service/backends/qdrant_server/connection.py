"""Calls to a Qdrant server or cluster: raw gRPC stubs with deadlines to the millisecond, errors by cause.

The high-level client rounds deadlines up to whole seconds; its generated stubs do not.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import grpc

from router_service.backends.qdrant_server.calls import Calls, Lateness
from router_service.backends.qdrant_server.failures import Meaning, error_of, failure_of
from router_service.backends.qdrant_server.node import Node, Stubs
from router_service.backends.qdrant_server.nodes import CONNECT_TIMEOUT_S, Nodes
from router_service.backends.qdrant_server.options import ServerOptions
from router_service.backends.qdrant_server.wire import q
from router_service.errors import BackendUnavailable

WRITE_TIMEOUT_S = 10.0
ADMIN_TIMEOUT_S = 60.0
_LOOK_S = 0.02


class Connection:
    """A few channels to a server, or to each node of a cluster. Safe to call from several threads."""

    def __init__(self, options: ServerOptions) -> None:
        """Connects; of a cluster one node suffices.

        Raises BackendUnavailable, or BackendMisconfigured on a wrong key or version, or on nodes of different clusters.
        """
        self.options = options
        self.nodes = Nodes(options)
        self.lateness = Lateness()
        try:
            # The server's health needs no key: this does.
            self.call("collections", "List", q.ListCollectionsRequest(), CONNECT_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> str:
        """Of the server, or of the oldest node."""
        return self.nodes.version

    @property
    def host_and_port(self) -> str:
        """Of the gRPC side of the server, or of a node in use."""
        return self.nodes.pick().target

    def call(
        self, service: str, method: str, request: Any, timeout_s: float, *, repeat: bool = True
    ) -> Any:
        """The reply, of a further try while failures pass and time is left. Raises StorageError, Overloaded.

        `repeat`: False for what must not be done twice.
        """
        if self.nodes.several:
            calls = Calls(self.nodes, self.lateness, service, method, timeout_s, repeat=repeat)
            return calls.replies([request])[0]
        # Waiting in place is faster than for a thread of gRPC's.
        [node] = self.nodes.all
        deadline, half_done = time.monotonic() + timeout_s, False
        for tried in itertools.count(1):
            try:
                left = max(deadline - time.monotonic(), 0.001)
                stub = getattr(node.stubs(), service)
                return getattr(stub, method)(request, timeout=left, metadata=node.metadata)
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

    def together(
        self, service: str, method: str, requests: Sequence[Any], timeout_s: float
    ) -> list[Any]:
        """The replies to requests that are under way at the same time, as of call(). Raises likewise."""
        return Calls(self.nodes, self.lateness, service, method, timeout_s).replies(requests)

    def begin(self, service: str, method: str, request: Any, timeout_s: float) -> Any:
        """A call under way, without a further try: a grpc.Future, whose result() raises grpc.RpcError."""
        node = self.nodes.pick()
        stub = getattr(node.stubs(), service)
        return getattr(stub, method).future(request, timeout=timeout_s, metadata=node.metadata)

    def exists(self, collection: str) -> bool:
        """Whether the server has a collection. Raises StorageError."""
        request = q.CollectionExistsRequest(collection_name=collection)
        reply = self.call("collections", "CollectionExists", request, WRITE_TIMEOUT_S)
        return bool(reply.result.exists)

    def wait_for(self, collection: str) -> None:
        """Until every node in use finds a collection. Raises BackendMisconfigured when one is of another cluster.

        Each of its connections is asked: where a URL is that of a balancer, they may lead to different nodes.
        """
        self.nodes.require_one_cluster(collection)
        deadline = time.monotonic() + ADMIN_TIMEOUT_S
        for node in self.nodes.in_use or self.nodes.all:
            for stubs in node.pool:
                while not (node.away or self._finds(node, stubs, collection)):
                    if time.monotonic() > deadline:
                        raise BackendUnavailable(
                            f"a node of {self.options.where} ({node.target}) does not learn of {collection!r}; is the "
                            "cluster whole?"
                        )
                    time.sleep(_LOOK_S)

    def _finds(self, node: Node, stubs: Stubs, collection: str) -> bool:
        """Whether it is there; of several nodes one that does not answer is set aside."""
        request = q.GetCollectionInfoRequest(collection_name=collection)
        timeout_s = CONNECT_TIMEOUT_S if self.nodes.several else WRITE_TIMEOUT_S
        try:
            stubs.collections.Get(request, timeout=timeout_s, metadata=node.metadata)
        except grpc.RpcError as error:
            failure = failure_of(error)
            if self.nodes.several and failure.meaning in (Meaning.UNREACHABLE, Meaning.LATE):
                self.nodes.set_aside(node, f"it does not answer: {failure.text}")
            elif failure.meaning not in (Meaning.NOT_THERE, Meaning.PASSING):  # or not yet active
                raise error_of(failure, self.options, timeout_s, node.target) from error
            return False
        return True

    def close(self) -> None:
        """Closing twice is allowed."""
        self.nodes.close()

"""The stand-in as an object: a gRPC server on qdrant-client's own servicers, with Qdrant Edge behind it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent import futures
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from router_service.backends.qdrant_server.wire import q as pb
from tests.qdrant_standin.collections_service import CollectionsService
from tests.qdrant_standin.faults import Faults
from tests.qdrant_standin.gate import ApiKey, Gate
from tests.qdrant_standin.points_service import PointsService
from tests.qdrant_standin.rest import TITLE, RestServer
from tests.qdrant_standin.snapshots import Snapshots
from tests.qdrant_standin.snapshots_service import SnapshotsService
from tests.qdrant_standin.store import Optimizers, Store

# As many calls as a black hole may hold, and some.
_WORKERS = 64
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),  # a taken port is an error
    ("grpc.http2.max_ping_strikes", 0),  # the real server takes any number of pings
    ("grpc.keepalive_permit_without_calls", 1),
)


class QdrantStandIn:
    """Serves from __enter__ or start() to __exit__ or stop(), on the same port and directory each time."""

    # Of collections that name none; the real server's.
    indexing_threshold_kb = 10_000

    def __init__(
        self,
        directory: Path,
        port: int = 0,
        api_key: str | None = None,
        version: str = "1.20.0",
        certificate: tuple[bytes, bytes] | None = None,
        make_store: Callable[[Path], Any] = Store,
    ) -> None:
        """`certificate`: private key and chain in PEM, for https."""
        self._make_store = make_store
        self.directory, self.port, self._api_key = directory, port, api_key
        self._certificate = certificate
        self.faults = Faults(version)
        self.rest_port = 0
        self._store: Store | None = None
        self._running = ExitStack()
        self._grace_s: float | None = None

    def __enter__(self) -> QdrantStandIn:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """What clients are given."""
        return f"{self._scheme}://127.0.0.1:{self.port}"

    @property
    def rest_url(self) -> str:
        """The REST side, on the port before the other if that is free."""
        return f"{self._scheme}://127.0.0.1:{self.rest_port}"

    @property
    def _scheme(self) -> str:
        return "https" if self._certificate else "http"

    @property
    def optimizers(self) -> Optimizers:
        """The thread that indexes; pause() keeps collections yellow."""
        assert self._store is not None, "the stand-in is not running"
        return self._store.optimizers

    def blind(self, pattern: str) -> None:
        """See Faults.blind."""
        self.faults.blind(pattern)

    def start(self) -> None:
        """Serves. Raises RuntimeError when the port is taken."""
        assert self._store is None, "the stand-in is running"
        with ExitStack() as stack:
            store = self._make_store(self.directory)
            stack.callback(store.close)
            self._serve(store, stack)
            self._store, self._running = store, stack.pop_all()

    @property
    def running(self) -> bool:
        """Whether it serves."""
        return self._store is not None

    def stop(self, grace_s: float | None = None) -> None:
        """Lets calls end for so long, ends connections, lets go of the directory. Stopping twice is allowed."""
        self._grace_s = grace_s
        self._running.close()
        self._store = None

    def _serve(self, store: Store, stack: ExitStack) -> None:
        pool = stack.enter_context(futures.ThreadPoolExecutor(_WORKERS, "qdrant-standin"))
        key, snapshots = ApiKey(self._api_key), Snapshots(store)
        gate = Gate(key, self.faults)
        server = grpc.server(pool, interceptors=(gate,), options=_OPTIONS)
        stack.callback(lambda: server.stop(self._grace_s).wait())
        self._add_services(server, store, snapshots)
        self.port = self._bind(server)
        rest_port = self.rest_port or self.port - 1
        rest = RestServer(
            rest_port, snapshots, store.cluster_status, key, self.faults, self._certificate
        )
        stack.callback(rest.close)
        self.rest_port = rest.port
        server.start()

    def _add_services(self, server: grpc.Server, store: Store, snapshots: Snapshots) -> None:
        collections = CollectionsService(store, self.indexing_threshold_kb)
        pb.add_CollectionsServicer_to_server(collections, server)
        pb.add_PointsServicer_to_server(PointsService(store, self.faults), server)
        pb.add_SnapshotsServicer_to_server(SnapshotsService(snapshots), server)
        pb.add_QdrantServicer_to_server(_QdrantService(self.faults), server)
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)

    def _bind(self, server: grpc.Server) -> int:
        address = f"127.0.0.1:{self.port}"
        if self._certificate is None:
            return server.add_insecure_port(address)
        credentials = grpc.ssl_server_credentials([self._certificate])
        return server.add_secure_port(address, credentials)


class _QdrantService(pb.QdrantServicer):
    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def HealthCheck(self, request: pb.HealthCheckRequest, context: Any) -> Any:  # noqa: N802
        return pb.HealthCheckReply(title=TITLE, version=self._faults.version)

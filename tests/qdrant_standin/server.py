"""The stand-in as an object: a gRPC server on qdrant-client's own servicers, with Qdrant Edge behind it."""

from __future__ import annotations

from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import qdrant_client.grpc as pb
from grpc_health.v1 import health, health_pb2_grpc

from tests.qdrant_standin.collections_service import CollectionsService
from tests.qdrant_standin.faults import Faults
from tests.qdrant_standin.gate import Gate
from tests.qdrant_standin.points_service import PointsService
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
    ) -> None:
        """`certificate`: private key and chain in PEM, for https."""
        self.directory, self.port, self._api_key = directory, port, api_key
        self._certificate = certificate
        self.faults = Faults(version)
        self._server: grpc.Server | None = None
        self._store: Store | None = None

    def __enter__(self) -> QdrantStandIn:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """What clients are given."""
        scheme = "https" if self._certificate else "http"
        return f"{scheme}://127.0.0.1:{self.port}"

    @property
    def optimizers(self) -> Optimizers:
        """The thread that indexes; pause() keeps collections yellow."""
        assert self._store is not None, "the stand-in is not running"
        return self._store.optimizers

    def start(self) -> None:
        """Serves. Raises RuntimeError when the port is taken."""
        assert self._server is None, "the stand-in is running"
        self._store = Store(self.directory)
        pool = futures.ThreadPoolExecutor(_WORKERS, "qdrant-standin")
        gate = Gate(self._api_key, self.faults)
        server = grpc.server(pool, interceptors=(gate,), options=_OPTIONS)
        self._add_services(server, self._store)
        self.port = self._bind(server)
        server.start()
        self._server = server

    def stop(self) -> None:
        """Ends connections and lets go of the directory. Stopping twice is allowed."""
        if self._server is None or self._store is None:
            return
        self._server.stop(None).wait()
        self._store.close()
        self._server = self._store = None

    def _add_services(self, server: grpc.Server, store: Store) -> None:
        collections = CollectionsService(store, self.indexing_threshold_kb)
        pb.add_CollectionsServicer_to_server(collections, server)
        pb.add_PointsServicer_to_server(PointsService(store), server)
        pb.add_SnapshotsServicer_to_server(SnapshotsService(Snapshots(store)), server)
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
        title = "qdrant - vector search engine"
        return pb.HealthCheckReply(title=title, version=self._faults.version)

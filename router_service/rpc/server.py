"""Puts the service together and runs it until a signal: the composition root."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import re
import socket
import tempfile
import threading
from concurrent import futures
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from knnmoe.channels import message_size_options
from knnmoe.client.direct import SUFFIX
from knnmoe.v1 import doctor_pb2_grpc, memory_admin_pb2_grpc, routing_pb2_grpc
from knnmoe.v1.operations_pb2_grpc import add_OperationServiceServicer_to_server as add_operations
from knnmoe.v1.quantization_pb2_grpc import (
    add_QuantizationServiceServicer_to_server as add_quantization,
)
from knnmoe.v1.replication_pb2_grpc import (
    add_ReplicationServiceServicer_to_server as add_replication,
)
from knnmoe.v1.retention_pb2_grpc import add_RetentionServiceServicer_to_server as add_retention
from knnmoe.v1.snapshots_pb2_grpc import add_SnapshotServiceServicer_to_server as add_snapshots

from router_service.backends.base import Engines, Hosting, Hurried
from router_service.backends.disk import FreeSpace, storage_call
from router_service.errors import BackendUnavailable, EngineStopped, InvalidField, StorageError
from router_service.jobs.auto_optimizer import AutoOptimizer
from router_service.operations import Operations
from router_service.rpc.authority import Authority
from router_service.rpc.direct import DirectServer
from router_service.rpc.encryption import server_credentials
from router_service.rpc.interceptors import Guard
from router_service.rpc.memory_admin import DoctorService, MemoryAdminService
from router_service.rpc.operations import OperationService
from router_service.rpc.planes import Planes
from router_service.rpc.quantization import QuantizationService
from router_service.rpc.replication import ReplicationService
from router_service.rpc.retention import RetentionService
from router_service.rpc.routing import RoutingService
from router_service.rpc.snapshots import SnapshotService
from router_service.rpc.write_limits import WriteGuard
from router_service.settings import ServiceSettings
from router_service.storage import make_snapshot_store, make_store
from router_service.telemetry.http import Page, Pages
from router_service.telemetry.metrics import CONTENT_TYPE, Metrics, Service
from router_service.telemetry.readiness import Readiness
from router_service.telemetry.traces import Traces

log = logging.getLogger(__name__)

# How often calls are looked at whose message does not come.
LOOK_AT_WAITING_S = 1.0
# After drain_s: how often calls are cancelled that are still there.
CANCEL_AGAIN_S = 1.0
# How long the stop waits for cancelled operations; they look up a few times a second.
OPERATIONS_END_S = 30.0
# What the health service answers for; "" is the whole process.
_SERVICE_NAMES = (
    "Routing",
    "MemoryAdmin",
    "Operation",
    "Retention",
    "Snapshot",
    "Doctor",
    "Quantization",
    "Replication",
)
_SERVICES = ("", *(f"knnmoe.v1.{name}Service" for name in _SERVICE_NAMES))
_ROUTING = _SERVICES[1]


class _Health(health.HealthServicer):
    """With List, which grpcio-health-checking leaves out: it would end in a traceback."""

    def List(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """What Check says of each service."""
        messages: Any = health_pb2  # the stubs do not have this call
        return messages.HealthListResponse(
            statuses={
                name: self.Check(health_pb2.HealthCheckRequest(service=name), context)
                for name in _SERVICES
            }
        )


class RoutingServer:
    """A running service. `start` opens the memories and the address; `stop` drains, flushes and closes."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings = settings
        _check_address(settings)
        self._planes = Planes(settings.max_in_flight, settings.message_timeout_s)
        self._backend, self._store = make_store(settings)
        self._operations = Operations()
        self._authority = _authority(settings, self._operations)
        self._encryption = _encryption(settings)
        self._snapshots = make_snapshot_store(settings, self._backend, self._store)
        self._health = _Health()
        self._replication = ReplicationService(self._store)
        self._traces = None if settings.otlp is None else Traces(settings.otlp)
        self._routing = RoutingService(self._store, self._traces)
        self._direct = self._make_direct()
        self._grpc = self._make_server()
        self._stopping = threading.Event()
        self._auto_optimizer = AutoOptimizer(
            self._store, settings.optimize_above_mib << 20, self._operations.are_on
        )
        self._flusher = threading.Thread(target=self._flush_often, name="flush", daemon=True)
        self._waiting = threading.Thread(target=self._look_at_waiting, name="waiting", daemon=True)
        self._readiness, self._failed_flushes = Readiness.OPENING, 0
        self.address = settings.listen
        self._inside: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        """Raises StorageError when the data cannot be opened or the address is taken."""
        self._store.open_all()
        if risk := self._store.at_risk():
            log.warning("%s", risk)
        self._snapshots.sweep()
        self.address = self._bind()
        self._grpc.start()
        if self._direct is not None:
            self._direct.start()
        self._flusher.start()
        self._waiting.start()
        self._auto_optimizer.start()
        self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self._readiness = Readiness.READY
        names = ", ".join(self._store.names()) or "none yet"
        log.info("serving on %s; memories: %s", self.address, names)

    def for_own_clients(self) -> tuple[str, str | None]:
        """Where the page of --dashboard reaches the service, without TLS, and the token that it shows there."""
        token = self._authority.own_token() if self._authority.asks else None
        return (self.address if self._inside is None else f"unix:{self._inside.name}/s"), token

    def stop(self) -> None:
        """Refuses new calls, lets those in flight finish, flushes, closes."""
        self._stopping.set()
        self._readiness = Readiness.DRAINING
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._planes.close()
        self._operations.close()
        self._replication.stop()
        self._drain()
        self._authority.audit.close()
        if isinstance(self._backend, Hurried):
            self._backend.hurry()
        if not self._operations.join(OPERATIONS_END_S):
            log.warning("an operation does not end; closing the memories under it")
        self._auto_optimizer.stop()
        if self._flusher.is_alive():
            self._flusher.join()
        with closing(self._backend):
            self._store.close()
        if self._inside is not None:
            self._inside.cleanup()
        if self._traces is not None:
            self._traces.close()
        log.info("stopped")

    def pages(self) -> Pages:
        """What `--metrics` answers, from before start() until after stop()."""
        metrics = Metrics(self._watched())

        def readiness() -> Page:
            found = self._readiness
            return Page(200 if found is Readiness.READY else 503, f"{found}\n".encode())

        return {
            "/metrics": lambda: Page(200, metrics.text(), CONTENT_TYPE),
            "/livez": lambda: Page(200, b"alive\n"),
            "/readyz": readiness,
        }

    def _watched(self) -> Service:
        data, minimum = self.settings.data, self.settings.min_free_bytes
        return Service(
            self._store,
            self._operations,
            None if data is None else FreeSpace(data, minimum),
            lambda: self._readiness,
            self._engines,
            self._replication.copies,
            self._planes.at_work,
            self._planes.refused,
            lambda: self._failed_flushes,
        )

    def _drain(self) -> None:
        """Returns when no call is left: those that are still there after drain_s are cancelled."""
        stopped = self._grpc.stop(self.settings.drain_s)
        if self._direct is not None:
            self._direct.stop(self.settings.drain_s)
        patience_s = self.settings.drain_s + CANCEL_AGAIN_S
        # A connection that comes in just then can miss the cancellation, and would be waited for without end.
        while not stopped.wait(patience_s):
            self._grpc.stop(0)
            patience_s = CANCEL_AGAIN_S

    def _make_server(self) -> grpc.Server:
        server = grpc.server(
            futures.ThreadPoolExecutor(1),  # of no use: every call has a thread of its plane
            interceptors=[Guard(self._planes.of, self._authority)],
            options=[
                *message_size_options(self.settings.max_message_bytes),
                ("grpc.so_reuseport", 0),
            ],
        )
        routing_pb2_grpc.add_RoutingServiceServicer_to_server(self._routing, server)
        add_replication(self._replication, server)
        admin = MemoryAdminService(
            *(self._store, self._operations, self._planes, self._replication.copies),
            WriteGuard(self._authority.limits_of),
        )
        memory_admin_pb2_grpc.add_MemoryAdminServiceServicer_to_server(admin, server)
        doctor = DoctorService(self._store, self.settings.min_free_bytes)
        doctor_pb2_grpc.add_DoctorServiceServicer_to_server(doctor, server)
        quantization = QuantizationService(
            self._store, self._operations, self.settings.min_free_bytes
        )
        add_quantization(quantization, server)
        add_operations(OperationService(self._operations), server)
        add_retention(RetentionService(self._store, self._operations), server)
        add_snapshots(SnapshotService(self._snapshots, self._operations), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        return server

    def _make_direct(self) -> DirectServer | None:
        """Beside a Unix socket."""
        listen, most_bytes = self.settings.listen, self.settings.max_message_bytes
        if not listen.startswith("unix:"):
            return None
        path = listen.removeprefix("unix:")
        return DirectServer(
            *(path, self._planes.routing, self._routing.Route, most_bytes, self._authority),
            mode=int(self.settings.socket_mode, 8),
        )

    def _bind(self) -> str:
        listen = self.settings.listen
        if listen.startswith("unix:"):
            path = listen.removeprefix("unix:")
            for each in (path, path + SUFFIX):
                _require_free(Path(each))
        try:
            if self._encryption is None:
                port = self._grpc.add_insecure_port(listen)
            else:
                port = self._grpc.add_secure_port(listen, self._encryption)
        except RuntimeError as error:
            raise StorageError(
                f"cannot listen on {listen} (in use, or not an address of this machine); choose another --listen"
            ) from error
        if self._encryption is not None and self.settings.dashboard is not None:
            self._inside = tempfile.TemporaryDirectory(prefix="knnmoe-")  # its owner's alone
            self._grpc.add_insecure_port(f"unix:{self._inside.name}/s")
        if listen.startswith("unix:"):
            with storage_call(f"set --socket-mode of {listen}"):
                # All that limits who calls over it: gRPC does not say who is at the other end.
                Path(listen.removeprefix("unix:")).chmod(int(self.settings.socket_mode, 8))
            return listen
        return f"{listen.rpartition(':')[0]}:{port}"

    def _set_health(self, status: int) -> None:
        for service in _SERVICES:
            self._health.set(service, status)

    def _look_at_waiting(self) -> None:
        while not self._stopping.wait(LOOK_AT_WAITING_S):
            self._planes.end_overdue()
            self._authority.audit.look()

    def _flush_often(self) -> None:
        while not self._stopping.wait(self.settings.flush_interval_s):
            try:
                self._store.flush()
                self._store.refresh()
            except BackendUnavailable as error:
                log.warning("%s", error)
                self._failed_flushes += 1
                self._set_routing_ready(False)
                continue
            except (
                EngineStopped
            ) as error:  # its log holds every write, and its next call starts it again
                log.warning("%s", error)
            except StorageError:
                self._failed_flushes += 1
                log.exception(
                    "background flush failed; the write-ahead log still holds every write"
                )
            self._set_routing_ready(True)

    def _set_routing_ready(self, ready: bool) -> None:
        """Ready or not: the process itself stays healthy when only the server behind it is away."""
        serving, away = (
            health_pb2.HealthCheckResponse.SERVING,
            health_pb2.HealthCheckResponse.NOT_SERVING,
        )
        if not self._stopping.is_set():
            self._health.set(_ROUTING, serving if ready else away)
            self._readiness = Readiness.READY if ready else Readiness.BACKEND_AWAY

    def _engines(self) -> Engines:
        return self._backend.engines() if isinstance(self._backend, Hosting) else Engines(0, 0)


def _authority(settings: ServiceSettings, operations: Operations) -> Authority:
    """Raises InvalidField."""
    own = settings.listen.startswith("unix:") and not settings.others_connect
    return Authority(
        settings.tokens,
        lambda operation: operations.get(operation).memory,
        anyone=f"uid {os.getuid()}" if own else "",
    )


def _encryption(settings: ServiceSettings) -> grpc.ServerCredentials | None:
    """Raises InvalidField."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return server_credentials(settings.tls_cert, settings.tls_key, settings.tls_client_ca)


def _check_address(settings: ServiceSettings) -> None:
    """Raises InvalidField on a malformed address, or one that others reach without TLS, tokens or --insecure."""
    listen = settings.listen
    if not listen.startswith("unix:"):
        safe = settings.tls_cert is not None and settings.tokens is not None
        needed = f"{_LOOPBACK}, or --tls-cert, --tls-key and --tokens, or --insecure"
        host_and_port(
            "--listen", listen, "HOST:PORT or unix:PATH", settings.insecure or safe, needed
        )
        return
    _check_socket_path(listen.removeprefix("unix:"))
    if settings.tls_cert is not None:
        raise InvalidField("--tls-cert", settings.tls_cert, "HOST:PORT: a Unix socket needs no TLS")
    if settings.others_connect and settings.tokens is None and not settings.insecure:
        expected = "600, for the own user alone, or --tokens, or --insecure"
        raise InvalidField("--socket-mode", settings.socket_mode, expected)


_LOOPBACK = "a loopback address"


def host_and_port(
    option: str,
    address: str,
    expected: str,
    anywhere: bool,
    needed: str = f"{_LOOPBACK} (it asks nobody for a token), or --insecure",
) -> tuple[str, int]:
    """Of an address to listen on; `anywhere`: it need not be on this machine. Raises InvalidField."""
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65_535:
        raise InvalidField(option, address, expected)
    if not _is_loopback(host) and not anywhere:
        raise InvalidField(option, address, needed)
    return host, int(port)


def _require_free(path: Path) -> None:
    """Raises StorageError unless a Unix socket may be made here: its path is silently taken from whoever has it."""
    if path.exists() and not path.is_socket():
        raise StorageError(
            f"cannot listen on unix:{path}: it is no socket; choose another --listen"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        if probe.connect_ex(str(path)) in (0, errno.EAGAIN):  # EAGAIN: it takes no more
            raise StorageError(
                f"cannot listen on unix:{path}: another process does; choose another --listen"
            )


def _check_socket_path(path: str) -> None:
    if not 1 <= len(os.fsencode(path)) <= 100:
        raise InvalidField("--listen", f"unix:{path}", "unix:PATH with a path of 1 to 100 bytes")
    if not Path(path).absolute().parent.is_dir():
        raise InvalidField("--listen", f"unix:{path}", "a socket in a directory that exists")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

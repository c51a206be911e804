"""Calls of `router-admin`: a deadline on every reply, and errors that a user can act on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from knnmoe.channels import open_channel
from knnmoe.v1 import (
    doctor_pb2_grpc,
    memory_admin_pb2_grpc,
    operations_pb2_grpc,
    quantization_pb2_grpc,
    retention_pb2_grpc,
    snapshots_pb2_grpc,
)
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1 import routing_pb2 as routing_pb

from router_service.cli.errors import AdminError, ServiceRefused, admin_error

DEFAULT_TIMEOUT_S = 10.0
# Upsert requests on their way before the next acknowledgement is awaited.
WINDOW = 4
_NOT_FOUND = "ERROR_REASON_MEMORY_NOT_FOUND"


class AdminClient:
    """One channel to a service. timeout_s bounds the wait for each reply; None: 10 s, and no bound for long jobs."""

    def __init__(self, target: str, timeout_s: float | None = None) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self._channel = open_channel(target)
        self.admin = memory_admin_pb2_grpc.MemoryAdminServiceStub(self._channel)
        self.doctor = doctor_pb2_grpc.DoctorServiceStub(self._channel)
        self.quantization = quantization_pb2_grpc.QuantizationServiceStub(self._channel)
        self.operations = operations_pb2_grpc.OperationServiceStub(self._channel)
        self.retention = retention_pb2_grpc.RetentionServiceStub(self._channel)
        self.snapshots = snapshots_pb2_grpc.SnapshotServiceStub(self._channel)

    def at(self, target: str) -> AdminClient:
        """A client of another service, as patient as this one."""
        return AdminClient(target, self._timeout_s)

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def unary(self, call: Any, request: Any, *, long: bool = False) -> Any:
        """The reply to one request. Raises AdminError; `long` marks a job without a default deadline."""
        timeout_s = self._reply_timeout_s(long)
        with self._errors(timeout_s):
            return call(request, timeout=timeout_s)

    def replies(self, call: Any, *, long: bool = False) -> Generator[Any, None, None]:
        """The replies of a started streaming call, each within the deadline. Raises AdminError."""
        timeout_s = self._reply_timeout_s(long)
        try:
            while (reply := self._next(call, timeout_s)) is not None:
                yield reply
        finally:
            call.cancel()

    def upsert(self, requests: Iterable[pb.UpsertRequest]) -> Iterator[pb.UpsertResponse]:
        """One acknowledgement per request, in order; a few requests are on their way at a time. Raises AdminError."""
        outbox: queue.SimpleQueue[pb.UpsertRequest | None] = queue.SimpleQueue()
        call = self.admin.Upsert(iter(outbox.get, None))
        replies = self.replies(call)
        on_their_way = 0
        try:
            for request in requests:
                outbox.put(request)
                on_their_way += 1
                if on_their_way == WINDOW:
                    yield next(replies)
                    on_their_way -= 1
            outbox.put(None)
            yield from replies
        finally:
            outbox.put(None)
            replies.close()

    def memory(self, name: str) -> routing_pb.MemoryDescription:
        """What a memory is. Raises AdminError."""
        request = pb.DescribeMemoryRequest(memory=name)
        return self.unary(self.admin.DescribeMemory, request).memory

    def find_memory(self, name: str) -> routing_pb.MemoryDescription | None:
        """What a memory is; None when there is none of that name. Raises AdminError."""
        try:
            return self.memory(name)
        except ServiceRefused as error:
            if error.error.reason != _NOT_FOUND:
                raise
            return None

    def serving_status(self, service: str) -> str:
        """SERVING, NOT_SERVING or UNKNOWN, of a service's full name or of all ("")."""
        stub: Any = health_pb2_grpc.HealthStub(self._channel)
        reply = self.unary(stub.Check, health_pb2.HealthCheckRequest(service=service))
        return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)

    def _next(self, call: Any, timeout_s: float | None) -> Any:
        """The next reply or None; gRPC's own deadline would bound the whole stream."""
        clock = threading.Timer(timeout_s, call.cancel) if timeout_s is not None else None
        if clock is not None:
            clock.start()
        try:
            with self._errors(timeout_s):
                return next(call, None)
        finally:
            if clock is not None:
                clock.cancel()

    def _reply_timeout_s(self, long: bool) -> float | None:
        if self._timeout_s is None and not long:
            return DEFAULT_TIMEOUT_S
        return self._timeout_s

    @contextmanager
    def _errors(self, timeout_s: float | None) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as failed:
            error: AdminError = admin_error(failed, self.target, timeout_s)
            raise error from failed

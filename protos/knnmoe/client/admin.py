"""The admin plane's client: memories made, filled, counted, calibrated and looked after."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from knnmoe import tensors
from knnmoe.channels import open_channel
from knnmoe.client.calls import DuplexStream, Retries, replies, unary
from knnmoe.credentials import Credentials
from knnmoe.errors import (
    KindMismatch,
    MemoryNotFound,
    ModelMismatch,
    ServiceRefused,
    ServiceUnavailable,
)
from knnmoe.v1 import (
    doctor_pb2_grpc,
    memory_admin_pb2_grpc,
    operations_pb2,
    operations_pb2_grpc,
    quantization_pb2_grpc,
    retention_pb2_grpc,
    routing_pb2,
    snapshots_pb2_grpc,
    types_pb2,
)
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1.errors_pb2 import (
    ERROR_REASON_KIND_MISMATCH,
    ERROR_REASON_MODEL_MISMATCH,
    ErrorReason,
)

Reply = TypeVar("Reply")

DEFAULT_TIMEOUT_S = 10.0
# Making a memory opens a collection per layer; calibrating and indexing a layer read every key.
LONG_TIMEOUT_S = 600.0
# For so long what has no timeout is tried again.
REPEAT_S = 30.0
# Upsert requests on their way before the next acknowledgement is awaited.
UPSERTS_AHEAD = 4


class AdminClient:
    """One channel to a service's admin plane. Every failure raises a ServiceError.

    Calls by name that may be repeated are, inside their timeout: twice when the service is restarted meanwhile, and as
    long as it says when to try again. unary() and replies() take any call of a stub; unary() can repeat it.

    Args:
        target: `host:port` or `unix:PATH`.
        timeout_s: longest wait for each reply; None: 10 s, and no bound on long jobs of unary() and replies().
        credentials: those of the environment when not given.

    Raises BadCredentials.

    """

    def __init__(
        self,
        target: str,
        timeout_s: float | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self._credentials = credentials or Credentials.of_environment()
        self._retries = Retries(why=partial(self._credentials.mismatch, target))
        self._channel = open_channel(target, credentials=self._credentials)
        self.admin = memory_admin_pb2_grpc.MemoryAdminServiceStub(self._channel)
        self.doctor = doctor_pb2_grpc.DoctorServiceStub(self._channel)
        self.quantization = quantization_pb2_grpc.QuantizationServiceStub(self._channel)
        self.operations = operations_pb2_grpc.OperationServiceStub(self._channel)
        self.retention = retention_pb2_grpc.RetentionServiceStub(self._channel)
        self.snapshots = snapshots_pb2_grpc.SnapshotServiceStub(self._channel)

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def at(self, target: str) -> AdminClient:
        """A client of another service, as patient as this one."""
        return AdminClient(target, self._timeout_s, self._credentials)

    def close(self) -> None:
        """Ends the connection. Closing twice is allowed."""
        self._channel.close()

    def unary(
        self,
        call: Callable[..., Any],
        request: object,
        *,
        long: bool = False,
        repeat: bool = False,
    ) -> Any:
        """The reply to one request of a stub; `long` marks a job without a default timeout.

        `repeat`: it may be sent again, within 30 s when there is no timeout; what its reply counts is of the last try.
        """
        timeout_s = self._reply_timeout_s(long)
        if not repeat:
            return self._once(call, request, timeout_s)
        give_up_s = REPEAT_S if timeout_s is None else timeout_s

        def ask(left_s: float) -> Any:
            return unary(call, request, None if timeout_s is None else left_s, self.target)

        return self._retries.run(ask, give_up_s)

    def replies(self, call: Any, *, long: bool = False) -> Generator[Any, None, None]:
        """The replies of a started streaming call, each within the timeout."""
        return replies(call, self._reply_timeout_s(long), self.target)

    def serving_status(self, service: str) -> str:
        """SERVING, NOT_SERVING or UNKNOWN, of a service's full name or of all ("")."""
        stub: Any = health_pb2_grpc.HealthStub(self._channel)
        reply = self.unary(stub.Check, health_pb2.HealthCheckRequest(service=service))
        return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)

    def describe(self, name: str) -> routing_pb2.MemoryDescription:
        """What a memory is. Raises MemoryNotFound."""
        return self._repeated(
            self.admin.DescribeMemory, pb.DescribeMemoryRequest(memory=name)
        ).memory

    def find(self, name: str) -> routing_pb2.MemoryDescription | None:
        """What a memory is; None when there is none of that name."""
        try:
            return self.describe(name)
        except MemoryNotFound:
            return None

    def find_or_create(
        self,
        name: str,
        fingerprint: types_pb2.ModelFingerprint,
        settings: types_pb2.MemorySettings,
    ) -> routing_pb2.MemoryDescription:
        """The memory of that name; made when it is not there.

        Raises ModelMismatch or KindMismatch when it is there for another model or of another kind.
        """
        found = self.find(name)
        if found is None:
            return self._create(name, fingerprint, settings)
        require_same_model(found, fingerprint, self.target)
        if settings.HasField("kind") and found.settings.kind != settings.kind:
            raise KindMismatch(
                f"memory {name!r} holds another kind of values; choose another name",
                code=grpc.StatusCode.FAILED_PRECONDITION,
                reason=ErrorReason.Name(ERROR_REASON_KIND_MISMATCH),
                target=self.target,
            )
        return found

    def delete(self, name: str) -> int:
        """Removes a memory; returns the entries that it held. Not repeated: the second try would find no memory."""
        request = pb.DeleteMemoryRequest(memory=name)
        return int(self._once(self.admin.DeleteMemory, request, self._long_timeout_s).entries)

    def update_settings(
        self, name: str, settings: types_pb2.MemorySettings
    ) -> routing_pb2.MemoryDescription:
        """Changes how a memory is read."""
        request = pb.UpdateSettingsRequest(memory=name, settings=settings)
        return self._repeated(self.admin.UpdateSettings, request).memory

    def count(self, name: str, layer: int | None = None, ids: tensors.Array | None = None) -> int:
        """Entries of a memory or of one layer; with ids (u64 [n]), how many of these are there."""
        request = pb.CountRequest(memory=name, layer=layer)
        if ids is not None:
            request.ids.CopyFrom(tensors.to_tensor(ids))
        return int(self._repeated(self.admin.Count, request).total)

    def calibrate(
        self,
        name: str,
        lambda0: float,
        inputs: Mapping[int, types_pb2.Tensor] | None = None,
        *,
        quantile: float = 0.5,
        dry_run: bool = False,
        on_progress: Callable[[operations_pb2.Operation], None] | None = None,
    ) -> pb.CalibrateResponse:
        """Sets gamma per layer from router inputs [n, d] by layer, or (None) leave-one-example-out in the memory.

        on_progress: gets what the service is at, a few times a second, where it can say so.
        """
        if inputs is None and on_progress is not None:
            watched = pb.CalibrateWatchedRequest(
                memory=name, lambda0=lambda0, quantile=quantile, dry_run=dry_run
            )
            try:
                for reply in self.replies(self.admin.CalibrateWatched(watched), long=True):
                    on_progress(reply.operation)
                    if reply.HasField("calibration"):
                        return reply.calibration
            except ServiceUnavailable:
                pass  # the call below is repeated until it is answered
            except ServiceRefused as error:
                if error.code is not grpc.StatusCode.UNIMPLEMENTED:  # of an earlier version
                    raise
        request = pb.CalibrateRequest(
            memory=name, lambda0=lambda0, quantile=quantile, dry_run=dry_run
        )
        if inputs is None:
            return self._repeated(self.admin.Calibrate, request, self._long_timeout_s)
        response = pb.CalibrateResponse()
        for layer, rows in sorted(inputs.items()):  # every layer's in one message would be too much
            del request.inputs[:]
            request.inputs.add(layer=layer, router_inputs=rows)
            one = self._repeated(self.admin.Calibrate, request, self._long_timeout_s)
            response.layers.extend(one.layers)
            response.memory.CopyFrom(one.memory)
        return response

    def optimize(
        self, name: str, quantization: str = "", layers: Iterable[int] = ()
    ) -> list[routing_pb2.LayerDescription]:
        """Builds the indexes of layers side by side; returns them when all are done.

        `quantization`: e.g. "int8"; empty keeps each layer's own. `layers`: their numbers; none: all.
        """
        return sorted(self.optimizing(name, quantization, layers), key=lambda each: each.layer)

    def optimizing(
        self, name: str, quantization: str = "", layers: Iterable[int] = ()
    ) -> Iterator[routing_pb2.LayerDescription]:
        """As optimize(), each layer when it is done; ended before the last, the service ends it too."""
        request = pb.OptimizeRequest(memory=name, layers=layers, quantization=quantization)
        call = self.admin.Optimize(request)
        with closing(replies(call, self._long_timeout_s, self.target)) as found:
            for reply in found:
                if reply.HasField("layer"):
                    yield reply.layer

    def upserter(self) -> Upserter:
        """A stream of upserts; close it."""
        return Upserter(self.admin.Upsert, self.target, self._timeout, self._retries)

    def upsert(self, requests: Iterable[pb.UpsertRequest]) -> Iterator[pb.UpsertResponse]:
        """One acknowledgement per request, in order; a few requests are on their way at a time."""
        with self.upserter() as upserter:
            for request in requests:
                if (acknowledged := upserter.send(request)) is not None:
                    yield acknowledged
            while upserter.waiting:
                yield upserter.acknowledged()

    def _create(
        self,
        name: str,
        fingerprint: types_pb2.ModelFingerprint,
        settings: types_pb2.MemorySettings,
    ) -> routing_pb2.MemoryDescription:
        request = pb.CreateMemoryRequest(name=name, fingerprint=fingerprint, settings=settings)
        try:
            return self._once(self.admin.CreateMemory, request, self._long_timeout_s).memory
        except ServiceUnavailable:
            made = self.find(name)  # by this very call, when only its answer was lost
            if made is None:
                raise
            require_same_model(made, fingerprint, self.target)
            return made

    def _repeated(
        self, method: Callable[..., Reply], request: object, timeout_s: float | None = None
    ) -> Reply:
        call = partial(unary, method, request, target=self.target)
        return self._retries.run(call, self._timeout if timeout_s is None else timeout_s)

    def _once(
        self, method: Callable[..., Reply], request: object, timeout_s: float | None
    ) -> Reply:
        try:
            return unary(method, request, timeout_s, self.target)
        except ServiceUnavailable as error:
            left_s = REPEAT_S if timeout_s is None else timeout_s
            raise self._retries.explained(error, left_s) from None

    @property
    def _timeout(self) -> float:
        return DEFAULT_TIMEOUT_S if self._timeout_s is None else self._timeout_s

    @property
    def _long_timeout_s(self) -> float:
        return LONG_TIMEOUT_S if self._timeout_s is None else self._timeout_s

    def _reply_timeout_s(self, long: bool) -> float | None:
        return self._timeout_s if long else self._timeout


class Upserter:
    """Sends upserts ahead of their acknowledgements; `finish` waits for the rest.

    Ids make repeating a request harmless: after UNAVAILABLE, or Ctrl-C within a wait, the requests that nothing is
    known of go over a new stream.

    Args:
        method: the stub's Upsert.
        target: the service's address, for messages.
        timeout_s: longest wait for one acknowledgement, retries included.
        retries: of the channel.

    """

    def __init__(
        self, method: Callable[..., Any], target: str, timeout_s: float, retries: Retries
    ) -> None:
        self._method, self._target = method, target
        self._timeout_s, self._retries = timeout_s, retries
        self._stream: DuplexStream[pb.UpsertRequest, pb.UpsertResponse] | None = None
        self._open: deque[pb.UpsertRequest] = deque()

    def __enter__(self) -> Upserter:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop_stream()

    def send(self, request: pb.UpsertRequest) -> pb.UpsertResponse | None:
        """The next acknowledgement when enough requests are on their way, else None.

        Raises ServiceError, also for an earlier request.
        """
        self._open.append(request)
        if self._stream is None:
            self._send_again()
        else:
            self._stream.send(request)
        return self.acknowledged() if self.waiting > UPSERTS_AHEAD else None

    def finish(self) -> None:
        """Returns when every request is acknowledged; raises as send()."""
        while self.waiting:
            self.acknowledged()

    @property
    def waiting(self) -> int:
        """Requests that are not acknowledged yet."""
        return len(self._open)

    def acknowledged(self) -> pb.UpsertResponse:
        """Waits for the next acknowledgement; raises as send()."""
        response = self._retries.run(self._receive, self._timeout_s)
        self._open.popleft()
        return response

    def _receive(self, timeout_s: float) -> pb.UpsertResponse:
        stream = self._stream or self._send_again()
        try:
            return stream.receive(timeout_s)
        except BaseException:
            self._drop_stream()
            raise

    def _send_again(self) -> DuplexStream[pb.UpsertRequest, pb.UpsertResponse]:
        """A new stream with every open request on it."""
        self._stream = DuplexStream(self._method, self._target)
        for request in self._open:
            self._stream.send(request)
        return self._stream

    def _drop_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()


def require_same_model(
    memory: routing_pb2.MemoryDescription,
    fingerprint: types_pb2.ModelFingerprint,
    target: str = "",
) -> None:
    """Raises ModelMismatch, with the fields that differ, when the memory was made for another model."""
    differing = [
        f"{field.name}: memory {theirs!r}, this model {ours!r}"
        for field in fingerprint.DESCRIPTOR.fields
        if (theirs := getattr(memory.fingerprint, field.name))
        != (ours := getattr(fingerprint, field.name))
    ]
    if differing:
        raise ModelMismatch(
            f"memory {memory.name!r} was made for another model ({'; '.join(differing)})",
            code=grpc.StatusCode.FAILED_PRECONDITION,
            reason=ErrorReason.Name(ERROR_REASON_MODEL_MISMATCH),
            target=target,
        )

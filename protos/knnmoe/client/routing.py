"""The data plane's client: lookups in one memory, each over a stream that lives as long as it is of use."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import grpc

from knnmoe import tensors
from knnmoe.channels import open_channel
from knnmoe.client.calls import PAUSES_S, DuplexStream, Retries, Stream, StreamPool, unary
from knnmoe.client.direct import DirectStream
from knnmoe.credentials import Credentials
from knnmoe.errors import (
    ClientClosed,
    MemoryNotFound,
    ServiceRefused,
    ServiceUnavailable,
)
from knnmoe.tracing import span, traceparent
from knnmoe.v1 import routing_pb2 as pb
from knnmoe.v1 import types_pb2
from knnmoe.v1.routing_pb2_grpc import RoutingServiceStub

# Floats on their way: a NumPy array (f32 or f16), or packed already (bf16 too).
Floats = tensors.Array | types_pb2.Tensor


@dataclass(frozen=True, slots=True)
class ExampleRef:
    """An example (document, prompt) within a source."""

    source: str
    example: str


class RoutingClient:
    """Looks router inputs up in one memory of one service, from as many threads at once as there are.

    Each lookup has a stream to itself until it is answered. What fails with UNAVAILABLE is tried again at most twice
    inside the timeout, once a service has answered.

    Args:
        target: `host:port` or `unix:PATH`.
        memory: its name.
        fingerprint: of the client's model; a memory of another model is refused.
        pauses_s: before each retry; (0, 0) retries at once.
        connect_timeout_s: longest wait of describe(), which may have to connect first.
        credentials: those of the environment when not given.

    Raises BadCredentials.

    """

    def __init__(
        self,
        target: str,
        memory: str,
        fingerprint: types_pb2.ModelFingerprint,
        *,
        pauses_s: tuple[float, ...] = PAUSES_S,
        connect_timeout_s: float = 10.0,
        credentials: Credentials | None = None,
    ) -> None:
        self.target, self.memory = target, memory
        self._fingerprint, self._connect_timeout_s = fingerprint, connect_timeout_s
        self._credentials = credentials or Credentials.of_environment()
        self._channel = open_channel(target, credentials=self._credentials)
        self._stub = RoutingServiceStub(self._channel)
        self._retries = Retries(pauses_s, why=partial(self._credentials.mismatch, target))
        self._streams: StreamPool[pb.RouteRequest, pb.RouteResponse] = StreamPool(self._open_stream)
        self._description: pb.MemoryDescription | None = None
        self._request_ids = itertools.count(1)
        self._closed = False
        self._process = os.getpid()

    def __enter__(self) -> RoutingClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe(self, timeout_s: float | None = None) -> pb.MemoryDescription:
        """The memory, as it was when first asked for; asked for again once it was found to be gone.

        timeout_s stands in for connect_timeout_s.

        Raises ModelMismatch when it was made for another model, MemoryNotFound, ServiceUnavailable, ClientClosed.
        """
        found = self._description
        if found is None:
            request = pb.DescribeRequest(memory=self.memory, fingerprint=self._fingerprint)
            ask = partial(unary, self._stub.Describe, request, target=self.target)
            with self._in_use():
                found = self._retries.run(
                    ask, self._connect_timeout_s if timeout_s is None else timeout_s
                ).memory
            self._description = found
        return found

    def route(
        self,
        layer: int,
        router_inputs: Floats,
        own: types_pb2.SparseAssignment | Floats,
        *,
        timeout_s: float,
        exclude: Sequence[ExampleRef] = (),
        neighbours: int | None = None,
        with_neighbours: bool = False,
    ) -> pb.RouteResponse:
        """Blends T tokens: router_inputs [T, d]; own: logits [T, N] or an assignment [T, k], as the memory needs.

        exclude: entries of these examples are not read (one for all tokens, or one per token). neighbours stands in for
        the memory's K. timeout_s bounds all of it: finding the service, connecting, describing the memory, retries. The
        service hears how much of it is left, and does not begin what has expired. Raises ServiceError.
        """
        give_up_s = time.monotonic() + timeout_s
        described = self._description
        if described is None:
            described = self.describe(timeout_s)
            timeout_s = give_up_s - time.monotonic()
        request = pb.RouteRequest(
            memory=self.memory,
            layer=layer,
            model_digest=described.model_digest,
            router_inputs=packed(router_inputs),
            with_neighbours=with_neighbours,
            exclude=[pb.ExampleRef(source=e.source, example=e.example) for e in exclude],
            request_id=next(self._request_ids),
            neighbours=neighbours,
        )
        if isinstance(own, types_pb2.SparseAssignment):
            request.assignment.CopyFrom(own)
        else:
            request.router_logits.CopyFrom(packed(own))
        with self._in_use(), span("lookup", memory=self.memory, layer=layer):
            request.traceparent = traceparent()
            try:
                return self._retries.run(partial(self._exchange, request), timeout_s)
            except MemoryNotFound:
                self._description = None  # what comes back under its name may be another
                raise

    def close(self) -> None:
        """Ends the streams and the connection; lookups on their way raise ClientClosed. Closing twice is allowed."""
        self._closed = True
        if os.getpid() == self._process:
            self._streams.close()
            self._channel.close()

    def _open_stream(self) -> Stream[pb.RouteRequest, pb.RouteResponse]:
        direct = DirectStream.connected(self.target, self._credentials.token())
        return direct or DuplexStream(self._stub.RouteStream, self.target)

    def _exchange(self, request: pb.RouteRequest, timeout_s: float) -> pb.RouteResponse:
        request.timeout_us = max(1, int(timeout_s * 1e6))
        try:
            with self._streams.stream() as stream:
                stream.send(request)
                response = stream.receive(max(0.0, timeout_s))
                self._require_own(request, response)
        except ServiceUnavailable as error:
            if error.passing:
                self._streams.close_idle()
            raise
        except ServiceRefused as error:
            if error.code is grpc.StatusCode.UNAUTHENTICATED:
                self._streams.close_idle()  # they have the same token
            raise
        return response

    def _require_own(self, request: pb.RouteRequest, response: pb.RouteResponse) -> None:
        if response.request_id != request.request_id:
            raise ServiceUnavailable(
                f"request {request.request_id} got the answer to request {response.request_id}",
                code=grpc.StatusCode.INTERNAL,
                target=self.target,
            )

    def require_usable(self) -> None:
        """Raises ClientClosed after close(), and in a process that was forked from the client's."""
        if os.getpid() != self._process:
            raise ClientClosed(
                f"this client was made in process {self._process}, and does not work in process {os.getpid()} that was "
                "forked from it: make one in each process",
                target=self.target,
            )
        if self._closed:
            raise self._was_closed()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Around a call: what the closing of the client cuts off raises ClientClosed."""
        self.require_usable()
        try:
            yield
        except (ServiceUnavailable, ValueError) as error:  # ValueError: gRPC's, of a closed channel
            if not self._closed:
                raise
            raise self._was_closed() from error

    def _was_closed(self) -> ClientClosed:
        return ClientClosed(
            "this client was closed; close it when the threads that use it have ended",
            target=self.target,
        )


def packed(floats: Floats) -> types_pb2.Tensor:
    """Floats as they travel."""
    return floats if isinstance(floats, types_pb2.Tensor) else tensors.to_tensor(floats)

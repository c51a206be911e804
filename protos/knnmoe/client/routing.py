"""The data plane's client: lookups in one memory, over one stream for as long as it lives."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import grpc

from knnmoe import tensors
from knnmoe.channels import open_channel
from knnmoe.client.calls import PAUSES_S, DuplexStream, Retries, unary
from knnmoe.client.errors import ServiceUnavailable
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
    """Looks router inputs up in one memory of one service. Not for several threads at once.

    What fails with UNAVAILABLE is tried again at most twice inside the timeout, once a service has answered.

    Args:
        target: `host:port` or `unix:PATH`.
        memory: its name.
        fingerprint: of the client's model; a memory of another model is refused.
        pauses_s: before each retry; (0, 0) retries at once.
        connect_timeout_s: for describe(), and for the first lookup over a connection if that is longer than its own.

    """

    def __init__(
        self,
        target: str,
        memory: str,
        fingerprint: types_pb2.ModelFingerprint,
        *,
        pauses_s: tuple[float, ...] = PAUSES_S,
        connect_timeout_s: float = 10.0,
    ) -> None:
        self.target, self.memory = target, memory
        self._fingerprint, self._connect_timeout_s = fingerprint, connect_timeout_s
        self._channel = open_channel(target)
        self._stub = RoutingServiceStub(self._channel)
        self._retries = Retries(pauses_s)
        self._stream: DuplexStream[pb.RouteRequest, pb.RouteResponse] | None = None
        self._description: pb.MemoryDescription | None = None
        self._sent = 0
        self._connected = False
        self._closing = threading.Lock()

    def __enter__(self) -> RoutingClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe(self) -> pb.MemoryDescription:
        """The memory, as it was when first asked for.

        Raises ModelMismatch when it was made for another model, MemoryNotFound, ServiceUnavailable.
        """
        if self._description is None:
            request = pb.DescribeRequest(memory=self.memory, fingerprint=self._fingerprint)
            ask = partial(unary, self._stub.Describe, request, target=self.target)
            self._description = self._retries.run(ask, self._connect_timeout_s).memory
        return self._description

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
        the memory's K. The service hears how much of timeout_s is left, and does not begin what has expired.
        Raises ServiceError.
        """
        self._sent += 1
        request = pb.RouteRequest(
            memory=self.memory,
            layer=layer,
            model_digest=self.describe().model_digest,
            router_inputs=packed(router_inputs),
            with_neighbours=with_neighbours,
            exclude=[pb.ExampleRef(source=e.source, example=e.example) for e in exclude],
            request_id=self._sent,
            neighbours=neighbours,
        )
        if isinstance(own, types_pb2.SparseAssignment):
            request.assignment.CopyFrom(own)
        else:
            request.router_logits.CopyFrom(packed(own))
        if not self._connected:
            timeout_s = max(timeout_s, self._connect_timeout_s)
        return self._retries.run(partial(self._exchange, request), timeout_s)

    def close(self) -> None:
        """Ends the stream and the connection. Closing twice is allowed."""
        self._drop_stream()
        self._channel.close()

    def _exchange(self, request: pb.RouteRequest, timeout_s: float) -> pb.RouteResponse:
        request.timeout_us = max(1, int(timeout_s * 1e6))
        if self._stream is None:
            self._stream = DuplexStream(self._stub.RouteStream, self.target)
        try:
            self._stream.send(request)
            response = self._stream.receive(timeout_s)
            self._require_own(request, response)
        except BaseException as error:  # Ctrl-C too: what was asked would answer the next request
            self._drop_stream()
            if isinstance(error, ServiceUnavailable) and error.cause != "deadline":
                self._connected = False
            raise
        self._connected = True
        return response

    def _require_own(self, request: pb.RouteRequest, response: pb.RouteResponse) -> None:
        if response.request_id != request.request_id:
            raise ServiceUnavailable(
                f"request {request.request_id} got the answer to request {response.request_id}; is one client used by "
                "several threads at once?",
                code=grpc.StatusCode.INTERNAL,
                target=self.target,
            )

    def _drop_stream(self) -> None:
        with self._closing:
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()


def packed(floats: Floats) -> types_pb2.Tensor:
    """Floats as they travel."""
    return floats if isinstance(floats, types_pb2.Tensor) else tensors.to_tensor(floats)

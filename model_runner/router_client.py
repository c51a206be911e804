"""The runner's client of a routing sidecar: describe, route, and what to do when the sidecar fails."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from functools import partial

import grpc
from knnmoe.channels import open_channel
from knnmoe.v1 import routing_pb2 as pb
from knnmoe.v1 import types_pb2
from knnmoe.v1.routing_pb2_grpc import RoutingServiceStub
from torch import Tensor

from model_runner.architectures import Assignment
from model_runner.circuit_breaker import CircuitBreaker
from model_runner.duplex_stream import DuplexStream
from model_runner.errors import RoutingUnavailable
from model_runner.fingerprint import ModelFingerprint
from model_runner.retries import NO_PAUSES_S, PAUSES_S, Retries
from model_runner.rpc_errors import DEADLINE, runner_error
from model_runner.texts import ExampleRef
from model_runner.wire import encode_assignment, encode_fingerprint, encode_floats

log = logging.getLogger(__name__)

WARN_EVERY_S = 30.0
# A connection may take longer than a lookup; text that is being generated waits less long than a score.
CONNECT_TIMEOUT_S = {"fall_back": 0.5, "raise": 10.0}
# A prompt's tokens are looked up in one go, at about a millisecond each in a large memory.
TIMEOUT_S_PER_MORE_TOKEN = 0.002


class OnError(StrEnum):
    """What a lookup that fails does."""

    FALL_BACK = "fall_back"  # the model's own router stands; counted, warned about once in a while
    RAISE = "raise"  # evaluation and building: scores never mix silently


class RouterClient:
    """Looks router inputs up in one memory of one sidecar. Not for several threads at once.

    What fails with UNAVAILABLE is tried again at most twice inside the deadline: at once when on_error is FALL_BACK,
    after a pause when it is RAISE.

    timeout_s bounds the lookup of one token; further ones add TIMEOUT_S_PER_MORE_TOKEN each, and the first lookup
    over a connection may take CONNECT_TIMEOUT_S.
    """

    def __init__(
        self,
        target: str,
        memory: str,
        fingerprint: ModelFingerprint,
        *,
        timeout_s: float = 0.05,
        on_error: OnError = OnError.FALL_BACK,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        self.target, self.memory = target, memory
        self.on_error, self.timeout_s = on_error, timeout_s
        # Lookups that fell back, by layer and reason.
        self.fallbacks: Counter[tuple[int, str]] = Counter()
        self._fingerprint = fingerprint
        self._digest = fingerprint.digest()
        self._channel = open_channel(target)
        self._connect_timeout_s = CONNECT_TIMEOUT_S[on_error.value]
        pauses_s = NO_PAUSES_S if on_error is OnError.FALL_BACK else PAUSES_S
        self._retries = Retries(pauses_s)
        self._breaker = breaker or CircuitBreaker()
        self._stream: DuplexStream[pb.RouteRequest, pb.RouteResponse] | None = None
        self._description: pb.MemoryDescription | None = None
        self._warned_s = float("-inf")
        self._sent = 0
        self._connected = False
        self._closing = threading.Lock()

    def __enter__(self) -> RouterClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe(self) -> pb.MemoryDescription:
        """The memory, as it was when first asked for.

        Raises ModelMismatch when it was made for another model, RoutingRefused (no such memory), RoutingUnavailable.
        """
        if self._description is None:
            self._description = self._retries.run(self._describe, self._connect_timeout_s)
        return self._description

    @property
    def wants_logits(self) -> bool:
        """Whether the memory blends router logits rather than assignments. Raises as describe()."""
        return self.describe().settings.kind == types_pb2.MEMORY_KIND_LOGIT_DELTA

    def route(
        self,
        layer: int,
        router_input: Tensor,
        router_logits: Tensor,
        own: Assignment,
        *,
        exclude: Sequence[ExampleRef] = (),
        with_neighbours: bool = False,
        neighbours: int | None = None,
    ) -> pb.RouteResponse | None:
        """Looks up T tokens: router_input [T, d], logits [T, N], own assignment [T, k].

        neighbours stands in for the memory's K. None when the sidecar failed and on_error is FALL_BACK. A refusal
        (wrong model, bad request) always raises.
        """
        look_up = partial(
            self._look_up, layer, router_input, router_logits, own, exclude, with_neighbours
        )
        if self.on_error is OnError.RAISE:
            return look_up(neighbours)
        if not self._breaker.allows():
            self.fallbacks[layer, "breaker_open"] += 1
            return None
        try:
            response = look_up(neighbours)
        except RoutingUnavailable as error:
            self._breaker.failed()
            self._fell_back(layer, error)
            return None
        self._breaker.succeeded()
        return response

    def close(self) -> None:
        """Ends the stream and the connection. Closing twice is allowed."""
        self._drop_stream()
        self._channel.close()

    def _describe(self, timeout_s: float) -> pb.MemoryDescription:
        request = pb.DescribeRequest(
            memory=self.memory, fingerprint=encode_fingerprint(self._fingerprint)
        )
        try:
            stub = RoutingServiceStub(self._channel)
            return stub.Describe(request, timeout=timeout_s).memory
        except grpc.RpcError as error:
            raise runner_error(error, self.target) from error

    def _look_up(
        self,
        layer: int,
        router_input: Tensor,
        router_logits: Tensor,
        own: Assignment,
        exclude: Sequence[ExampleRef],
        with_neighbours: bool,
        neighbours: int | None,
    ) -> pb.RouteResponse:
        wants_logits = self.wants_logits
        self._sent += 1
        request = pb.RouteRequest(
            memory=self.memory,
            layer=layer,
            model_digest=self._digest,
            router_inputs=encode_floats(router_input),
            with_neighbours=with_neighbours,
            exclude=[pb.ExampleRef(source=e.source, example=e.example) for e in exclude],
            request_id=self._sent,
            neighbours=neighbours,
        )
        if wants_logits:
            request.router_logits.CopyFrom(encode_floats(router_logits))
        else:
            request.assignment.CopyFrom(encode_assignment(own))
        return self._over_stream(request, len(router_input))

    def _over_stream(self, request: pb.RouteRequest, tokens: int) -> pb.RouteResponse:
        timeout_s = self.timeout_s + TIMEOUT_S_PER_MORE_TOKEN * (tokens - 1)
        if not self._connected:
            timeout_s = max(timeout_s, self._connect_timeout_s)
        return self._retries.run(partial(self._exchange, request), timeout_s)

    def _exchange(self, request: pb.RouteRequest, timeout_s: float) -> pb.RouteResponse:
        if self._stream is None:
            self._stream = DuplexStream(RoutingServiceStub(self._channel).RouteStream, self.target)
        try:
            response = self._stream.exchange(request, timeout_s)
        except BaseException as error:  # Ctrl-C too: what was asked would answer the next request
            self._drop_stream()
            if isinstance(error, RoutingUnavailable) and error.reason != DEADLINE:
                self._connected = False
            raise
        self._connected = True
        return response

    def _drop_stream(self) -> None:
        with self._closing:
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _fell_back(self, layer: int, error: RoutingUnavailable) -> None:
        self.fallbacks[layer, error.reason] += 1
        now_s = time.monotonic()
        if now_s - self._warned_s >= WARN_EVERY_S:
            self._warned_s = now_s
            log.warning("routing memory unavailable, the model's own router stands: %s", error)

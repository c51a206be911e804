"""The data plane's handlers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import grpc
from knnmoe.v1 import routing_pb2 as pb
from knnmoe.v1 import routing_pb2_grpc

from router_service.arrays import Provenance
from router_service.memories.counters import LayerCounters
from router_service.memories.layer import RouteAnswer
from router_service.memories.memory import RoutingMemory
from router_service.rpc.codec import (
    decode_fingerprint,
    decode_query,
    encode_answer,
    encode_described,
    encode_neighbours,
)
from router_service.telemetry.traces import Traces

log = logging.getLogger(__name__)

T = TypeVar("T")


class Memories(Protocol):
    """Where the data plane finds memories."""

    def get(self, name: str) -> RoutingMemory:
        """Raises MemoryNotFound, or CorruptMemory for one that was set aside."""
        ...

    def asked(self, name: str, ask: Callable[[RoutingMemory], T]) -> T:
        """What `ask` gets of a memory, or of the one that has come into its place while it was asked.

        Raises as get(), and what `ask` raises.
        """
        ...


class RoutingService(routing_pb2_grpc.RoutingServiceServicer):
    """Describe, Route, RouteStream."""

    def __init__(self, memories: Memories, traces: Traces | None = None) -> None:
        self._memories, self._traces = memories, traces

    def Describe(  # noqa: N802
        self, request: pb.DescribeRequest, context: grpc.ServicerContext
    ) -> pb.DescribeResponse:
        """A memory's identity, settings and counts; refuses another model's client."""

        def describe(memory: RoutingMemory) -> pb.DescribeResponse:
            if request.HasField("fingerprint"):
                client = decode_fingerprint(request.fingerprint)
                memory.record.fingerprint.require_same(client, memory.record.name)
            return encode_described(memory)

        return self._memories.asked(request.memory, describe)

    def Route(self, request: pb.RouteRequest, context: grpc.ServicerContext) -> pb.RouteResponse:  # noqa: N802
        """Blends one layer's tokens."""
        return self._route(request, context)

    def RouteStream(  # noqa: N802
        self, request_iterator: Iterator[pb.RouteRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.RouteResponse]:
        """Blends one request after the other."""
        for request in request_iterator:
            yield self._route(request, context)

    def _route(self, request: pb.RouteRequest, context: grpc.ServicerContext) -> pb.RouteResponse:
        if self._traces is None or not request.traceparent:
            return self._looked_up(request, context)
        with self._traces.lookup(request) as add_stages:
            response = self._looked_up(request, context)
            add_stages(response.times)
            return response

    def _looked_up(
        self, request: pb.RouteRequest, context: grpc.ServicerContext
    ) -> pb.RouteResponse:
        deadline = _deadline(request, context)
        started = time.perf_counter_ns()
        # A name that is not there is said before what else is wrong
        self._memories.get(request.memory)
        query = decode_query(request, deadline, lambda: not context.is_active())
        decoded = time.perf_counter_ns()

        def route(
            memory: RoutingMemory,
        ) -> tuple[LayerCounters, RouteAnswer, dict[int, Provenance]]:
            answer = memory.route(request.layer, request.model_digest, query)
            layer = memory.layer(request.layer)
            ids = answer.neighbours.ids if request.with_neighbours else None
            return layer.counters, answer, {} if ids is None else layer.provenance_of(ids)

        counters, answer, origins = self._memories.asked(request.memory, route)
        answered = time.perf_counter_ns()
        response = encode_answer(request, answer)
        if request.with_neighbours:
            response.neighbours.CopyFrom(encode_neighbours(answer, origins))
        response.times.decode_ns = decoded - started
        response.times.encode_ns = time.perf_counter_ns() - answered
        times = response.times
        counters.add_durations(times.decode_ns, times.search_ns, times.blend_ns, times.encode_ns)
        if log.isEnabledFor(logging.DEBUG):
            took_us = (time.perf_counter_ns() - started) // 1000
            log.debug("looked up %d tokens in %d us", len(answer.lambdas), took_us)
        return response


def _deadline(request: pb.RouteRequest, context: grpc.ServicerContext) -> float | None:
    """Until when an answer is of use, in time.monotonic(): the call's deadline or the message's, whichever is first.

    A message counts from when the handler gets it: the clocks of both machines need not agree.
    """
    left_s = [] if (call_s := context.time_remaining()) is None else [call_s]
    if request.timeout_us:
        left_s.append(request.timeout_us / 1e6)
    return time.monotonic() + min(left_s) if left_s else None

"""The data plane's handlers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import grpc
from knnmoe.v1 import routing_pb2 as pb
from knnmoe.v1 import routing_pb2_grpc

from router_service.errors import DeadlineTooShort
from router_service.memories.store import MemoryStore
from router_service.rpc import codec


class RoutingService(routing_pb2_grpc.RoutingServiceServicer):
    """Describe, Route, RouteStream."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    def Describe(  # noqa: N802
        self, request: pb.DescribeRequest, context: grpc.ServicerContext
    ) -> pb.DescribeResponse:
        """A memory's identity, settings and counts; refuses another model's client."""
        memory = self._store.get(request.memory)
        if request.HasField("fingerprint"):
            memory.record.fingerprint.require_same(codec.decode_fingerprint(request.fingerprint))
        return codec.encode_described(memory)

    def Route(self, request: pb.RouteRequest, context: grpc.ServicerContext) -> pb.RouteResponse:  # noqa: N802
        """Blends one layer's tokens."""
        remaining = context.time_remaining()
        if remaining is not None and remaining <= 0:
            raise DeadlineTooShort("the deadline passed before the lookup began")
        return self._route(request, None if remaining is None else time.monotonic() + remaining)

    def RouteStream(  # noqa: N802
        self, request_iterator: Iterator[pb.RouteRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.RouteResponse]:
        """Blends one request after the other."""
        for request in request_iterator:
            yield self._route(request)

    def _route(self, request: pb.RouteRequest, deadline: float | None = None) -> pb.RouteResponse:
        started = time.perf_counter_ns()
        memory = self._store.get(request.memory)
        query = replace(codec.decode_query(request), deadline=deadline)
        decoded = time.perf_counter_ns()
        answer = memory.route(request.layer, request.model_digest, query)
        answered = time.perf_counter_ns()
        response = codec.encode_answer(request, answer, memory.version)
        if request.with_neighbours:
            origins = memory.layer(request.layer).provenance_of(answer.neighbours.ids)
            response.neighbours.CopyFrom(codec.encode_neighbours(answer, origins))
        response.times.decode_ns = decoded - started
        response.times.encode_ns = time.perf_counter_ns() - answered
        return response

"""Operations on the wire: their handlers, and how a long call streams one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, TypeVar

import grpc
from knnmoe.v1 import operations_pb2 as pb
from knnmoe.v1 import operations_pb2_grpc

from router_service.operations import Operation, Operations, State, Steps
from router_service.rpc.codec import filled

_STATES = {
    State.RUNNING: pb.OPERATION_STATE_RUNNING,
    State.DONE: pb.OPERATION_STATE_DONE,
    State.FAILED: pb.OPERATION_STATE_FAILED,
    State.CANCELLED: pb.OPERATION_STATE_CANCELLED,
}

T = TypeVar("T")
R = TypeVar("R")


class OperationService(operations_pb2_grpc.OperationServiceServicer):
    """List, get, cancel."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    def ListOperations(  # noqa: N802
        self, request: pb.ListOperationsRequest, context: grpc.ServicerContext
    ) -> pb.ListOperationsResponse:
        """Those that run and the last that ended."""
        found = self._operations.list(request.memory)
        return pb.ListOperationsResponse(operations=map(encode_operation, found))

    def GetOperation(  # noqa: N802
        self, request: pb.GetOperationRequest, context: grpc.ServicerContext
    ) -> pb.GetOperationResponse:
        """One operation."""
        return pb.GetOperationResponse(operation=encode_operation(self._operations.get(request.id)))

    def CancelOperation(  # noqa: N802
        self, request: pb.CancelOperationRequest, context: grpc.ServicerContext
    ) -> pb.CancelOperationResponse:
        """Asks one to end."""
        operation = self._operations.cancel(request.id)
        return pb.CancelOperationResponse(operation=encode_operation(operation))


def encode_operation(operation: Operation) -> pb.Operation:
    """One operation at one moment; times in milliseconds since the epoch."""
    return filled(pb.Operation, operation, state=_STATES[operation.state])


def encoded(
    steps: Steps[T], response: Callable[..., R], encode: Callable[[T], dict[str, Any]]
) -> Iterator[R]:
    """A response per step of Operations.run(): always the operation, and the fields that `encode` makes of a result."""
    with closing(steps):
        for operation, result in steps:
            fields = {} if result is None else encode(result)
            yield response(operation=encode_operation(operation), **fields)

"""What the tests of bad requests share: two filled memories, changes to valid requests, the shape of an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from grpc import StatusCode
from knnmoe import channels, tensors
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import routing_pb2 as routing_pb

from tests.sidecar import (
    ASSIGNMENT,
    CALL_TIMEOUT_S,
    EXPERTS,
    LOGIT_DELTA,
    Sidecar,
    random_assignments,
    random_entries,
    random_keys,
    route_request,
)

TOKENS = 4
INVALID, PRECONDITION = StatusCode.INVALID_ARGUMENT, StatusCode.FAILED_PRECONDITION


class Case(NamedTuple):
    """A change to a valid request and the words of the error: the field, the value, the expectation."""

    change: Callable[[Any], object]
    code: StatusCode
    reason: str
    words: tuple[str, ...]


class Memories(NamedTuple):
    """Two memories of the same model, one of each kind, with 20 entries in layer 0."""

    sidecar: Sidecar
    digest: str

    def route(self, kind: int = LOGIT_DELTA) -> routing_pb.RouteRequest:
        """A valid lookup."""
        rng = np.random.default_rng(kind)
        own = (
            random_keys(rng, TOKENS, EXPERTS)
            if kind == LOGIT_DELTA
            else random_assignments(rng, TOKENS)
        )
        return route_request(memory_name(kind), self.digest, random_keys(rng, TOKENS), own)

    def upsert(self, kind: int = LOGIT_DELTA) -> admin_pb.UpsertRequest:
        """A valid write of new entries."""
        return admin_pb.UpsertRequest(
            memory=memory_name(kind),
            entries=random_entries(kind, TOKENS, seed=5, first_id=1000),
            model_digest=self.digest,
        )

    def assert_answering(self) -> None:
        """Both memories route."""
        for kind in (ASSIGNMENT, LOGIT_DELTA):
            assert self.sidecar.route(self.route(kind)).HasField("lambdas")

    def state(self) -> list[routing_pb.MemoryDescription]:
        """Counts, settings and versions of everything."""
        request = admin_pb.ListMemoriesRequest()
        return list(self.sidecar.admin.ListMemories(request, timeout=CALL_TIMEOUT_S).memories)


def memory_name(kind: int) -> str:
    return "deltas" if kind == LOGIT_DELTA else "assignments"


def assert_refused(error: channels.ServiceError, case: Case) -> None:
    assert error.code is case.code, error
    assert error.reason == f"ERROR_REASON_{case.reason}", error
    for word in case.words:
        assert word in error.message, error
    if "field" in error.metadata:
        assert error.metadata["field"] in error.message
        assert error.violations[error.metadata["field"]]


def spoil(value: float, field: str = "router_inputs") -> Callable[[Any], None]:
    def change(request: Any) -> None:
        tensor = getattr(request, field)
        array = tensors.to_array(tensor).copy()
        array[2, 3] = value
        tensor.CopyFrom(tensors.to_tensor(array))

    return change


def set_fields(**fields: Any) -> Callable[[Any], None]:
    def change(request: Any) -> None:
        for name, value in fields.items():
            setattr(request, name, value)

    return change


def params(cases: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases.values(), ids=list(cases))


def fill(sidecar: Sidecar) -> Memories:
    """Makes the two memories."""
    for kind in (ASSIGNMENT, LOGIT_DELTA):
        digest = sidecar.create(memory_name(kind), kind=kind, gamma=[0.05])
        sidecar.upsert(memory_name(kind), 0, random_entries(kind, 20))
    return Memories(sidecar, digest)

"""One table from statuses and reasons to exceptions; nothing of gRPC's leaves the client."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType

import grpc
import knnmoe.client
import numpy as np
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode
from knnmoe.client import (
    AdminClient,
    KindMismatch,
    MemoryNotFound,
    ModelMismatch,
    RoutingClient,
    ServiceRefused,
    ServiceUnavailable,
    service_error,
)
from knnmoe.errors import BY_CODE, BY_REASON, ERROR_DOMAIN
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1.errors_pb2 import ErrorReason
from knnmoe.v1.types_pb2 import MemorySettings, ModelFingerprint

REASONS = [name for name, number in ErrorReason.items() if number]


@dataclass
class Failed:
    """A failed call, as gRPC hands it over."""

    status: StatusCode
    words: str = "in words"
    details_of: list[object] = field(default_factory=list)

    def code(self) -> StatusCode:
        return self.status

    def details(self) -> str:
        return self.words

    def trailing_metadata(self) -> list[tuple[str, bytes]]:
        packed = []
        for each in self.details_of:
            holder = any_pb2.Any()
            holder.Pack(each)
            packed.append(holder)
        status = status_pb2.Status(code=3, details=packed)
        return [("other", b""), ("grpc-status-details-bin", status.SerializeToString())]


def with_reason(code: StatusCode, reason: str, domain: str = ERROR_DOMAIN) -> Failed:
    info = error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata={"field": "k"})
    return Failed(code, details_of=[info])


def test_every_reason_of_the_contract_is_in_the_table() -> None:
    assert set(BY_REASON) == set(ErrorReason.values()) - {0}


def test_every_status_of_grpc_is_in_the_table() -> None:
    assert set(BY_CODE) == set(StatusCode)


@pytest.mark.parametrize("reason", REASONS)
def test_a_reason_decides_whatever_the_status(reason: str) -> None:
    for code in (StatusCode.UNAVAILABLE, StatusCode.INVALID_ARGUMENT):
        error = service_error(with_reason(code, reason), "host:1")
        assert type(error) is BY_REASON[ErrorReason.Value(reason)]
        assert (error.reason, error.code, error.target) == (reason, code, "host:1")
        assert (error.message, error.metadata) == ("in words", {"field": "k"})


@pytest.mark.parametrize("code", list(StatusCode), ids=lambda code: code.name)
def test_without_a_known_reason_the_status_decides(code: StatusCode) -> None:
    assert type(service_error(Failed(code))) is BY_CODE[code]
    newer = service_error(with_reason(code, "ERROR_REASON_OF_A_NEWER_SERVICE"))
    assert type(newer) is BY_CODE[code]
    assert newer.reason == "ERROR_REASON_OF_A_NEWER_SERVICE"
    foreign = service_error(with_reason(code, REASONS[0], domain="example.com"))
    assert (type(foreign), foreign.reason) == (BY_CODE[code], "")


def test_violations_are_kept() -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="k", description="got 0")
    bad = error_details_pb2.BadRequest(field_violations=[violation])
    assert service_error(Failed(StatusCode.INVALID_ARGUMENT, "no", [bad])).violations == {
        "k": "got 0"
    }


def test_words_to_count_by() -> None:
    assert ServiceUnavailable("x", code=StatusCode.DEADLINE_EXCEEDED).cause == "deadline"
    late = with_reason(StatusCode.DEADLINE_EXCEEDED, "ERROR_REASON_DEADLINE")
    assert service_error(late).cause == "deadline"
    assert ServiceUnavailable("x", code=StatusCode.UNAVAILABLE).cause == "unavailable"
    busy = with_reason(StatusCode.UNAVAILABLE, "ERROR_REASON_SHUTTING_DOWN")
    assert service_error(busy).cause == "shutting_down"


def test_what_the_errors_say() -> None:
    refused = service_error(with_reason(StatusCode.NOT_FOUND, "ERROR_REASON_MEMORY_NOT_FOUND"))
    assert isinstance(refused, MemoryNotFound)
    assert str(refused) == "in words (ERROR_REASON_MEMORY_NOT_FOUND)"
    gone = service_error(Failed(StatusCode.UNAVAILABLE), "host:1")
    assert str(gone) == "sidecar at host:1: UNAVAILABLE: in words"
    assert str(ServiceRefused("no", code=StatusCode.UNIMPLEMENTED)) == "no (UNIMPLEMENTED)"
    assert str(ModelMismatch("another model")) == "another model"
    assert str(KindMismatch("another kind")) == "another kind"
    assert str(ServiceUnavailable("it did not start")) == "it did not start"


@pytest.fixture
def deaf() -> Iterator[str]:
    """An address that nobody listens at, for as long as the test holds it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


FLOATS = np.zeros((1, 2), np.float32)
CALLS: dict[str, Callable[[RoutingClient, AdminClient], object]] = {
    "describe": lambda routing, admin: routing.describe(),
    "route": lambda routing, admin: routing.route(0, FLOATS, FLOATS, timeout_s=10),
    "count": lambda routing, admin: admin.count("law"),
    "health": lambda routing, admin: admin.serving_status(""),
    "unary": lambda routing, admin: admin.unary(admin.admin.Count, pb.CountRequest()),
    "replies": lambda routing, admin: list(admin.replies(admin.admin.Export(pb.ExportRequest()))),
    "upsert": lambda routing, admin: list(admin.upsert([pb.UpsertRequest()])),
    "optimize": lambda routing, admin: admin.optimize("law"),
    "create": lambda routing, admin: admin.find_or_create(
        "law", ModelFingerprint(), MemorySettings()
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_grpc_errors_do_not_leave_the_client(call: str, deaf: str) -> None:
    with (
        AdminClient(deaf) as admin,
        RoutingClient(deaf, "law", ModelFingerprint()) as routing,
        pytest.raises(ServiceUnavailable) as failed,
    ):
        CALLS[call](routing, admin)
    assert not isinstance(failed.value, grpc.RpcError)
    assert (failed.value.target, failed.value.code) == (deaf, StatusCode.UNAVAILABLE)


def test_the_public_list() -> None:
    public = {
        name
        for name, value in vars(knnmoe.client).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert set(knnmoe.client.__all__) == public

"""Every error of the service has one status and one reason, and tells its story in the details."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from knnmoe.client import service_error
from knnmoe.v1 import errors_pb2

from router_service import errors
from router_service.rpc.interceptors import _TABLE, internal_status, status_of

# Bases that say nothing by themselves; the service raises their children.
ABSTRACT = {errors.RoutingServiceError, errors.InvalidRequest}


def _tree(base: type[errors.RoutingServiceError]) -> list[type[errors.RoutingServiceError]]:
    """Without what transfer adds: that room is above rpc, so its errors never come to a handler."""
    below = [kind for kind in base.__subclasses__() if ".transfer." not in kind.__module__]
    return [base, *(child for direct in below for child in _tree(direct))]


def _made(kind: type[errors.RoutingServiceError]) -> errors.RoutingServiceError:
    if issubclass(kind, errors.InvalidRequest):
        return kind("router_inputs[2][3]", float("nan"), "a finite number")
    if issubclass(kind, errors.MemoryNotFound):
        return kind("x", ["a", "b"])
    if issubclass(kind, errors.LayerNotFound):
        return kind(9, 3)
    return kind("something")  # type: ignore[call-arg]


CONCRETE = [kind for kind in _tree(errors.RoutingServiceError) if kind not in ABSTRACT]


class _Failed:
    """A failed call as a client sees it."""

    def __init__(self, status: grpc.Status) -> None:
        self._status = status

    def code(self) -> grpc.StatusCode:
        return self._status.code

    def details(self) -> str:
        return str(self._status.details)

    def trailing_metadata(self) -> object:
        return self._status.trailing_metadata


def test_the_table_lists_every_error_and_nothing_else() -> None:
    assert set(_TABLE) == set(CONCRETE)


def test_every_class_of_the_module_is_in_the_tree() -> None:
    classes = {each for each in vars(errors).values() if isinstance(each, type)}
    assert classes == set(_tree(errors.RoutingServiceError))


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__ is not None
    for kind in _tree(errors.RoutingServiceError):
        assert kind.__name__ in errors.__doc__


@pytest.mark.parametrize("kind", CONCRETE)
def test_what_a_client_sees(kind: type[errors.RoutingServiceError]) -> None:
    error = _made(kind)
    seen = service_error(_Failed(status_of(error)))
    code, reason = _TABLE[kind]
    assert seen.code.value[0] == code
    assert seen.reason == errors_pb2.ErrorReason.Name(reason)
    assert seen.message == str(error)
    if isinstance(error, errors.InvalidRequest):
        assert seen.metadata == {
            "field": "router_inputs[2][3]",
            "value": "nan",
            "expected": "a finite number",
        }
        assert seen.violations == {"router_inputs[2][3]": "got nan, expected a finite number"}


def test_a_class_below_a_listed_one_takes_its_status() -> None:
    class TornPage(errors.CorruptMemory):
        """For this test."""

    seen = service_error(_Failed(status_of(TornPage("x"))))
    assert seen.reason == "ERROR_REASON_CORRUPT"


def test_a_defect_is_internal() -> None:
    seen = service_error(_Failed(internal_status("Route failed")))
    assert (seen.code, seen.reason) == (grpc.StatusCode.INTERNAL, "ERROR_REASON_INTERNAL")


def test_messages_fit_into_http2_metadata() -> None:
    many = [f"{'m' * 60}-{number}" for number in range(1000)]
    hostile = [
        errors.MemoryNotFound("x" * 100_000, many),
        errors.InvalidField("name", "\N{SNOWMAN}" * 100_000, "less"),
    ]
    for error in hostile:
        metadata = dict(status_of(error).trailing_metadata)
        assert len(metadata["grpc-status-details-bin"]) < 6000
        assert len(str(error)) < 2000


def test_details_are_googles() -> None:
    status = status_of(errors.InvalidField("name", "", "text"))
    packed = status_pb2.Status.FromString(dict(status.trailing_metadata)["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert packed.details[0].Unpack(info)
    assert info.domain == "knnmoe.dev"


@pytest.mark.parametrize("kind", [errors.BackendUnavailable, errors.Overloaded])
def test_a_client_hears_when_to_try_again(kind: type[errors.RoutingServiceError]) -> None:
    error = kind("later")
    assert service_error(_Failed(status_of(error))).retry_after_s is None
    error.retry_after_s = 1.25
    assert service_error(_Failed(status_of(error))).retry_after_s == 1.25

"""When a call is tried again: against a script of outcomes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from grpc import StatusCode
from knnmoe.client import ServiceRefused, ServiceUnavailable
from knnmoe.client.calls import NO_PAUSES_S, Retries

GONE = ServiceUnavailable("gone", code=StatusCode.UNAVAILABLE)
LATE = ServiceUnavailable("late", code=StatusCode.DEADLINE_EXCEEDED)
REFUSED = ServiceRefused("no", reason="ERROR_REASON_INVALID_FIELD")


def script(*outcomes: Any) -> tuple[Callable[[float], str], list[float]]:
    """A call that returns or raises one outcome after the other, and the seconds that each try was given."""
    left, following = [], iter(outcomes)

    def call(left_s: float) -> str:
        left.append(left_s)
        outcome = next(following)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return call, left


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_unavailable_is_tried_again_at_most_twice(failures: int) -> None:
    call, left = script(*[GONE] * failures, "answer")
    assert Retries(NO_PAUSES_S, reached=True).run(call, 60.0) == "answer"
    assert len(left) == failures + 1
    assert left[0] == 60.0
    assert left == sorted(left, reverse=True)


def test_the_third_failure_is_raised() -> None:
    call, left = script(GONE, GONE, GONE, "too late")
    with pytest.raises(ServiceUnavailable, match="gone"):
        Retries(NO_PAUSES_S, reached=True).run(call, 60.0)
    assert len(left) == 3


@pytest.mark.parametrize("failure", [LATE, REFUSED])
def test_other_failures_are_raised_at_once(failure: Exception) -> None:
    call, left = script(failure, "answer")
    with pytest.raises(type(failure)):
        Retries(NO_PAUSES_S, reached=True).run(call, 60.0)
    assert len(left) == 1


def test_nothing_is_tried_again_before_a_sidecar_has_answered() -> None:
    retries = Retries()
    call, left = script(GONE)
    with pytest.raises(ServiceUnavailable):
        retries.run(call, 60.0)
    assert len(left) == 1
    assert not retries.reached


@pytest.mark.parametrize("answer", ["answer", REFUSED])
def test_a_refusal_is_an_answer_too(answer: Any) -> None:
    retries = Retries()
    with suppress(ServiceRefused):
        retries.run(script(answer)[0], 60.0)
    assert retries.reached


def test_nothing_is_tried_again_after_the_deadline() -> None:
    call, left = script(GONE, "answer")
    with pytest.raises(ServiceUnavailable, match="gone"):
        Retries((60.0, 60.0), reached=True).run(call, 0.01)
    assert len(left) == 1


def again_after(seconds: float, code: StatusCode = StatusCode.UNAVAILABLE) -> ServiceUnavailable:
    return ServiceUnavailable("later", code=code, retry_after_s=seconds)


@pytest.mark.parametrize("code", [StatusCode.UNAVAILABLE, StatusCode.RESOURCE_EXHAUSTED])
def test_what_says_when_to_try_again_is_tried_for_as_long_as_there_is_time(
    code: StatusCode,
) -> None:
    call, left = script(*[again_after(0.0, code)] * 9, "answer")
    assert Retries((60.0, 60.0), reached=True).run(call, 30.0) == "answer"
    assert len(left) == 10


def test_a_hint_beyond_the_deadline_is_not_waited_for() -> None:
    call, left = script(again_after(60.0), "answer")
    with pytest.raises(ServiceUnavailable, match="later"):
        Retries(NO_PAUSES_S, reached=True).run(call, 30.0)
    assert len(left) == 1


def test_other_failures_have_their_own_retries_beside() -> None:
    call, left = script(GONE, again_after(0.0), GONE, again_after(0.0), GONE, "too late")
    with pytest.raises(ServiceUnavailable, match="gone"):
        Retries(NO_PAUSES_S, reached=True).run(call, 60.0)
    assert len(left) == 5


def test_a_try_that_runs_out_of_time_says_why_there_was_no_answer() -> None:
    call, left = script(again_after(0.0), LATE)
    with pytest.raises(ServiceUnavailable, match="later"):
        Retries(NO_PAUSES_S, reached=True).run(call, 60.0)
    assert len(left) == 2


def test_a_service_that_says_why_it_cannot_has_answered() -> None:
    away = ServiceUnavailable(
        "away", code=StatusCode.UNAVAILABLE, reason="ERROR_REASON_BACKEND_UNAVAILABLE"
    )
    assert Retries(NO_PAUSES_S).run(script(away, "answer")[0], 60.0) == "answer"

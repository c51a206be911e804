"""When a call is worth trying: a breaker against a fake clock."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_runner.router_client import CircuitBreaker


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def breaker_at(clock: Clock, jitter: float = 0.5) -> CircuitBreaker:
    """Jitter 0.5 is none: pauses are exact."""
    return CircuitBreaker(clock_s=clock, jitter=lambda: jitter)


def fail(breaker: CircuitBreaker, times: int) -> None:
    for _ in range(times):
        assert breaker.allows()
        breaker.failed()


def test_opens_after_five_failures_in_a_row() -> None:
    breaker = breaker_at(Clock())
    fail(breaker, 4)
    breaker.succeeded()
    fail(breaker, 4)
    assert breaker.allows()
    breaker.failed()
    assert not breaker.allows()


def test_pauses_double_to_thirty_seconds() -> None:
    clock = Clock()
    breaker = breaker_at(clock)
    fail(breaker, 5)
    for pause_s in (1, 2, 4, 8, 16, 30, 30):
        clock.now_s += pause_s - 0.001
        assert not breaker.allows()
        clock.now_s += 0.001
        fail(breaker, 1)


def test_a_trial_that_succeeds_closes_it() -> None:
    clock = Clock()
    breaker = breaker_at(clock)
    fail(breaker, 5)
    clock.now_s += 1
    fail(breaker, 1)
    clock.now_s += 2
    assert breaker.allows()
    breaker.succeeded()
    fail(breaker, 5)
    clock.now_s += 1
    assert breaker.allows()


@pytest.mark.parametrize(("jitter", "pause_s"), [(0.0, 0.75), (1.0, 1.25)])
def test_jitter_is_a_quarter_either_way(jitter: float, pause_s: float) -> None:
    clock = Clock()
    breaker = breaker_at(clock, jitter)
    fail(breaker, 5)
    clock.now_s += pause_s - 0.001
    assert not breaker.allows()
    clock.now_s += 0.002
    assert breaker.allows()


def test_one_of_many_threads_makes_the_trial() -> None:
    clock = Clock()
    breaker = breaker_at(clock)
    fail(breaker, 5)
    clock.now_s += 1
    assert [breaker.allows() for _ in range(16)] == [True] + [False] * 15
    clock.now_s += 1  # whoever had it never came back: interrupted, or refused
    assert [breaker.allows() for _ in range(16)] == [True] + [False] * 15
    breaker.succeeded()
    assert breaker.allows()


def test_calls_on_their_way_when_it_opens_do_not_lengthen_the_pause() -> None:
    clock = Clock()
    breaker = breaker_at(clock)
    for _ in range(16):  # threads that all asked before the first failure
        breaker.failed()
    clock.now_s += 1
    assert breaker.allows()


# (seconds that pass before a call, whether the call would succeed)
CALLS = st.lists(st.tuples(st.floats(0, 50), st.booleans()), max_size=60)


@given(CALLS, st.floats(0, 1))
def test_any_history(calls: list[tuple[float, bool]], jitter: float) -> None:
    """Closed below five failures in a row; never shut for longer than the longest pause; a success always closes it."""
    clock = Clock()
    breaker = breaker_at(clock, jitter)
    in_a_row, refused_since_s = 0, None
    for passed_s, succeeds in calls:
        clock.now_s += passed_s
        allowed = breaker.allows()
        assert allowed or in_a_row >= 5
        if not allowed:
            refused_since_s = clock.now_s if refused_since_s is None else refused_since_s
            assert clock.now_s - refused_since_s < 1.25 * breaker.longest_pause_s
            continue
        refused_since_s = None
        if succeeds:
            breaker.succeeded()
            in_a_row = 0
            assert breaker.allows()
        else:
            breaker.failed()
            in_a_row += 1


@given(st.floats(0, 1))
def test_a_sidecar_that_stays_away_is_tried_ever_less_often(jitter: float) -> None:
    clock = Clock()
    breaker = breaker_at(clock, jitter)
    trials = []
    for _ in range(6000):
        clock.now_s += 0.1
        if breaker.allows():
            trials.append(clock.now_s)
            breaker.failed()
    gaps = [later - earlier for earlier, later in itertools.pairwise(trials)]
    assert len(trials) < 45  # ten minutes; 6,000 calls were asked for
    assert all(later >= earlier - 0.2 for earlier, later in itertools.pairwise(gaps))

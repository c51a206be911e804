"""Writes make way for searches, and for an index that is being built; not when nobody searches."""

from __future__ import annotations

import pytest

from router_service.backends import base
from router_service.backends.base import Pacing


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(base, "time", made)
    return made


def test_a_write_rests_only_while_others_search(clock: Clock) -> None:
    pace = Pacing()
    pace.rest(0.002)
    assert clock.slept == 0
    assert pace.wrote_ago_s == 0
    pace.searched()
    pace.rest(0.002)
    assert clock.slept == pytest.approx(0.1)
    clock.now += 10
    pace.rest(0.002)
    assert clock.slept == pytest.approx(0.1)


def test_a_rest_ends_with_patience(clock: Clock) -> None:
    pace = Pacing()
    pace.searched()
    pace.rest(1.0, pace.patience())
    assert clock.slept == pytest.approx(5.0)


def test_a_write_waits_for_the_index_while_others_search(clock: Clock) -> None:
    pace = Pacing()
    pace.wait_while(lambda: True, pace.patience())
    assert clock.slept == 0  # nobody searches
    pace.searched()
    pace.wait_while(lambda: True, pace.patience())
    assert 0 < clock.slept < 1  # nobody searches any more
    before = clock.slept
    pace.searched()
    pace.wait_while(lambda: False, pace.patience())
    assert clock.slept == before


def test_patience_ends(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pacing()
    monkeypatch.setattr(base, "_RECENT_S", 1e9)
    pace.searched()
    pace.wait_while(lambda: True, pace.patience())
    assert clock.slept == pytest.approx(5.0, abs=0.05)


def test_a_caller_who_has_waited_long_waits_no_more(clock: Clock) -> None:
    pace = Pacing()
    until = pace.patience()
    pace.searched()
    pace.rest(0.002, until)
    before = clock.slept
    assert before > 0
    clock.now = until
    pace.searched()
    pace.rest(0.002, until)
    assert clock.slept == before

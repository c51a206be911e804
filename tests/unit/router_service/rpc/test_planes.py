"""Permits: no memory takes all of them, and who finds none waits for a part of its time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from router_service.errors import Overloaded, ShuttingDown
from router_service.rpc import planes
from router_service.rpc.planes import Permits


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@contextmanager
def in_line(permits: Permits, memory: str, order: list[str]) -> Iterator[threading.Thread]:
    """A call that waits for a permit of a memory, and notes when it has one."""

    def work() -> None:
        with permits.one(memory):
            order.append(memory)

    before = len(permits._line)
    thread = threading.Thread(target=work)
    thread.start()
    wait_for(lambda: len(permits._line) > before)
    yield thread
    thread.join()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody in line is refused for having waited too long."""
    monkeypatch.setattr(planes, "_LINE_S", 60.0)


@pytest.mark.parametrize(("most", "expected"), [(1, 1), (2, 2), (4, 3), (8, 6), (64, 48)])
def test_one_memory_gets_three_quarters(most: int, expected: int) -> None:
    permits = Permits(most)
    with ExitStack() as held:
        for _ in range(expected):
            held.enter_context(permits.one("m"))
        with pytest.raises(Overloaded, match="--max-in-flight"), permits.one("m", left_s=0.001):
            pass
        if most > expected:
            held.enter_context(permits.one("other"))
    assert permits.in_flight == 0


def test_two_memories_leave_some_for_a_third() -> None:
    permits = Permits(64)
    with ExitStack() as held:
        for _ in range(64):
            for memory in ("one", "two"):
                try:
                    held.enter_context(permits.one(memory, left_s=0.0))
                except Overloaded:
                    continue
        assert permits.in_flight < 64
        held.enter_context(permits.one("three", left_s=0.0))


@pytest.mark.usefixtures("patient")
def test_the_line_goes_on_in_the_order_of_arrival() -> None:
    permits, order = Permits(1), []  # type: ignore[var-annotated]
    with ExitStack() as line, permits.one("a"):
        for memory in ("b", "c", "d"):
            line.enter_context(in_line(permits, memory, order))
        assert order == []
    assert order == ["b", "c", "d"]
    assert permits.in_flight == 0


@pytest.mark.usefixtures("patient")
def test_who_waits_for_a_memory_that_has_its_share_does_not_keep_others_waiting() -> None:
    permits, order = Permits(4), []  # type: ignore[var-annotated]
    with ExitStack() as line, ExitStack() as held:
        for _ in range(3):
            held.enter_context(permits.one("stuck"))
        line.enter_context(in_line(permits, "stuck", order))
        with permits.one("fine"):
            line.enter_context(in_line(permits, "fine", order))
        wait_for(lambda: order == ["fine"])
        held.close()
    assert order == ["fine", "stuck"]


def test_a_full_line_refuses_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "_LINE_S", 60.0)
    permits, order = Permits(1), []  # type: ignore[var-annotated]
    with ExitStack() as line, permits.one("a"):
        for memory in "bcde":
            line.enter_context(in_line(permits, memory, order))
        assert permits.refuses
        with pytest.raises(Overloaded), permits.one("f"):
            pass
    assert not permits.refuses


def test_a_call_that_was_at_work_is_not_refused() -> None:
    permits = Permits(1)
    with permits.one("m"):
        permits.close()
        with permits.again("m"):
            assert permits.in_flight == 2
        with pytest.raises(ShuttingDown), permits.one("m"):
            pass

"""Operations run, report, fail, and are cancelled; what runs on one memory is told to others."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from router_service.backends.base import Report
from router_service.errors import Busy, Cancelled, OperationNotFound, ShuttingDown, StorageError
from router_service.operations import Operations, State


def _counting(report: Report) -> Iterator[int]:
    for number in range(3):
        report("count", number, 3)
        yield number


class Endless:
    """Work that reports until a report ends it."""

    def __init__(self) -> None:
        self.begun = threading.Event()

    def __call__(self, report: Report) -> Iterator[int]:
        while True:
            report("wait", 1, 0)
            yield 1
            self.begun.set()
            threading.Event().wait(0.001)


def test_the_id_comes_first_and_the_results_in_order() -> None:
    operations = Operations()
    steps = list(operations.run("count", "m", _counting))
    first, last = steps[0][0], steps[-1][0]
    assert [result for _, result in steps if result is not None] == [0, 1, 2]
    assert steps[0][1] is None
    assert first.id == last.id
    assert first.state is State.RUNNING
    assert (last.state, last.stage, last.done, last.total) == (State.DONE, "count", 2, 3)
    assert last.ended_unix_ms >= last.started_unix_ms > 0
    assert operations.get(first.id) == last


def test_a_slow_operation_is_heard_of_all_the_time() -> None:
    go_on = threading.Event()

    def work(report: Report) -> Iterator[int]:
        report("sleep", 0, 0)
        go_on.wait()
        yield 1

    steps = Operations().run("sleep", "m", work)
    next(steps)
    assert next(steps)[0].stage == "sleep"
    go_on.set()
    assert 1 in [result for _, result in steps]


def test_what_the_work_raises_is_raised_and_kept() -> None:
    def work(report: Report) -> Iterator[int]:
        yield 1
        raise StorageError("the disk is gone")

    operations = Operations()
    with pytest.raises(StorageError, match="the disk is gone"):
        list(operations.run("fail", "m", work))
    [failed] = operations.list()
    assert (failed.state, failed.error) == (State.FAILED, "the disk is gone")


def test_a_defect_is_not_told_in_full() -> None:
    def work(report: Report) -> Iterator[int]:
        yield 1
        raise ZeroDivisionError("secret")

    operations = Operations()
    with pytest.raises(ZeroDivisionError):
        list(operations.run("fail", "m", work))
    assert operations.list()[0].error == "ZeroDivisionError; see the service's log"


def test_cancel() -> None:
    operations, work = Operations(), Endless()
    steps = operations.run("wait", "m", work)
    started, _ = next(steps)
    work.begun.wait()
    assert operations.cancel(started.id).state is State.RUNNING
    with pytest.raises(Cancelled, match="wait was cancelled: a client asked for it"):
        list(steps)
    assert operations.get(started.id).state is State.CANCELLED
    assert operations.cancel(started.id).state is State.CANCELLED


def test_closing_the_iterator_cancels_and_waits() -> None:
    operations = Operations()
    steps = operations.run("wait", "m", Endless())
    started, _ = next(steps)
    steps.close()
    ended = operations.get(started.id)
    assert ended.state is State.CANCELLED
    assert "its client went away" in ended.error


def test_one_at_a_time_changes_a_memory() -> None:
    operations = Operations()
    steps = operations.run("wait", "m", Endless())
    started, _ = next(steps)
    with pytest.raises(Busy, match=f"router-admin operations cancel {started.id}"):
        next(operations.run("count", "m", _counting))
    assert list(operations.run("count", "other", _counting))
    assert list(operations.run("look", "m", _counting, exclusive=False))
    steps.close()
    assert list(operations.run("count", "m", _counting))


def test_looking_does_not_hold_a_memory() -> None:
    operations = Operations()
    looking = operations.run("look", "m", Endless(), exclusive=False)
    next(looking)
    assert list(operations.run("count", "m", _counting))
    looking.close()


def test_close_ends_what_runs_and_refuses_what_comes() -> None:
    operations = Operations()
    steps = operations.run("wait", "m", Endless())
    next(steps)
    operations.close()
    assert operations.join(10)
    with pytest.raises(Cancelled, match="the service stops"):
        list(steps)
    with pytest.raises(ShuttingDown):
        next(operations.run("count", "m", _counting))


def test_the_last_that_ended_are_kept_and_all_that_run() -> None:
    operations = Operations(keep_ended=2)
    running = operations.run("wait", "m", Endless())
    first, _ = next(running)
    for number in range(4):
        list(operations.run("count", str(number), _counting))
    assert [operation.memory for operation in operations.list()] == ["m", "2", "3"]
    assert [operation.memory for operation in operations.list("3")] == ["3"]
    assert operations.get(first.id).state is State.RUNNING
    running.close()


def test_an_unknown_id() -> None:
    with pytest.raises(OperationNotFound, match="operation 'x' not found"):
        Operations().get("x")


@pytest.mark.parametrize("exclusive", [True, False])
def test_nothing_begins_on_memories_that_are_taken(exclusive: bool) -> None:
    operations = Operations()
    with operations.none_on("a", "b"):
        for memory in ("a", "b"):
            with pytest.raises(Busy, match="being replaced"):
                list(operations.run("count", memory, _counting, exclusive=exclusive))
            with pytest.raises(Busy, match="being replaced"), operations.none_on("c", memory):
                pass
        assert list(operations.run("count", "c", _counting))
        assert not operations.join(0.0)
    assert operations.join(0.0)
    assert list(operations.run("count", "a", _counting, exclusive=exclusive))


def test_nothing_is_taken_while_the_service_stops() -> None:
    operations = Operations()
    operations.close()
    with pytest.raises(ShuttingDown), operations.none_on("a"):
        pass

"""What is written while somebody decides what to delete is not deleted."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np
import pytest

from router_service.arrays import U64
from router_service.errors import Busy, Cancelled
from router_service.memories.write_gate import WriteGate


def _ids(*numbers: int) -> U64:
    return np.array(numbers, np.uint64)


class Deleted:
    """Notes what it is told to delete."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def __call__(self, ids: U64) -> int:
        self.ids += ids.tolist()
        return len(ids)


def test_without_writes_everything_goes() -> None:
    gate, deleted = WriteGate(), Deleted()
    with gate.writing(_ids(1, 2)):
        pass
    with gate.watched() as watch:
        assert watch.delete(_ids(1, 2, 3), deleted) == (3, 0)
    assert deleted.ids == [1, 2, 3]


def test_writes_begun_before_and_after_are_spared() -> None:
    gate, deleted = WriteGate(), Deleted()
    with gate.writing(_ids(1)):
        opened = gate.watched()
        watch = opened.__enter__()
    with gate.writing(_ids(3, 4)):
        assert watch.delete(_ids(1, 2, 3), deleted) == (1, 2)
    with gate.writing(_ids(5)):
        pass
    assert watch.delete(_ids(4, 5), deleted) == (0, 2)
    opened.__exit__(None, None, None)
    assert deleted.ids == [2]
    with gate.watched() as later:
        assert later.delete(_ids(4, 5), deleted) == (2, 0)


def test_a_write_that_begins_during_a_deletion_comes_after_it() -> None:
    gate, events = WriteGate(), list[str]()
    begun = threading.Event()

    def write() -> None:
        begun.set()
        with gate.writing(_ids(1)):
            events.append("written")

    def delete(ids: U64) -> int:
        writer.start()
        begun.wait()
        writer.join(0.05)
        events.append("deleted")
        return len(ids)

    writer = threading.Thread(target=write)
    with gate.watched() as watch:
        assert watch.delete(_ids(1), delete) == (1, 0)
    writer.join()
    assert events == ["deleted", "written"]


def test_closed_until_it_is_open_again() -> None:
    """Who was at work ends first; writes and deletions that come wait."""
    gate, events = WriteGate(), list[str]()
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with gate.writing(_ids(1)):
            inside.set()
            leave.wait()
            events.append("first")

    def write() -> None:
        with gate.writing(_ids(2)):
            events.append("later")

    def delete() -> None:
        with gate.watched() as watch:
            watch.delete(_ids(3), lambda ids: events.append("later") or len(ids))

    threads = [threading.Thread(target=first)]
    threads[0].start()
    inside.wait()
    threading.Timer(0.05, leave.set).start()
    with gate.closed(lambda: None, math.inf):
        assert events == ["first"]
        threads += [threading.Thread(target=write), threading.Thread(target=delete)]
        for thread in threads[1:]:
            thread.start()
        threads[1].join(0.05)
        assert events == ["first"]
    for thread in threads:
        thread.join()
    assert events == ["first", "later", "later"]


def _leave() -> None:
    raise Cancelled("the caller left")


@pytest.mark.parametrize(
    ("tick", "until", "error"), [(_leave, math.inf, Cancelled), (lambda: None, 0.0, Busy)]
)
def test_a_write_that_hangs_holds_nobody_up_for_ever(
    tick: Callable[[], None], until: float, error: type[Exception]
) -> None:
    """Who waits for it can leave, and does at a limit; then others write and delete again."""
    gate, deleted = WriteGate(), Deleted()
    with gate.writing(_ids(1)):
        with pytest.raises(error), gate.closed(tick, until):
            pass
        with gate.writing(_ids(2)):
            pass
        with gate.watched() as watch:
            assert watch.delete(_ids(3), deleted) == (1, 0)


def test_a_deletion_that_hangs_can_be_left() -> None:
    gate = WriteGate()

    def delete(ids: U64) -> int:
        with pytest.raises(Cancelled), gate.closed(_leave, math.inf):
            pass
        return len(ids)

    with gate.watched() as watch:
        assert watch.delete(_ids(3), delete) == (1, 0)
    with gate.writing(_ids(3)):
        pass


def test_what_was_written_is_taken_once_it_has_ended() -> None:
    gate = WriteGate()
    with gate.watched() as watch:
        with gate.writing(_ids(1)):
            with gate.writing(_ids(7, 5)):
                pass
            assert watch.taken().tolist() == [1, 5, 7]
            assert watch.taken().tolist() == [1]  # it is still being written
        assert watch.taken().tolist() == [1]
        assert watch.taken().tolist() == []

"""What is written while somebody decides what to delete is not deleted."""

from __future__ import annotations

import threading

import numpy as np

from router_service.arrays import U64
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

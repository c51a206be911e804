"""Copies that come at the same time, of a memory that others write to."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from router_service.arrays import U64
from router_service.backends.exact import ExactCollection
from router_service.memories.foreign_writes import ForeignWrites
from router_service.memories.layer import LayerMemory
from router_service.memories.memory import MemoryRecord, RoutingMemory, spec_of
from tests.unit.router_service.numbered_memory import MODEL, SETTINGS, fill


class Slow(ExactCollection):
    """Is listed when `go` is set."""

    def __init__(self) -> None:
        super().__init__(spec_of(MemoryRecord("m", MODEL, SETTINGS, 1)))
        self.listings, self.go = 0, threading.Event()

    def listed(self, after: int | None) -> tuple[U64, U64]:
        self.listings += after is None
        self.go.wait()
        ids = self.scroll(after, 1000, with_keys=False).ids
        return ids, ids


def until(happened: Callable[[], bool]) -> None:
    while not happened():
        time.sleep(0.001)


def test_copies_that_wait_share_a_listing() -> None:
    collections = [Slow() for _ in range(MODEL.num_layers)]
    layers = [LayerMemory(n, each, 4, 2) for n, each in enumerate(collections)]
    memory = RoutingMemory(MemoryRecord("m", MODEL, SETTINGS, 1), layers)
    fill(memory, 0, 10)
    foreign, leave = ForeignWrites(memory), threading.Event()

    def follow() -> None:
        with foreign.followed():
            leave.wait()

    def wait_in_line() -> bool:
        frames = sys._current_frames()
        return all("came_s" in frames[each.ident or 0].f_locals for each in copies[1:])

    copies = [threading.Thread(target=follow) for _ in range(6)]
    copies[0].start()
    until(lambda: collections[0].listings == 1)
    for each in copies[1:]:
        each.start()
    until(wait_in_line)
    for collection in collections:
        collection.go.set()
    until(lambda: foreign._copies == len(copies))
    leave.set()
    for each in copies:
        each.join()
    assert [each.listings for each in collections] == [2, 2]

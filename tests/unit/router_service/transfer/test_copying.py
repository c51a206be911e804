"""Passes over two memories in RAM, while somebody writes to the source between them."""

from __future__ import annotations

from collections.abc import Callable, Generator

import pytest

from router_service.arrays import Entries
from router_service.memories.memory import RoutingMemory
from router_service.transfer.copying import MAX_PASSES, Copy, differing
from router_service.transfer.endpoints import Untouched
from router_service.transfer.store import StoreEntries
from tests.unit.router_service.transfer.layer_models import (
    erase,
    ids_of,
    memory_of,
    no_progress,
    write,
)

TWO_THOUSAND = dict.fromkeys(range(0, 4000, 2), 0)


class ChangingEntries(StoreEntries):
    """A source to which `between` happens each time that its layer 0 has been read."""

    def __init__(self, memory: RoutingMemory, between: Callable[[int], None]) -> None:
        super().__init__(memory)
        self._between, self._reads = between, 0

    def pages(self, layer: int, *, with_keys: bool = True) -> Generator[Entries, None, None]:
        """As is."""
        yield from super().pages(layer, with_keys=with_keys)
        if layer == 0:
            self._reads += 1
            self._between(self._reads)


def copied(
    source: RoutingMemory,
    target: RoutingMemory,
    *,
    delete: bool = False,
    between: Callable[[int], None] = lambda reads: None,
) -> Copy:
    """A copy that ran until both were the same, or not."""
    endpoints = ChangingEntries(source, between), StoreEntries(target)
    copy = Copy(*endpoints, range(2), differing, delete=delete, verify=True)
    copy.run(no_progress)
    return copy


def changes(copy: Copy) -> list[tuple[int, int, int, int]]:
    """Layer by layer: added, replaced, deleted, only in the sink."""
    return [
        (counts.added, counts.replaced, counts.deleted, counts.only_in_sink)
        for _, counts in sorted(copy.counts.items())
    ]


def test_all_is_copied_and_the_next_run_finds_nothing() -> None:
    source, target = memory_of(TWO_THOUSAND, {5: 1}), memory_of({2: 1, 4: 0})
    first = copied(source, target)
    assert first.verified
    assert first.passes == 2
    assert changes(first) == [(1998, 1, 0, 0), (1, 0, 0, 0)]
    assert [layer.sink.entries for layer in first.sums] == [2000, 1]
    again = copied(source, target)
    assert again.passes == 1
    assert sum(counts.changed for counts in again.counts.values()) == 0


def test_what_changes_meanwhile_comes_with_the_next_pass() -> None:
    """Added, replaced, and deleted again: what the run itself saw on the source goes without --delete."""
    source, target = memory_of(TWO_THOUSAND), memory_of()

    def change(reads: int) -> None:
        if reads == 1:
            write(source, {1: 0, 2: 9})
            erase(source, 4, 6)

    done = copied(source, target, between=change)
    assert done.verified
    assert done.passes == 3
    assert changes(done)[0] == (2001, 1, 2, 0)
    assert ids_of(target) == ids_of(source)


def test_a_change_between_the_last_pass_and_the_sums_takes_another_pass() -> None:
    source, target = memory_of({2: 0}), memory_of()
    done = copied(source, target, between=lambda reads: write(source, {9: 0} if reads == 2 else {}))
    assert done.verified
    assert ids_of(target) == [2, 9]


def test_a_source_that_never_rests_is_given_up() -> None:
    source, target = memory_of({2: 0}), memory_of()
    done = copied(source, target, between=lambda reads: write(source, {100 + reads: 0}))
    assert not done.verified
    assert done.passes == MAX_PASSES
    assert done.changed_in_last_pass == 1
    assert done.sums == ()


def test_unequal_sums_are_told() -> None:
    """Each time the sums are taken the source has changed since, and changes back before the next pass."""
    source, target = memory_of({2: 0}), memory_of()

    def flap(reads: int) -> None:
        if reads >= 2:
            write(source, {2: 1 if reads % 2 == 0 else 0})

    done = copied(source, target, between=flap)
    assert not done.verified
    assert done.changed_in_last_pass == 0
    assert [layer.equal for layer in done.sums] == [False, True]


@pytest.mark.parametrize("delete", [False, True])
def test_entries_that_only_the_target_has(delete: bool) -> None:
    source, target = memory_of({2: 0, 8: 0}), memory_of({1: 0, 8: 1, 9: 0}, {7: 0})
    done = copied(source, target, delete=delete)
    assert done.verified is delete
    assert done.only_in_sink == (0 if delete else 3)
    assert ids_of(target) == ([2, 8] if delete else [1, 2, 8, 9])
    assert changes(done)[0] == ((1, 1, 2, 0) if delete else (1, 1, 0, 2))
    assert ids_of(source) == [2, 8]


def test_a_look_writes_nothing() -> None:
    source, target = memory_of({2: 0, 8: 0}), memory_of({1: 0, 8: 1})
    behind = Untouched(StoreEntries(target))
    look = Copy(StoreEntries(source), behind, range(2), differing, delete=True)
    look.run(no_progress)
    assert look.changed_in_last_pass == 3
    assert changes(look)[0] == (1, 1, 1, 0)
    assert ids_of(target) == [1, 8]
    nothing_there = Copy(StoreEntries(source), Untouched(None), range(2), differing, delete=False)
    nothing_there.run(no_progress)
    assert nothing_there.changed_in_last_pass == 2

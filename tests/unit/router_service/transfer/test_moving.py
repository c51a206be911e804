"""Passes over two memories in RAM, while somebody writes to the source between them."""

from __future__ import annotations

from collections.abc import Callable, Generator

import pytest

from router_service.arrays import Entries
from router_service.memories.memory import RoutingMemory
from router_service.transfer import LayerCounts, Migration, StoreSide, Untouched
from router_service.transfer.moving import MAX_PASSES
from tests.unit.router_service.transfer.layer_models import (
    erase,
    ids_of,
    memory_of,
    no_progress,
    write,
)

TWO_THOUSAND = dict.fromkeys(range(0, 4000, 2), 0)


class ChangingSide(StoreSide):
    """A source to which `between` happens each time that its layer 0 has been read."""

    def __init__(self, memory: RoutingMemory, between: Callable[[int], None]) -> None:
        super().__init__(memory)
        self._between, self._reads = between, 0

    def pages(self, layer: int) -> Generator[Entries, None, None]:
        """As is."""
        yield from super().pages(layer)
        if layer == 0:
            self._reads += 1
            self._between(self._reads)


def migration(
    source: RoutingMemory,
    target: RoutingMemory,
    *,
    delete: bool = False,
    between: Callable[[int], None] = lambda reads: None,
) -> Migration:
    return Migration(ChangingSide(source, between), StoreSide(target), 2, delete)


def test_all_is_copied_and_the_next_run_finds_nothing() -> None:
    source, target = memory_of(TWO_THOUSAND, {5: 1}), memory_of({2: 1, 4: 0})
    first = migration(source, target)
    outcome = first.run(no_progress)
    assert outcome.verified
    assert outcome.passes == 2
    assert first.counts == {0: LayerCounts(1998, 1, 0, 0), 1: LayerCounts(1, 0, 0, 0)}
    assert [layer.target.entries for layer in outcome.sums] == [2000, 1]
    again = migration(source, target)
    assert again.run(no_progress).passes == 1
    assert sum(counts.changed for counts in again.counts.values()) == 0


def test_what_changes_meanwhile_comes_with_the_next_pass() -> None:
    """Added, replaced, and deleted again: what the run itself saw on the source goes without --delete."""
    source, target = memory_of(TWO_THOUSAND), memory_of()

    def change(reads: int) -> None:
        if reads == 1:
            write(source, {1: 0, 2: 9})
            erase(source, 4, 6)

    done = migration(source, target, between=change)
    outcome = done.run(no_progress)
    assert outcome.verified
    assert outcome.passes == 3
    assert done.counts[0] == LayerCounts(2001, 1, 2, 0)
    assert ids_of(target) == ids_of(source)


def test_a_change_between_the_last_pass_and_the_sums_takes_another_pass() -> None:
    source, target = memory_of({2: 0}), memory_of()
    done = migration(
        source, target, between=lambda reads: write(source, {9: 0} if reads == 2 else {})
    )
    outcome = done.run(no_progress)
    assert outcome.verified
    assert ids_of(target) == [2, 9]


def test_a_source_that_never_rests_is_given_up() -> None:
    source, target = memory_of({2: 0}), memory_of()
    done = migration(source, target, between=lambda reads: write(source, {100 + reads: 0}))
    outcome = done.run(no_progress)
    assert not outcome.verified
    assert outcome.passes == MAX_PASSES
    assert outcome.changed_in_last_pass == 1
    assert outcome.sums == ()


def test_unequal_sums_are_told() -> None:
    """Each time the sums are taken the source has changed since, and changes back before the next pass."""
    source, target = memory_of({2: 0}), memory_of()

    def flap(reads: int) -> None:
        if reads >= 2:
            write(source, {2: 1 if reads % 2 == 0 else 0})

    outcome = migration(source, target, between=flap).run(no_progress)
    assert not outcome.verified
    assert outcome.changed_in_last_pass == 0
    assert [layer.equal for layer in outcome.sums] == [False, True]


@pytest.mark.parametrize("delete", [False, True])
def test_entries_that_only_the_target_has(delete: bool) -> None:
    source, target = memory_of({2: 0, 8: 0}), memory_of({1: 0, 8: 1, 9: 0}, {7: 0})
    done = migration(source, target, delete=delete)
    outcome = done.run(no_progress)
    assert outcome.verified is delete
    assert done.only_in_target == (0 if delete else 3)
    assert ids_of(target) == ([2, 8] if delete else [1, 2, 8, 9])
    assert done.counts[0] == LayerCounts(1, 1, 2, 0) if delete else LayerCounts(1, 1, 0, 2)
    assert ids_of(source) == [2, 8]


def test_a_look_writes_nothing() -> None:
    source, target = memory_of({2: 0, 8: 0}), memory_of({1: 0, 8: 1})
    look = Migration(StoreSide(source), Untouched(StoreSide(target)), 2, delete=True)
    assert look.one_pass(no_progress, "comparing") == 3
    assert look.counts[0] == LayerCounts(1, 1, 1, 0)
    assert ids_of(target) == [1, 8]
    nothing_there = Migration(StoreSide(source), Untouched(None), 2, delete=False)
    assert nothing_there.one_pass(no_progress, "comparing") == 2

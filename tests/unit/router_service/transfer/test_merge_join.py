"""Two sides of a layer, joined page by page, against sets of ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_service.arrays import MAX_ENTRY_ID, Entries, Provenance
from router_service.errors import StorageError
from router_service.transfer.copying import (
    OnConflict,
    difference,
    differing,
    in_order,
    joined,
    keep,
    newer,
    replace,
)
from tests.unit.router_service.transfer.layer_models import entries_of

Versions = dict[int, int]
SIDES = st.dictionaries(st.integers(0, 30) | st.just(MAX_ENTRY_ID), st.integers(0, 1), max_size=20)


def paged(versions: Versions, size: int) -> Iterator[Entries]:
    """Entries in pages of a size."""
    entries = entries_of(versions)
    for start in range(0, len(entries), size):
        yield entries.slice(start, start + size)


def walked(
    source: Versions, target: Versions, sizes: tuple[int, int]
) -> tuple[Versions, list[int], list[int]]:
    """What is to be written, all ids that were passed, those that only the target has."""
    written: list[Entries] = []
    passed: list[int] = []
    surplus: list[int] = []
    steps = joined(in_order(paged(source, sizes[0])), in_order(paged(target, sizes[1])))
    for ours, theirs in steps:
        to_write, added, only_in_sink = difference(ours, theirs, differing)
        passed += ours.ids.tolist()
        surplus += only_in_sink.tolist()
        assert added == len(set(ours.ids.tolist()) - set(theirs.ids.tolist()))
        written.append(to_write)
    ids = [number for batch in written for number in batch.ids.tolist()]
    for batch in written:
        wanted = entries_of({number: source[number] for number in batch.ids.tolist()})
        assert batch.keys.tobytes() == wanted.keys.tobytes()
        assert list(batch.provenance) == list(wanted.provenance)
    return {number: source[number] for number in ids}, passed, surplus


@given(SIDES, SIDES, st.tuples(st.integers(1, 7), st.integers(1, 7)))
def test_what_differs_is_found_whatever_the_pages(
    source: Versions, target: Versions, sizes: tuple[int, int]
) -> None:
    written, passed, surplus = walked(source, target, sizes)
    assert written == {n: v for n, v in source.items() if target.get(n) != v}
    assert passed == sorted(source)
    assert surplus == sorted(target.keys() - source.keys())


@given(SIDES, st.tuples(st.integers(1, 7), st.integers(1, 7)))
def test_equal_sides_do_not_differ(side: Versions, sizes: tuple[int, int]) -> None:
    assert walked(side, side, sizes) == ({}, sorted(side), [])


@pytest.mark.parametrize("ids", [[1, 3, 2], [1, 2, 2]])
def test_ids_out_of_order_are_refused(ids: list[int]) -> None:
    page = entries_of({1: 0, 2: 0, 3: 0})
    wrong = Entries(np.array(ids, np.uint64), page.keys, page.values, page.provenance)
    with pytest.raises(StorageError, match="not in the order of ids"):
        list(in_order([wrong]))
    with pytest.raises(StorageError, match="after id 1 are not in"):
        list(in_order([page.slice(0, 1), page.slice(0, 1)]))


@pytest.mark.parametrize(
    ("policy", "written"), [(keep, []), (replace, [2, 3, 4]), (newer, [3]), (differing, [3, 4])]
)
def test_of_entries_that_both_have(policy: OnConflict, written: list[int]) -> None:
    """Entry 2 is the same, 3 was made later, 4 earlier; 1 and 9 have no counterpart."""
    ours, theirs = entries_of({1: 0, 2: 0, 3: 0, 4: 0}), entries_of({2: 0, 3: 1, 4: 1, 9: 0})
    times = [
        made_at(origin, ms) for origin, ms in zip(ours.provenance, (1, 1000, 2000, 1), strict=True)
    ]
    ours = Entries(ours.ids, ours.keys, ours.values, times)
    to_write, added, only_in_sink = difference(ours, theirs, policy)
    assert to_write.ids.tolist() == [1, *written]
    assert added == 1
    assert only_in_sink.tolist() == [9]


def made_at(origin: Provenance, created_unix_ms: int) -> Provenance:
    return dataclasses.replace(origin, created_unix_ms=created_unix_ms)


def test_a_sink_that_holds_none_of_a_page_is_not_read_for_it() -> None:
    read: list[int] = []

    def sink() -> Iterator[Entries]:
        for page in paged(dict.fromkeys(range(0, 100, 2), 0), 5):
            read.append(int(page.ids[0]))
            yield page

    theirs = set(range(0, 100, 2))
    steps = joined(
        paged({1: 0, 3: 0, 4: 0, 5: 0, 95: 0, 97: 0}, 2),
        sink(),
        lambda ids: bool(theirs & set(ids.tolist())),
    )
    both = [
        number
        for ours, other in steps
        for number in set(ours.ids.tolist()) & set(other.ids.tolist())
    ]
    assert both == [4]
    assert read == [0]

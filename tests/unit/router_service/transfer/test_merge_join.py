"""Two sides of a layer, joined page by page, against sets of ids."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_service.arrays import MAX_ENTRY_ID, Entries
from router_service.errors import StorageError
from router_service.transfer.copying import difference, differing, in_order, joined
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

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from router_service.arrays import (
    Entries,
    ExampleRef,
    HitCounts,
    OwnAssignments,
    mixed_ids,
    require_ascending,
    rows_of,
)
from router_service.errors import InvalidTensor
from router_service.retention import scores
from router_service.retention.scores import LayerReading
from tests.unit.router_service.retention import plain_pruning as plain
from tests.unit.router_service.retention.pruning_memories import (
    ASSIGNMENTS,
    DELTAS,
    EXPERTS,
    LOGITS,
    READINGS,
    layers,
    random_entries,
)


@given(layers(), st.dictionaries(st.integers(0, 400), st.integers(0, 9)))
def test_hits_of_ids_that_were_never_retrieved_are_0(
    entries: Entries, hits: dict[int, int]
) -> None:
    expected = [hits.get(int(number), 0) for number in entries.ids]
    assert scores.use(entries, HitCounts.of(hits), None).tolist() == expected


@given(layers(DELTAS))
def test_the_strength_of_a_delta_is_its_norm(entries: Entries) -> None:
    expected = [np.hypot.reduce(row.astype(float)) for row in entries.values]
    np.testing.assert_allclose(scores.strength(entries, DELTAS, None), expected, rtol=1e-12)


@given(layers(LOGITS))
def test_strength_of_logits_is_how_far_apart_they_are(entries: Entries) -> None:
    expected = np.std(entries.values.astype(float), axis=1) * EXPERTS**0.5
    np.testing.assert_allclose(scores.strength(entries, LOGITS, None), expected, rtol=1e-12)


@given(layers(ASSIGNMENTS), st.data())
def test_the_strength_of_an_assignment_is_its_distance_to_own_or_uniform(
    entries: Entries, data: st.DataObject
) -> None:
    known = data.draw(arrays.arrays(np.bool_, len(entries)))
    own_rows = random_entries(len(entries), ASSIGNMENTS, seed=7).values
    own = OwnAssignments(entries.ids[known], own_rows[known])
    found = scores.strength(entries, ASSIGNMENTS, own)
    for row, value in enumerate(entries.values):
        other = plain.dense(own_rows[row], ASSIGNMENTS) if known[row] else [1.0] * EXPERTS
        mine = plain.dense(value, ASSIGNMENTS)
        assert found[row] == pytest.approx(1 - plain.agreement(mine, other, ASSIGNMENTS), abs=1e-12)


def test_an_assignment_that_is_the_routers_own_has_no_strength() -> None:
    entries = random_entries(20, ASSIGNMENTS)
    own = OwnAssignments(entries.ids, entries.values)
    assert not scores.strength(entries, ASSIGNMENTS, own).any()
    assert (scores.strength(entries, ASSIGNMENTS, None) > 0).all()


@given(layers())
def test_examples_and_sources_are_told_apart(entries: Entries) -> None:
    examples = frozenset({ExampleRef("source 0", "example 1")})
    found = scores.outside(entries, examples, frozenset({"source 1"}))
    for row, origin in enumerate(entries.provenance):
        inside = origin.source == "source 1" or origin.example == "example 1"
        assert found[row] == (0 if inside else 1)


@given(
    arrays.arrays(np.float64, st.integers(0, 12), elements=st.integers(0, 3).map(float)),
    st.integers(-2, 14),
    st.data(),
)
def test_the_lowest_go_and_of_equals_the_later_row(
    ranked: np.ndarray, drop: int, data: st.DataObject
) -> None:
    among = data.draw(arrays.arrays(np.bool_, len(ranked)))
    kept = np.flatnonzero(among).tolist()
    expected = plain.lowest(lambda row: ranked[row], kept, len(kept) - max(0, drop))
    assert set(np.flatnonzero(scores.lowest(ranked, among, drop)).tolist()) == expected


def test_an_infinite_score_goes_last() -> None:
    ranked = np.array([np.inf, 2.0, np.inf, -1.0])
    assert scores.lowest(ranked, np.ones(4, np.bool_), 3).tolist() == [False, True, True, True]


def test_a_hash_depends_on_id_and_seed_alone() -> None:
    ids = np.arange(1000, dtype=np.uint64)
    np.testing.assert_array_equal(mixed_ids(ids, 5)[::-1], mixed_ids(ids[::-1], 5))
    assert len(np.unique(mixed_ids(ids, 5))) == 1000
    ranks = np.argsort(np.argsort([mixed_ids(ids, seed) for seed in (0, 1)], axis=1), axis=1)
    assert abs(np.corrcoef(ranks)[0, 1]) < 0.1
    assert abs(np.corrcoef(ranks[0], ids.astype(float))[0, 1]) < 0.1
    np.testing.assert_array_equal(mixed_ids(ids, -1), mixed_ids(ids, 2**64 - 1))


def test_rows_of_ids_that_are_not_there() -> None:
    table = np.array([3, 7, 9], np.uint64)
    rows, known = rows_of(table, np.array([[7, 8], [2**64 - 1, 3]], np.uint64))
    assert known.tolist() == [[True, False], [False, True]]
    assert rows.tolist() == [[1, 0], [0, 0]]
    assert not rows_of(table[:0], table)[1].any()


@pytest.mark.parametrize("ids", [[3, 3], [4, 3], [[1], [2]]])
def test_tables_have_ascending_ids(ids: list[int]) -> None:
    with pytest.raises(InvalidTensor, match="ascending"):
        require_ascending("hits.ids", np.array(ids, np.uint64), len(ids))


@READINGS
def test_scoring_leaves_its_inputs_alone(reading: LayerReading) -> None:
    entries = random_entries(10, reading)
    values = entries.values.copy()
    scores.strength(entries, reading, None)
    np.testing.assert_array_equal(entries.values, values)

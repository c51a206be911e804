from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_service.arrays import Entries, Provenance
from router_service.backends.base import Metric
from router_service.memories.settings import Similarity
from router_service.retention import policies
from router_service.retention.plan import Forget, NearDuplicates, PrunePlan
from router_service.retention.pruning import PruneOptions, plan_prune
from router_service.retention.scores import LayerReading
from tests.unit.router_service.retention import plain_pruning as plain
from tests.unit.router_service.retention.pruning_memories import (
    ASSIGNMENTS,
    DELTAS,
    READINGS,
    filled,
    layers,
    pruned,
    random_entries,
    settings_of,
    with_provenance,
)


@READINGS
@pytest.mark.parametrize("similarity", [1.0, 0.85, 0.7])
@settings(max_examples=40)
@given(data=st.data())
def test_against_all_pairs(reading: LayerReading, similarity: float, data: st.DataObject) -> None:
    entries: Entries = data.draw(layers(reading))
    policy = NearDuplicates(similarity, data.draw(st.sampled_from([0.45, 0.85, 1.0])))
    result = pruned(entries, policy, reading=reading)
    going = plain.duplicates_of(entries, list(range(len(entries))), reading, policy)
    assert set(result.ids_to_drop.tolist()) == {int(entries.ids[row]) for row in going}


def groups_of(
    groups: int, size: int, reading: LayerReading, *, spread: float = 0.01, seed: int = 0
) -> Entries:
    """Groups far apart, in shuffled order, of entries that say nearly the same; entry i is in group source."""
    random = np.random.default_rng(seed)
    group = random.permutation(np.repeat(np.arange(groups), size))
    n = groups * size
    keys = np.eye(groups)[group] * 50 + random.normal(size=(n, groups)) * spread
    values = random_entries(groups, reading, seed=seed).values[group]
    gains = random.permutation(n)
    provenance = [Provenance(str(group[i]), str(i), gain=float(gains[i])) for i in range(n)]
    return Entries(np.arange(n, dtype=np.uint64), keys.astype(np.float32), values, provenance)


@READINGS
@pytest.mark.parametrize("spread", [0.0, 0.01])
@pytest.mark.parametrize("size", [1, 7, 150])
def test_a_group_keeps_exactly_its_highest_gain(
    reading: LayerReading, spread: float, size: int
) -> None:
    entries = groups_of(4, size, reading, spread=spread)
    result = pruned(entries, NearDuplicates(), reading=reading, page_entries=64)
    staying = set(range(4 * size)) - set(result.ids_to_drop.tolist())
    for group in "0123":
        rows = [row for row in range(4 * size) if entries.provenance[row].source == group]
        best = max(rows, key=lambda row: entries.provenance[row].gain)
        assert staying & set(rows) == {best}


def test_equal_gains_keep_the_smallest_id() -> None:
    entries = groups_of(3, 20, DELTAS)
    entries = with_provenance(entries, gain=[1.0] * 60)
    result = pruned(entries, NearDuplicates())
    staying = set(range(60)) - set(result.ids_to_drop.tolist())
    by_group = {p.source: row for row, p in reversed(list(enumerate(entries.provenance)))}
    assert staying == set(by_group.values())


def test_the_same_key_with_another_value_is_no_duplicate() -> None:
    entries = groups_of(1, 2, DELTAS, spread=0.0)
    opposed = replace(entries, values=np.array([[1, 0, 0, 0], [-1, 0, 0, 0]], np.float32))
    assert pruned(opposed, NearDuplicates()).kept == 2


def test_a_group_whose_best_entry_is_forgotten_keeps_the_next_best() -> None:
    entries = groups_of(1, 5, DELTAS)
    best = max(range(5), key=lambda row: entries.provenance[row].gain)
    sources = ["forgotten" if row == best else "kept" for row in range(5)]
    entries = with_provenance(entries, source=sources)
    result = pruned(entries, NearDuplicates(), Forget(sources=frozenset({"forgotten"})))
    assert result.kept == 1
    assert result.reasons == {"near_duplicates": 3, "forget": 1}
    next_best = max(set(range(5)) - {best}, key=lambda row: entries.provenance[row].gain)
    assert next_best not in result.ids_to_drop


def test_a_chain_loses_only_links_of_those_that_stay() -> None:
    # a - b - c - d along a line, each near the next alone; gains fall: b goes for a, d goes for c.
    keys = np.array([[0.0], [1.0], [2.0], [3.0]], np.float32)
    provenance = [Provenance("s", str(row), gain=-float(row)) for row in range(4)]
    values = np.ones((4, 4), np.float32)
    entries = Entries(np.arange(4, dtype=np.uint64), keys, values, provenance)
    assert pruned(entries, NearDuplicates(similarity=0.85)).ids_to_drop.tolist() == [1, 3]


def test_cosine_memories_compare_directions() -> None:
    reading = settings_of(DELTAS, similarity=Similarity.COSINE)
    keys = np.array([[1, 0], [5, 0.01], [0, 1]], np.float32)
    provenance = [Provenance("s", str(row)) for row in range(3)]
    entries = Entries(np.arange(3, dtype=np.uint64), keys, np.ones((3, 4), np.float32), provenance)
    plan = PrunePlan([NearDuplicates()])
    result = plan_prune(filled(entries, Metric.COSINE), plan, reading, PruneOptions())
    assert result.ids_to_drop.tolist() == [1]


def test_a_group_too_large_to_see_whole_shrinks_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("router_service.retention.run.MAX_WIDTH", 16)
    monkeypatch.setattr(policies, "MAX_LINKS", 8)
    entries = groups_of(1, 300, DELTAS, spread=0.0)
    rounds = []
    while True:
        result = pruned(entries, NearDuplicates(), page_entries=32)
        rounds.append(result.kept)
        if not len(result.ids_to_drop):
            break
        assert rounds != [1] or result.incomplete_searches
        left = ~np.isin(entries.ids, result.ids_to_drop)
        entries = Entries(
            entries.ids[left],
            entries.keys[left],
            entries.values[left],
            [p for p, stays in zip(entries.provenance, left, strict=True) if stays],
        )
    assert rounds[0] < 100
    assert rounds[-1] == 1


def test_links_are_complete_for_entries_with_more_of_them_than_a_first_search_shows() -> None:
    entries = groups_of(1, 40, ASSIGNMENTS)
    result = pruned(entries, NearDuplicates(), reading=ASSIGNMENTS)
    assert (result.kept, result.incomplete_searches) == (1, 0)


@given(st.integers(1, 12), st.integers(0, 1000))
def test_everyone_who_goes_is_linked_to_one_that_stays(n: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    near = np.triu(random.random((n, n)) < 0.3, 1)
    near |= near.T
    place = policies.gain_ranks(random.integers(0, 3, n).astype(float))
    rows = np.arange(n)
    neighbour_rows = np.broadcast_to(rows, (n, n))
    links = policies.links_to_better(rows, neighbour_rows, near, place, np.zeros(n, np.bool_))
    gone = policies.sent_away(links, place)
    for row in rows:
        better = near[row] & ~gone & (place < place[row])
        assert gone[row] == better.any()

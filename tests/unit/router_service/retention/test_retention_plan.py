"""How policies combine: the hard ones as a union, then agreement, then duplicates, then the size, then the guard."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_service.arrays import Entries, ExampleRef, HitCounts
from router_service.errors import InvalidField
from router_service.retention.plan import (
    Age,
    Agreement,
    Coverage,
    Forget,
    Gain,
    NearDuplicates,
    PrunePlan,
    Random,
    Strength,
    Use,
)
from router_service.retention.pruning import PruneOptions, plan_prune
from router_service.retention.scores import LayerReading
from tests.unit.router_service.retention import plain_pruning as plain
from tests.unit.router_service.retention.pruning_memories import (
    DELTAS,
    READINGS,
    filled,
    layers,
    pruned,
    random_entries,
)

RANKINGS = [
    Age(),
    Gain(),
    Strength(),
    Agreement(neighbours=3),
    Coverage(block_entries=8),
    Random(seed=3),
]


def dropped_rows(entries: Entries, ids: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.isin(entries.ids, ids)).tolist())


def expected(
    entries: Entries,
    reading: LayerReading,
    *,
    age: int,
    fewer: int,
    hits: dict[int, int],
    size: int,
    least: int,
) -> tuple[set[int], dict[str, int], int]:
    """Rows that go, counts and rescued of the plan in `test_streamed_equals_plain`, in plain Python."""
    rows = range(len(entries))
    origins = entries.provenance
    by: dict[str, set[int]] = {
        "forget": {r for r in rows if origins[r].example == "example 1"},
        "age": {r for r in rows if origins[r].created_unix_ms < age},
        "use": {r for r in rows if hits.get(int(entries.ids[r]), 0) < fewer},
        "gain": {r for r in rows if origins[r].gain < 1},
    }
    left = [r for r in rows if not any(r in going for going in by.values())]
    judged = plain.leave_one_out(entries, left, reading, Agreement(neighbours=3))
    by["agreement"] = {r for r in left if judged[r] < 0.12}
    left = [r for r in left if r not in by["agreement"]]
    by["near_duplicates"] = plain.duplicates_of(entries, left, reading, NearDuplicates(0.7, 0.85))
    left = [r for r in left if r not in by["near_duplicates"]]
    by["max_entries_by_age"] = plain.lowest(lambda r: origins[r].created_unix_ms, left, size)
    left = [r for r in left if r not in by["max_entries_by_age"]]
    merits = {
        "near_duplicates": lambda r: origins[r].gain,
        "agreement": lambda r: judged[r],
        "gain": lambda r: origins[r].gain,
        "use": lambda r: hits.get(int(entries.ids[r]), 0),
        "age": lambda r: origins[r].created_unix_ms,
    }
    order = ["forget", "age", "use", "gain", "agreement", "near_duplicates"]
    candidates = []
    for row in sorted(set(rows) - set(left) - by["forget"] - by["max_entries_by_age"]):
        first = next(name for name in order if row in by[name])
        candidates.append((-order.index(first), -merits[first](row), row))
    back = {row for _, _, row in sorted(candidates)[: max(0, least - len(left))]}
    counts = {name: len(going - back) for name, going in by.items()}
    return set(rows) - set(left) - back, counts, len(back)


@READINGS
@settings(max_examples=40)
@given(data=st.data())
def test_streamed_equals_plain(reading: LayerReading, data: st.DataObject) -> None:
    entries = data.draw(layers(reading))
    age, fewer = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 3))
    ids = st.sampled_from(entries.ids.tolist() or [0])
    hits = data.draw(st.dictionaries(ids, st.integers(0, 4)))
    size = data.draw(st.integers(1, 20))
    remembered = sum(p.example != "example 1" for p in entries.provenance)
    least = data.draw(st.integers(0, min(size, remembered)))
    policies = [
        Age(age),
        Forget(examples=_example_1()),
        Use(HitCounts.of(hits), fewer),
        Gain(below=1.0),
        Agreement(below=0.12, neighbours=3),
        NearDuplicates(0.7, 0.85),
        Age(),
    ]
    shuffled = data.draw(st.permutations(policies))
    result = pruned(
        entries,
        *shuffled,
        reading=reading,
        max_entries=size,
        keep_at_least=least,
        page_entries=data.draw(st.integers(1, 50)),
    )
    rows, counts, rescued = expected(
        entries, reading, age=age, fewer=fewer, hits=hits, size=size, least=least
    )
    assert dropped_rows(entries, result.ids_to_drop) == rows
    assert (result.reasons, result.rescued) == (counts, rescued)
    assert (result.entries, result.kept) == (len(entries), len(entries) - len(rows))


def _example_1() -> frozenset[ExampleRef]:
    return frozenset(ExampleRef(f"source {n}", "example 1") for n in (0, 1))


@pytest.mark.parametrize("ranking", RANKINGS, ids=lambda policy: policy.name)
@READINGS
def test_a_maximum_size_is_met_exactly(ranking: Age, reading: LayerReading) -> None:
    entries = random_entries(30, reading)
    for size in (1, 7, 30, 31):
        result = pruned(entries, ranking, reading=reading, max_entries=size)
        assert result.kept == min(30, size)
        assert result.reasons == {f"max_entries_by_{ranking.name}": 30 - result.kept}


def test_the_score_decides_who_goes_and_ties_keep_the_smaller_id() -> None:
    entries = random_entries(30)
    result = pruned(entries, Gain(), max_entries=11)
    going = plain.lowest(lambda r: entries.provenance[r].gain, list(range(30)), 11)
    assert dropped_rows(entries, result.ids_to_drop) == going


def test_nobody_is_dropped_below_the_maximum_size() -> None:
    assert not len(pruned(random_entries(10), Gain(), max_entries=10).ids_to_drop)


def test_an_entry_keeps_all_its_reasons() -> None:
    entries = random_entries(20)
    result = pruned(entries, Gain(below=2.0), Age(older_than_unix_ms=5))
    bits = dict(zip(result.ids_to_drop.tolist(), result.reason_bits.tolist(), strict=True))
    for entry, origin in zip(entries.ids.tolist(), entries.provenance, strict=True):
        wanted = (origin.gain < 2) * 1 + (origin.created_unix_ms < 5) * 2
        assert bits.get(entry, 0) == wanted
    assert sum(result.reasons.values()) > len(result.ids_to_drop)


def test_an_empty_layer_has_nothing_to_prune() -> None:
    every = [Age(5), Forget(sources=frozenset({"a"})), NearDuplicates(), Agreement(below=0.0)]
    for ranking in RANKINGS:
        if isinstance(ranking, Age):
            continue
        plan = PrunePlan([*every, ranking], keep_at_least=1, max_entries=1)
        result = plan_prune(filled(random_entries(0)), plan, DELTAS)
        assert (result.entries, result.kept, result.bytes_estimate) == (0, 0, 0)
        assert result.expected_effect == {}
        assert not any(result.reasons.values())


@pytest.mark.parametrize("least", [0, 1, 6, 20, 99])
def test_the_guard_keeps_the_newest_when_all_are_too_old(least: int) -> None:
    entries = random_entries(20)
    result = pruned(entries, Age(older_than_unix_ms=100), keep_at_least=least)
    assert result.kept == result.rescued == min(20, least)
    created = [p.created_unix_ms for p in entries.provenance]
    going = dropped_rows(entries, result.ids_to_drop)
    staying = [created[r] for r in range(20) if r not in going]
    assert not staying or not going or min(staying) >= max(created[r] for r in going)


def test_the_guard_takes_back_the_softer_reason_first() -> None:
    entries = random_entries(20)
    plan = [Age(older_than_unix_ms=5), Gain(below=9.0)]
    young = sum(p.created_unix_ms >= 5 for p in entries.provenance)
    result = pruned(entries, *plan, keep_at_least=young)
    assert result.reasons["age"] == 20 - young == len(result.ids_to_drop)


def test_forgetting_is_never_undone_but_refused() -> None:
    entries = random_entries(20)
    forget = Forget(sources=frozenset({"source 0"}))
    result = pruned(entries, forget, Age(older_than_unix_ms=100), keep_at_least=10)
    assert result.reasons["forget"] == 10 == len(result.ids_to_drop)
    with pytest.raises(InvalidField, match=r"keep_at_least: got 11, expected at most 10"):
        pruned(entries, forget, keep_at_least=11)
    with pytest.raises(InvalidField, match="keep_at_least"):
        pruned(entries, Forget(sources=frozenset({"source 0", "source 1"})), keep_at_least=1)
    assert pruned(entries, Forget(sources=frozenset({"source 0", "source 1"}))).kept == 0


def test_a_document_is_forgotten_and_nothing_else() -> None:
    entries = random_entries(20)
    result = pruned(entries, Forget(examples=frozenset({ExampleRef("source 1", "example 2")})))
    gone = [entries.provenance[row] for row in sorted(dropped_rows(entries, result.ids_to_drop))]
    assert {(p.source, p.example) for p in gone} == {("source 1", "example 2")}
    assert len(gone) == 2


def test_new_entries_are_spared_for_want_of_hits() -> None:
    entries = random_entries(20)
    nobody = HitCounts.of({})
    assert pruned(entries, Use(nobody, fewer_than=1)).kept == 0
    result = pruned(entries, Use(nobody, fewer_than=1, spare_created_from_unix_ms=5))
    assert result.kept == sum(p.created_unix_ms >= 5 for p in entries.provenance)


@pytest.mark.parametrize("ranking", RANKINGS, ids=lambda policy: policy.name)
def test_the_same_call_gives_the_same_result(ranking: Age) -> None:
    entries = random_entries(40)
    plan = PrunePlan([NearDuplicates(0.7, 0.85), ranking], max_entries=9)
    one, other = (plan_prune(filled(entries), plan, DELTAS) for _ in range(2))
    np.testing.assert_array_equal(one.ids_to_drop, other.ids_to_drop)
    assert one.reasons == other.reasons
    assert one.expected_effect == other.expected_effect


def test_another_seed_is_another_control_and_a_smaller_size_a_subset() -> None:
    entries = random_entries(40)
    kept = {
        (seed, size): set(entries.ids.tolist())
        - set(pruned(entries, Random(seed), max_entries=size).ids_to_drop.tolist())
        for seed in (0, 1)
        for size in (5, 20)
    }
    assert kept[0, 20] != kept[1, 20]
    assert kept[0, 5] < kept[0, 20]


def test_progress_is_told_and_raising_cancels() -> None:
    class Cancelled(Exception):
        pass

    seen: list[tuple[str, int]] = []
    plan = PrunePlan([NearDuplicates(), Coverage()], max_entries=3)
    options = PruneOptions(4, 0, on_page=lambda stage, done: seen.append((stage, done)))
    plan_prune(filled(random_entries(10)), plan, DELTAS, options)
    assert seen[:3] == [("read", 4), ("read", 8), ("read", 10)]
    assert {stage for stage, _ in seen} == {"read", "near_duplicates", "coverage"}

    def cancel(stage: str, _: int) -> None:
        if stage == "near_duplicates":
            raise Cancelled

    with pytest.raises(Cancelled):
        plan_prune(filled(random_entries(10)), plan, DELTAS, PruneOptions(on_page=cancel))


def test_planning_changes_nothing() -> None:
    entries = random_entries(30)
    collection = filled(entries)
    before = collection.scroll(None, 99)
    pruned_plan = PrunePlan([NearDuplicates(0.7, 0.85), Random()], max_entries=2)
    plan_prune(collection, pruned_plan, DELTAS)
    after = collection.scroll(None, 99)
    for name in ("ids", "keys", "values"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))

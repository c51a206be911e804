from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_service.arrays import Entries, Provenance
from router_service.retention.plan import Age, Agreement, Forget
from router_service.retention.scores import LayerReading
from tests.unit.router_service.retention import plain_pruning as plain
from tests.unit.router_service.retention.pruning_memories import (
    ASSIGNMENTS,
    DELTAS,
    READINGS,
    layers,
    pruned,
    with_provenance,
)


@READINGS
@settings(max_examples=40)
@given(data=st.data())
def test_against_one_entry_at_a_time(reading: LayerReading, data: st.DataObject) -> None:
    entries: Entries = data.draw(layers(reading))
    neighbours = data.draw(st.integers(1, 6))
    policy = Agreement(neighbours=neighbours, min_similarity=data.draw(st.sampled_from([0, 0.7])))
    judged = plain.leave_one_out(entries, list(range(len(entries))), reading, policy)
    below = data.draw(st.sampled_from([0.111, 0.5123, 0.9123]))
    result = pruned(
        entries,
        Agreement(below, policy.neighbours, policy.min_similarity),
        reading=reading,
        page_entries=data.draw(st.integers(1, 9)),
    )
    going = {int(entries.ids[row]) for row, score in judged.items() if score < below}
    assert set(result.ids_to_drop.tolist()) == going


def planted(reading: LayerReading, n: int = 120, bad: int = 6) -> tuple[Entries, set[int]]:
    """Two neighbourhoods that each say one thing, and `bad` entries in them that say the other's."""
    random = np.random.default_rng(1)
    side = np.arange(n) % 2
    keys = side[:, None] * 20 + random.normal(size=(n, 6)) * 0.3
    wrong = set(random.choice(n, bad, replace=False).tolist())
    if reading.settings.kind.blends_logits:
        said = np.array([[1, -1, 0.5, 0], [-1, 0.5, 0, 1]])
        noise = random.normal(size=(n, 4)) * 0.1
    else:
        said = np.array([[0, 1, 0.6, 0.4], [2, 3, 0.7, 0.3]])
        noise = random.random((n, 4)) * [0, 0, 0.1, 0.1]
    says = np.array([1 - side[row] if row in wrong else side[row] for row in range(n)])
    provenance = [Provenance("s", str(row // 3)) for row in range(n)]
    values = (said[says] + noise).astype(np.float32)
    entries = Entries(np.arange(n, dtype=np.uint64), keys.astype(np.float32), values, provenance)
    return entries, wrong


@READINGS
def test_planted_bad_entries_rank_first(reading: LayerReading) -> None:
    entries, wrong = planted(reading)
    result = pruned(entries, Agreement(), reading=reading, max_entries=120 - len(wrong))
    assert set(result.ids_to_drop.tolist()) == wrong


@READINGS
def test_planted_bad_entries_fall_below_a_threshold(reading: LayerReading) -> None:
    entries, wrong = planted(reading)
    result = pruned(entries, Agreement(below=0.4), reading=reading)
    assert set(result.ids_to_drop.tolist()) == wrong


def test_the_own_example_is_no_witness() -> None:
    entries, _ = planted(DELTAS, bad=0)
    opposed = entries.values.copy()
    opposed[:3] *= -1  # a whole example that is wrong: its entries support each other
    entries = Entries(entries.ids, entries.keys, opposed, entries.provenance)
    assert pruned(entries, Agreement(below=0.0)).ids_to_drop.tolist() == [0, 1, 2]


def test_nobody_judges_the_only_example_or_the_far_away() -> None:
    entries, _ = planted(DELTAS)
    alone = with_provenance(entries, example=["one"] * 120)
    assert pruned(alone, Agreement(below=1.0)).kept == 120
    apart = Entries(entries.ids[:2], entries.keys[:2], entries.values[:2], entries.provenance[:2])
    apart = with_provenance(apart, example=["one", "other"])
    assert pruned(apart, Agreement(below=1.0)).kept == 2
    assert pruned(apart, Agreement(), max_entries=1).ids_to_drop.tolist() == [1]


def test_dropped_entries_are_no_witnesses() -> None:
    # Everyone in the bad source agrees with the others of it; once they are forgotten, their like stand alone.
    entries, wrong = planted(DELTAS, n=90, bad=0)
    sources = ["bad" if row % 2 == 0 and row >= 10 else "good" for row in range(90)]
    values = entries.values.copy()
    values[::2] *= -1
    values[[0, 2]] *= -1
    entries = with_provenance(
        Entries(entries.ids, entries.keys, values, entries.provenance), source=sources
    )
    assert not wrong
    assert {0, 2} <= set(pruned(entries, Agreement(below=0.0)).ids_to_drop.tolist())
    forgetting = pruned(
        entries, Agreement(below=-2 / 3, neighbours=1), Forget(sources=frozenset({"bad"}))
    )
    judged = plain.leave_one_out(
        entries,
        [row for row in range(90) if sources[row] == "good"],
        DELTAS,
        Agreement(neighbours=1),
    )
    expected = {row for row, score in judged.items() if score < -2 / 3}
    bad = {row for row in range(90) if sources[row] == "bad"}
    assert set(forgetting.ids_to_drop.tolist()) == expected | bad


def test_witnesses_are_found_behind_thousands_of_dropped_entries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entries, wrong = planted(DELTAS, n=300, bad=2)
    created = [row in wrong or row >= 280 for row in range(300)]
    entries = with_provenance(entries, created_unix_ms=[int(new) for new in created])
    policies = [Age(1), Agreement(below=0.0, neighbours=4)]
    result = pruned(entries, *policies)
    assert result.incomplete_searches == 0
    assert result.reasons["agreement"] == len(wrong)
    monkeypatch.setattr("router_service.retention.run.MAX_WIDTH", 8)
    assert pruned(entries, *policies).incomplete_searches > 0


def test_no_overlap_is_the_least_agreement() -> None:
    entries, _ = planted(ASSIGNMENTS)
    judged = plain.leave_one_out(entries, list(range(120)), ASSIGNMENTS, Agreement())
    assert all(0 <= score <= 1 for score in judged.values() if not math.isinf(score))

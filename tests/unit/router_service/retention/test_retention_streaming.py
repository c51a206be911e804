"""The job over a collection: dry-run figures, effect, pages, writes meanwhile, the embedded engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from router_service.arrays import F32, Entries, ExampleRef, Neighbours
from router_service.backends.base import CollectionSpec, Metric, SearchOptions
from router_service.backends.edge.backend import EdgeBackend
from router_service.backends.exact import ExactCollection
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
)
from router_service.retention.pruning import PruneOptions, PruneResult, plan_prune
from router_service.retention.scores import LayerReading
from tests.unit.router_service.retention.pruning_memories import (
    DELTAS,
    READINGS,
    filled,
    random_entries,
)

PLANS = [
    PrunePlan([Age(3), NearDuplicates(0.7, 0.85), Gain()], max_entries=30),
    PrunePlan([Strength(below=0.3), Agreement(neighbours=3)], max_entries=40),
    PrunePlan([Forget(sources=frozenset({"source 1"})), Coverage(16)], max_entries=20),
    PrunePlan([Random(1)], max_entries=11),
]


def assert_same(one: PruneResult, other: PruneResult) -> None:
    np.testing.assert_array_equal(one.ids_to_drop, other.ids_to_drop)
    np.testing.assert_array_equal(one.reason_bits, other.reason_bits)
    assert (one.reasons, one.kept, one.rescued) == (other.reasons, other.kept, other.rescued)
    assert one.expected_effect == pytest.approx(other.expected_effect, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
@READINGS
def test_pages_do_not_show_in_the_result(plan: PrunePlan, reading: LayerReading) -> None:
    collection = filled(random_entries(100, reading))
    whole = plan_prune(collection, plan, reading, PruneOptions(page_entries=1000))
    for page_entries in (1, 7, 100):
        options = PruneOptions(page_entries=page_entries)
        assert_same(plan_prune(collection, plan, reading, options), whole)


@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
def test_the_embedded_engine_agrees_with_the_oracle(plan: PrunePlan, tmp_path: Path) -> None:
    entries = random_entries(100)
    random = np.random.default_rng(9)  # without ties in distance, which engines break as they like
    keys = entries.keys + random.normal(size=entries.keys.shape).astype(np.float32) * 0.05
    entries = Entries(entries.ids, keys, entries.values, entries.provenance)
    backend = EdgeBackend(tmp_path / "data", min_free_bytes=0)
    try:
        spec = CollectionSpec(keys.shape[1], Metric.EUCLID, entries.values.shape[1])
        collection = backend.create("memory/layer-000", spec)
        collection.upsert(entries)
        found = plan_prune(collection, plan, DELTAS)
        disk_bytes = collection.info().disk_bytes
    finally:
        backend.close()
    assert_same(found, plan_prune(filled(entries), plan, DELTAS))
    assert found.bytes_estimate == disk_bytes * len(found.ids_to_drop) // 100


def test_a_dry_run_counts_entries_and_bytes() -> None:
    entries = random_entries(100)
    result = plan_prune(filled(entries), PrunePlan([Random()], max_entries=60), DELTAS)
    assert (result.entries, len(result.ids_to_drop), result.kept) == (100, 40, 60)
    assert result.reasons == {"max_entries_by_random": 40}
    assert result.bytes_estimate == 40 * (8 + 4 * 3 + 4 * 4)
    assert result.ids_to_drop.dtype == np.uint64
    assert (np.diff(result.ids_to_drop) > 0).all()


@READINGS
def test_the_effect_is_that_of_a_layer_without_the_dropped_entries(reading: LayerReading) -> None:
    entries = random_entries(100, reading)
    plan = PrunePlan([Random()], max_entries=30)
    result = plan_prune(filled(entries), plan, reading, PruneOptions(effect_queries=100))
    assert result.expected_effect["queries"] == 100
    left = ~np.isin(entries.ids, result.ids_to_drop)
    smaller = Entries(
        entries.ids[left],
        entries.keys[left],
        entries.values[left],
        [p for p, stays in zip(entries.provenance, left, strict=True) if stays],
    )
    for name, collection in (("before", filled(entries)), ("after", filled(smaller))):
        own = [ExampleRef(p.source, p.example) for p in entries.provenance]
        found = collection.search(entries.keys, 4, SearchOptions(), own)
        lambdas = reading.lambdas(reading.similarities(found.distances))
        assert result.expected_effect[f"lambda_{name}"] == pytest.approx(lambdas.mean(), rel=1e-6)
        assert result.expected_effect[f"abstained_{name}"] == (lambdas == 0).mean()
    assert result.expected_effect["lambda_change"] < 0
    assert result.expected_effect["contribution_change"] > 0


def test_no_drop_no_effect_and_no_queries_no_search() -> None:
    collection = filled(random_entries(50))
    plan = PrunePlan([Age(0)])
    effect = plan_prune(collection, plan, DELTAS).expected_effect
    assert effect["lambda_change"] == effect["contribution_change"] == 0
    assert effect["lambda_before"] > 0
    assert (
        plan_prune(collection, plan, DELTAS, PruneOptions(effect_queries=0)).expected_effect == {}
    )


def test_the_sample_is_drawn_by_the_seed_and_independent_of_the_random_control() -> None:
    collection = filled(random_entries(400))
    plan = PrunePlan([Random(seed=0)], max_entries=200)
    stays = set(range(10**6)) - set(plan_prune(collection, plan, DELTAS).ids_to_drop.tolist())
    sampled: list[set[int]] = []

    class Watched(ExactCollection):
        def scroll(self, after: int | None, limit: int, *, with_keys: bool = True) -> Entries:
            page = super().scroll(after, limit, with_keys=with_keys)
            if limit == 1:
                sampled[-1].add(int(page.ids[0]))
            return page

    for seed in (0, 0, 1):
        sampled.append(set())
        watched = Watched(collection.spec)
        watched.upsert(collection.scroll(None, 1000))
        plan_prune(watched, plan, DELTAS, PruneOptions(seed=seed, effect_queries=100))
    assert sampled[0] == sampled[1] != sampled[2]
    assert 30 < len(sampled[0] & stays) < 70


class Sized(ExactCollection):
    """Remembers the most keys and neighbours' values that one call returned."""

    most_keys = 0
    most_values = 0

    def scroll(self, after: int | None, limit: int, *, with_keys: bool = True) -> Entries:
        page = super().scroll(after, limit, with_keys=with_keys)
        self.most_keys = max(self.most_keys, len(page) if with_keys else 0)
        return page

    def search(
        self, queries: F32, k: int, options: SearchOptions, exclude: Sequence[ExampleRef] = ()
    ) -> Neighbours:
        found = super().search(queries, k, options, exclude)
        self.most_values = max(self.most_values, found.values.size)
        return found


@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
def test_no_call_asks_for_more_than_a_page(
    plan: PrunePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router_service.retention.run._MAX_NUMBERS", 512)
    entries = random_entries(100)
    collection = Sized(filled(entries).spec)
    collection.upsert(entries)
    plan_prune(collection, plan, DELTAS, PruneOptions(page_entries=9))
    assert collection.most_keys <= 9
    assert collection.most_values <= 512


class Busy(ExactCollection):
    """Gets new entries between the passes, and loses some."""

    def __init__(self, spec: CollectionSpec, later: Entries) -> None:
        super().__init__(spec)
        self._later = later

    def scroll(self, after: int | None, limit: int, *, with_keys: bool = True) -> Entries:
        if with_keys and len(self._later):
            later, self._later = self._later, self._later.slice(0, 0)
            self.upsert(later)
            self._entries = self._entries.slice(3, len(self._entries))
        return super().scroll(after, limit, with_keys=with_keys)


@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
@READINGS
def test_entries_written_meanwhile_stay(plan: PrunePlan, reading: LayerReading) -> None:
    both = random_entries(120, reading)
    order = np.random.default_rng(0).permutation(120)
    old, new = np.sort(order[:100]), np.sort(order[100:])
    parts = [
        Entries(both.ids[r], both.keys[r], both.values[r], [both.provenance[i] for i in r])
        for r in (old, new)
    ]
    collection = Busy(filled(both).spec, parts[1])
    collection.upsert(parts[0])
    result = plan_prune(collection, plan, reading, PruneOptions(page_entries=16))
    assert result.entries == 100
    assert not set(result.ids_to_drop.tolist()) & set(parts[1].ids.tolist())


def test_ids_at_both_ends_of_the_range() -> None:
    entries = random_entries(3)
    entries = Entries(
        np.array([0, 1, 2**63 - 1], np.uint64), entries.keys, entries.values, entries.provenance
    )
    plan = PrunePlan([Random()], max_entries=1)
    result = plan_prune(filled(entries), plan, DELTAS)
    assert result.kept == 1
    assert result.expected_effect["queries"] == 3

"""Pruning deletes what its plan says and nothing else, also when it is cancelled or written to."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from router_service.arrays import Entries, ExampleRef, HitCounts, Provenance
from router_service.backends.base import Report, say_nothing
from router_service.backends.exact import ExactBackend
from router_service.errors import Cancelled, InvalidField
from router_service.fingerprint import ModelFingerprint
from router_service.jobs.prune import LayerPruning, PruneRequest, prune
from router_service.memories.memory import RoutingMemory
from router_service.memories.settings import MemorySettings
from router_service.memories.store import MemoryStore
from router_service.retention.plan import Age, Forget, Gain, PrunePlan, Use

MODEL = ModelFingerprint("tiny", 3, 4, 5, 2, "ab")
NO_HITS = HitCounts.of({})


def _entries(rows: int) -> Entries:
    """Entry i has gain i and was made at i + 1."""
    rng = np.random.default_rng(0)
    return Entries(
        np.arange(rows, dtype=np.uint64),
        rng.normal(size=(rows, MODEL.hidden_size)).astype(np.float32),
        rng.normal(size=(rows, MODEL.num_experts)).astype(np.float32),
        [
            Provenance(f"s{i % 2}", f"e{i % 5}", i, gain=i, created_unix_ms=i + 1)
            for i in range(rows)
        ],
    )


@pytest.fixture
def memory() -> Iterator[RoutingMemory]:
    """1,000 entries in layer 0, 100 in layer 1, none in layer 2."""
    store = MemoryStore(ExactBackend(), None)
    made = store.create("m", MODEL, MemorySettings())
    made.upsert(0, MODEL.digest(), _entries(1000))
    made.upsert(1, MODEL.digest(), _entries(100))
    yield made
    store.close()


def _prune(
    memory: RoutingMemory,
    plan: PrunePlan,
    *,
    share: float | None = None,
    dry_run: bool = False,
    report: Report = say_nothing,
) -> list[LayerPruning]:
    request = PruneRequest(plan, share)
    return list(prune(memory, memory.layers, request, dry_run=dry_run, report=report))


def _sizes(memory: RoutingMemory) -> list[int]:
    return [layer.info().entries for layer in memory.layers]


def test_each_layer_by_its_own_plan(memory: RoutingMemory) -> None:
    done = _prune(memory, PrunePlan([Gain(below=50)]))
    assert [(one.layer, one.deleted, one.spared) for one in done] == [
        (0, 50, 0),
        (1, 50, 0),
        (2, 0, 0),
    ]
    assert [one.result.entries for one in done] == [1000, 100, 0]
    assert _sizes(memory) == [950, 50, 0]
    assert _prune(memory, PrunePlan([Gain(below=50)]))[0].deleted == 0


def test_a_dry_run_changes_nothing(memory: RoutingMemory) -> None:
    before = memory.version
    done = _prune(memory, PrunePlan([Gain(below=50)]), dry_run=True)
    assert [len(one.result.ids_to_drop) for one in done] == [50, 50, 0]
    assert [one.deleted for one in done] == [0, 0, 0]
    assert (_sizes(memory), memory.version) == ([1000, 100, 0], before)


def test_a_share_is_of_each_layer(memory: RoutingMemory) -> None:
    _prune(memory, PrunePlan([Gain()], max_entries=1), share=0.3)
    assert _sizes(memory) == [300, 30, 0]


def test_a_share_keeps_at_least_what_is_to_be_kept(memory: RoutingMemory) -> None:
    _prune(memory, PrunePlan([Gain()], keep_at_least=60, max_entries=60), share=0.3)
    assert _sizes(memory) == [300, 60, 0]


def test_use_is_by_the_hits_of_the_layer(memory: RoutingMemory) -> None:
    used = np.array([[3, 4, 5]], np.uint64)
    memory.layer(1).hits.note(used, np.ones((1, 3), np.float32), np.array([True]))
    _prune(memory, PrunePlan([Use(NO_HITS, fewer_than=1)]))
    assert memory.layer(1).collection.scroll(None, 9).ids.tolist() == [3, 4, 5]
    assert memory.layer(0).info().entries == 1  # keep_at_least


def test_forgetting_leaves_nothing(memory: RoutingMemory) -> None:
    examples = frozenset({ExampleRef("s1", "e1")})
    _prune(memory, PrunePlan([Forget(examples, frozenset({"s0"}))]))
    for layer in memory.layers:
        for origin in layer.collection.scroll(None, 2000).provenance:
            assert origin.source == "s1"
            assert origin.example != "e1"


def test_a_plan_that_one_layer_refuses_changes_none(memory: RoutingMemory) -> None:
    with pytest.raises(InvalidField, match="keep_at_least"):
        _prune(memory, PrunePlan([Forget(sources=frozenset({"s0"}))], keep_at_least=80))
    assert _sizes(memory) == [1000, 100, 0]


def test_cancelled_while_planning(memory: RoutingMemory) -> None:
    def report(stage: str, done: int, total: int) -> None:
        if stage.startswith("layer 1"):
            raise Cancelled("stop")

    with pytest.raises(Cancelled, match=r"^stop$"):
        _prune(memory, PrunePlan([Gain(below=900)]), report=report)
    assert _sizes(memory) == [1000, 100, 0]


def test_cancelled_while_deleting(memory: RoutingMemory) -> None:
    """The batches that went stay away, and the error says how many entries that were."""

    def report(stage: str, done: int, total: int) -> None:
        if "delete" in stage and done >= 512:
            raise Cancelled("stop")

    with pytest.raises(Cancelled, match="stop; 512 of 1000 entries were deleted and stay deleted"):
        _prune(memory, PrunePlan([Gain(below=900)], keep_at_least=0), report=report)
    assert _sizes(memory) == [488, 100, 0]
    assert memory.layer(0).collection.scroll(None, 1).ids.tolist() == [512]


def test_progress(memory: RoutingMemory) -> None:
    told: list[tuple[str, int, int]] = []
    _prune(memory, PrunePlan([Gain(below=50)]), report=lambda *step: told.append(step))
    assert ("layer 0: plan, read", 1000, 1000) in told
    assert told[-1] == ("layer 1: delete", 50, 100)


def test_an_entry_that_is_replaced_meanwhile_stays(memory: RoutingMemory) -> None:
    """Replaced after its layer was planned, with other content that the plan would keep."""
    fresh = _entries(1000).slice(7, 8)
    fresh = Entries(fresh.ids, fresh.keys + 1, fresh.values, [Provenance("new", "new", gain=1e6)])

    def report(stage: str, done: int, total: int) -> None:
        if stage == "layer 1: plan, begin":
            memory.upsert(0, MODEL.digest(), fresh)

    done = _prune(memory, PrunePlan([Gain(below=50)]), report=report)
    assert (done[0].deleted, done[0].spared) == (49, 1)
    origins = memory.layer(0).provenance_of(np.arange(50, dtype=np.uint64))
    assert list(origins) == [7]
    assert origins[7].source == "new"


def test_age(memory: RoutingMemory) -> None:
    _prune(memory, PrunePlan([Age(older_than_unix_ms=31)]))
    assert _sizes(memory) == [970, 70, 0]

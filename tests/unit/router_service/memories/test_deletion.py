"""Entries go by id, source or example; the others, and what is written meanwhile, stay."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from router_service.arrays import Entries, Provenance
from router_service.backends.exact import ExactBackend
from router_service.fingerprint import ModelFingerprint
from router_service.memories.deletion import EntryFilter, LayerDeletion, batches, delete_entries
from router_service.memories.memory import RoutingMemory
from router_service.memories.settings import MemorySettings
from router_service.memories.store import MemoryStore

MODEL = ModelFingerprint("tiny", 2, 4, 5, 2, "ab")


def _entries(rows: int) -> Entries:
    """Entry i is of example e(i mod 5) of source s(i mod 2)."""
    rng = np.random.default_rng(0)
    return Entries(
        np.arange(rows, dtype=np.uint64),
        rng.normal(size=(rows, MODEL.hidden_size)).astype(np.float32),
        rng.normal(size=(rows, MODEL.num_experts)).astype(np.float32),
        [Provenance(f"s{i % 2}", f"e{i % 5}", i) for i in range(rows)],
    )


@pytest.fixture
def memory() -> Iterator[RoutingMemory]:
    """3,000 entries in layer 0, 10 in layer 1."""
    store = MemoryStore(ExactBackend(), None)
    made = store.create("m", MODEL, MemorySettings())
    made.upsert(0, MODEL.digest(), _entries(3000))
    made.upsert(1, MODEL.digest(), _entries(10))
    yield made
    store.close()


def test_by_id(memory: RoutingMemory) -> None:
    ids = np.array([5, 5, 2, 99_999], np.uint64)
    gone = delete_entries(memory, memory.layers, ids)
    assert gone == [LayerDeletion(0, 2, 3000), LayerDeletion(1, 2, 10)]
    assert memory.layer(1).info().entries == 8
    assert delete_entries(memory, memory.layers, ids) == [
        LayerDeletion(0, 0, 2998),
        LayerDeletion(1, 0, 8),
    ]


def test_a_source_or_one_example(memory: RoutingMemory) -> None:
    one = EntryFilter("s0", "e4")
    assert delete_entries(memory, memory.layers, one) == [
        LayerDeletion(0, 300, 3000),
        LayerDeletion(1, 1, 10),
    ]
    rest = delete_entries(memory, [memory.layer(0)], EntryFilter("s0"))
    assert rest == [LayerDeletion(0, 1200, 2700)]
    left = memory.layer(0).collection.scroll(None, 10_000)
    assert {origin.source for origin in left.provenance} == {"s1"}
    assert delete_entries(memory, memory.layers, EntryFilter("nobody"))[0].deleted == 0


def test_a_dry_run_counts_and_changes_nothing(memory: RoutingMemory) -> None:
    before = memory.version
    counted = delete_entries(memory, memory.layers, EntryFilter("s1"), dry_run=True)
    assert [one.deleted for one in counted] == [1500, 5]
    assert memory.layer(0).info().entries == 3000
    assert memory.version == before


def test_the_version_rises_and_hits_are_forgotten(memory: RoutingMemory) -> None:
    layer, before = memory.layer(1), memory.version
    layer.hits.note(np.array([[1, 2]], np.uint64), np.ones((1, 2), np.float32), np.array([True]))
    delete_entries(memory, [layer], np.array([1], np.uint64))
    assert memory.version > before
    assert layer.hits.counts().ids.tolist() == [2]


def test_what_is_written_meanwhile_stays(
    memory: RoutingMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = memory.layer(1)
    scroll = layer.collection.scroll

    def scroll_and_write(after: int | None, limit: int, *, with_keys: bool = True) -> Entries:
        page = scroll(after, limit, with_keys=with_keys)
        if after is None:
            memory.upsert(1, MODEL.digest(), _entries(10).slice(2, 3))
        return page

    monkeypatch.setattr(layer.collection, "scroll", scroll_and_write)
    assert delete_entries(memory, [layer], EntryFilter("s0"))[0].deleted == 4
    assert layer.count_of(np.array([2], np.uint64)) == 1


def test_batches() -> None:
    assert batches(np.empty(0, np.uint64)) == []
    assert [len(part) for part in batches(np.arange(600, dtype=np.uint64))] == [256, 256, 88]

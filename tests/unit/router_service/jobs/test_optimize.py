"""Layers that are indexed side by side, what a quantization that ends early leaves, and how a search is chosen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from router_service.arrays import Entries, Provenance
from router_service.backends.base import Compression, Quantization, say_nothing
from router_service.backends.edge.backend import EdgeBackend
from router_service.errors import Cancelled, DiskFull, StorageError
from router_service.fingerprint import ModelFingerprint
from router_service.jobs.optimize import (
    Indexed,
    SearchChoice,
    optimized,
    optimized_to,
    quantized,
)
from router_service.memories import settings as memory_settings
from router_service.memories.memory import RoutingMemory
from router_service.memories.settings import MemorySettings
from router_service.memories.store import MemoryStore

MODEL = ModelFingerprint("tiny", 1, 16, 4, 2, "ab" * 32)
BINARY = Compression(Quantization.BINARY)


def entries(number: int) -> Entries:
    keys = np.random.default_rng(0).normal(size=(number, 16)).astype(np.float32)
    ids, values = np.arange(number, dtype=np.uint64), np.zeros((number, 4), np.float32)
    return Entries(ids, keys, values, [Provenance()] * number)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    backend = EdgeBackend(tmp_path, min_free_bytes=0)
    with closing(backend), closing(MemoryStore(backend, tmp_path)) as made:
        memory = made.create("m", MODEL, MemorySettings())
        memory.upsert(0, MODEL.digest(), entries(700))
        yield made


@pytest.fixture
def layers(store: MemoryStore) -> RoutingMemory:
    """A memory of two layers."""
    model = replace(MODEL, num_layers=2)
    memory, made = store.create("two", model, MemorySettings()), entries(700)
    for layer in (0, 1):
        memory.upsert(layer, model.digest(), made)
    return memory


def test_layers_are_indexed_side_by_side(layers: RoutingMemory) -> None:
    both = threading.Barrier(2)

    def meets(stage: str, done: int, total: int) -> None:
        if stage.endswith("copy"):
            both.wait(60)  # neither goes on before the other has begun

    done = list(optimized(layers, layers.layers, BINARY, meets))
    assert sorted(each.layer for each in done) == [0, 1]
    assert [layer.info().indexed_entries for layer in layers.layers] == [700, 700]


def test_one_that_fails_ends_the_others(layers: RoutingMemory) -> None:
    begun = threading.Event()

    def fails(stage: str, done: int, total: int) -> None:
        if stage == "layer 1: index":
            begun.set()
        elif stage == "layer 0: copy":
            assert begun.wait(60)
            raise StorageError("broken")

    with pytest.raises(StorageError, match="broken"):
        list(optimized(layers, layers.layers, BINARY, fails))
    assert [layer.info().indexed_entries for layer in layers.layers] == [0, 0]


def test_what_finds_too_little_disk_beside_others_is_tried_alone(layers: RoutingMemory) -> None:
    refused = threading.Event()

    def is_full(stage: str, done: int, total: int) -> None:
        if stage == "layer 1: copy" and not refused.is_set():
            refused.set()
            raise DiskFull("too little")

    done = list(optimized(layers, layers.layers, BINARY, is_full))
    assert [each.layer for each in done] == [0, 1]
    assert [layer.info().indexed_entries for layer in layers.layers] == [700, 700]


@pytest.mark.parametrize(
    ("stage", "label", "oversampling"),
    [("copy", "none", 2.0), ("measure recall", "binary", BINARY.oversampling)],
)
def test_the_candidates_are_those_that_the_layers_need(
    store: MemoryStore, stage: str, label: str, oversampling: float
) -> None:
    """Ended before a layer has changed, or just after it."""

    def ends(now: str, done: int, total: int) -> None:
        if now.endswith(stage):
            raise Cancelled("ended")

    memory = store.get("m")
    with pytest.raises(Cancelled):
        list(quantized(store, memory, memory.layers, BINARY, 0.0, ends))
    assert memory.layers[0].info().compression.label == label
    assert memory.record.settings.oversampling == oversampling


def _optimized(store: MemoryStore, compression: Compression, recall: float) -> SearchChoice:
    memory = store.get("m")
    steps = optimized_to(store, memory, memory.layers, compression, recall, say_nothing)
    *layers, choice = steps
    assert [type(each) for each in layers] == [Indexed]
    assert isinstance(choice, SearchChoice)
    return choice


@pytest.fixture
def large(store: MemoryStore) -> MemoryStore:
    """More entries than are scanned whatever the index, around centres."""
    memory, rng = store.get("m"), np.random.default_rng(1)
    centres = rng.normal(size=(100, 16))
    keys = centres[rng.integers(100, size=2500)] + rng.normal(size=(2500, 16)) / 4
    ids, values = np.arange(1000, 3500, dtype=np.uint64), np.zeros((2500, 4), np.float32)
    entries = Entries(ids, keys.astype(np.float32), values, [Provenance()] * 2500)
    memory.upsert(0, MODEL.digest(), entries)
    return store


def test_the_fewest_candidates_that_find_enough_are_chosen_and_stored(large: MemoryStore) -> None:
    choice = _optimized(large, Compression(), 0.99)
    settings = large.get("m").record.settings
    (layer,) = choice.layers
    assert layer.recall_at_1 >= 0.99
    assert layer.recall_at_k >= 0.99
    assert (layer.queries, layer.exact, layer.segments) == (256, False, 2)
    assert settings.search_recall == 0.99
    assert choice.hnsw_ef == settings.hnsw_ef < MemorySettings().search(32).hnsw_ef
    assert choice.oversampling == settings.oversampling == 2.0
    assert settings.search(32, 0).hnsw_ef == choice.hnsw_ef
    assert settings.search(8, 0).hnsw_ef == MemorySettings().hnsw_ef  # nobody measured K = 8
    assert settings.search(64, 0).hnsw_ef == 4 * 64


def test_where_no_candidates_find_enough_every_entry_is_looked_at(large: MemoryStore) -> None:
    memory = large.get("m")
    choice = _optimized(large, BINARY, 0.9999)
    assert [each.exact for each in choice.layers] == [True]
    assert choice.layers[0].recall_at_k == 1.0
    settings = memory.record.settings
    assert settings.exact_layers == (0,)
    assert settings.search(32, 0).exact
    assert not settings.search(32, 1).exact
    again = _optimized(large, Compression(), 0.9)
    assert not again.layers[0].exact
    assert memory.record.settings.exact_layers == ()


def test_a_choice_that_is_ended_leaves_the_settings(large: MemoryStore) -> None:
    memory = large.get("m")
    before = memory.record.settings

    def ends(stage: str, done: int, total: int) -> None:
        if memory.layers[0].info().indexed_entries and "recall" in stage and done:
            raise Cancelled("ended")

    with pytest.raises(Cancelled):
        list(optimized_to(large, memory, memory.layers, Compression(), 0.99, ends))
    assert memory.record.settings == before


@pytest.mark.parametrize("change", [{"neighbours": 8}, {"hnsw_ef": 77}, {"oversampling": 3.0}])
def test_what_was_measured_is_forgotten_with_what_it_was_measured_for(
    change: dict[str, float],
) -> None:
    measured = MemorySettings(hnsw_ef=16, search_recall=0.99, exact_layers=(1,))
    after = memory_settings.changed(measured, change)
    assert (after.search_recall, after.exact_layers) == (0.0, ())
    assert after.hnsw_ef == change.get("hnsw_ef", 100)
    same = {name: getattr(measured, name) for name in change}
    assert memory_settings.changed(measured, same | {"null_weight": 0.25}).search_recall == 0.99

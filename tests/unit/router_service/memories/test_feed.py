"""What a copy is sent while writes follow each other without a moment between them, and beside what is searched."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest

from router_service.backends import base
from router_service.backends.edge.backend import EdgeBackend
from router_service.backends.exact import ExactBackend
from router_service.memories import replication
from router_service.memories.memory import RoutingMemory
from router_service.memories.replication import Deleted, Event, Feed, Synced, Upserted
from router_service.memories.settings import MemorySettings
from router_service.memories.store import MemoryStore
from tests.unit.router_service.numbered_memory import MODEL, SETTINGS, fill, numbered_entries


@pytest.fixture
def memory() -> RoutingMemory:
    made = MemoryStore(ExactBackend(), None).create("m", MODEL, SETTINGS)
    fill(made, 0, 40)
    return made


def feed_of(memory: RoutingMemory, heartbeat_s: float = 60.0, page_entries: int = 16) -> Feed:
    feed = Feed(memory, memory.layers, page_entries, heartbeat_s, lambda: None)
    feed.copy({})
    return feed


def until_synced(events: Iterator[Event]) -> list[Event]:
    found: list[Event] = []
    for event in events:
        found.append(event)
        if isinstance(event, Synced):
            return found
    raise AssertionError("it ended")


@contextmanager
def writing(memory: RoutingMemory, threads: int, entries: int = 2) -> Iterator[None]:
    """Several writers of so many entries to every layer, each of whom begins as soon as it has ended."""
    ended = threading.Event()

    def write(number: int) -> None:
        while not ended.is_set():
            fill(memory, number, number + entries)

    running = [threading.Thread(target=write, args=(10_000 * n,)) for n in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in running:
            thread.join()


@pytest.mark.parametrize(("entries", "times"), [(2, 3), (1500, 1)])
def test_writes_without_a_pause_are_held_off(
    memory: RoutingMemory, entries: int, times: int
) -> None:
    events = feed_of(memory, page_entries=4096).events()
    with writing(memory, 3, entries):
        for _ in range(times):
            assert isinstance(until_synced(events)[-1], Synced)
    last = until_synced(events)[-1]
    while last.position.version < memory.version:
        last = until_synced(events)[-1]
    assert last.position.version == memory.version


def test_a_write_that_takes_long_is_waited_for_with_signs_of_life(memory: RoutingMemory) -> None:
    events = feed_of(memory, heartbeat_s=0.001).events()
    until_synced(events)
    with memory.changes.changing(1, np.array([1000], np.uint64)):
        memory.layers[1].collection.upsert(numbered_entries(1000, 1001, 1))
        memory.upsert(0, MODEL.digest(), numbered_entries(2000, 2001))
        while not _is_sign(next(events)):
            pass
    found = until_synced(event for event in events if not _is_sign(event))
    assert [type(event) for event in found] == [Upserted, Synced]
    assert found[0].entries.ids.tolist() == [1000]


def _is_sign(event: Event) -> bool:
    return isinstance(event, Deleted) and not len(event.ids)


def test_a_rest_shows_signs_of_life_and_ends_with_the_feed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside lookups, after a page that was waited for."""
    monkeypatch.setattr(base, "_RECENT_S", float("inf"))
    monkeypatch.setattr(replication, "_REST", 100.0)
    over: list[Exception] = []
    with closing(EdgeBackend(tmp_path)) as backend:
        memory = MemoryStore(backend, None).create("m", MODEL, SETTINGS)
        fill(memory, 0, 40)
        collection = memory.layers[0].collection
        collection.pacing.searched()
        feed = Feed(memory, memory.layers[:1], 16, 0.001, lambda: over[0] if over else None)
        feed.copy({})
        events = feed.events()
        with ThreadPoolExecutor(1) as pool:
            with collection._served.engine_call():
                first = pool.submit(next, events)
                while not collection._served._engine._waiting:
                    time.sleep(0.01)
                time.sleep(0.05)
            while _is_sign(found := first.result()):
                first = pool.submit(next, events)
        assert isinstance(found, Upserted)
        assert _is_sign(next(events))
        assert _is_sign(next(events))
        over.append(KeyError("gone"))
        with pytest.raises(KeyError, match="gone"):
            list(takewhile(_is_sign, events))


def test_layers_are_copied_one_after_the_other_while_the_memory_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_RECENT_S", float("inf"))
    monkeypatch.setattr(replication, "_LONGEST_REST_S", 0.0)
    with closing(EdgeBackend(tmp_path)) as backend:
        memory = MemoryStore(backend, None).create("m", MODEL, SETTINGS)
        fill(memory, 0, 40)
        memory.layers[1].collection.pacing.searched()
        found = until_synced(feed_of(memory).events())
    layers = [event.layer for event in found if isinstance(event, Upserted)]
    assert len(layers) > 2 * len(set(layers)) > 2
    assert layers == sorted(layers)


def test_nothing_new_is_the_same_position_again(memory: RoutingMemory) -> None:
    events = feed_of(memory, heartbeat_s=0.001).events()
    first = until_synced(events)[-1]
    assert [next(events), next(events)] == [first, first]


def test_settings_come_as_they_are(memory: RoutingMemory) -> None:
    events = feed_of(memory).events()
    until_synced(events)
    memory.change_settings(memory.record)
    settings, synced = until_synced(events)
    assert isinstance(settings, MemorySettings)
    assert settings == memory.record.settings
    assert isinstance(synced, Synced)


def test_what_ends_it_is_raised(memory: RoutingMemory) -> None:
    over: list[Exception] = []
    feed = Feed(memory, memory.layers, 16, 60.0, lambda: over[0] if over else None)
    feed.copy({})
    events = feed.events()
    until_synced(events)
    over.append(KeyError("gone"))
    with pytest.raises(KeyError, match="gone"):
        next(events)

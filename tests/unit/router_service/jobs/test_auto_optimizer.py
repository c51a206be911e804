"""Indexes are brought up to date by themselves, when there is enough to index and the time is right."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from router_service.backends.base import Pacing, Report, say_nothing
from router_service.errors import StorageError
from router_service.jobs import auto_optimizer
from router_service.jobs.auto_optimizer import AutoOptimizer, is_due

MIB = 1 << 20


class Moments(Pacing):
    def __init__(self, searched_ago_s: float, wrote_ago_s: float) -> None:
        super().__init__()
        now = time.monotonic()
        self._searched, self._wrote = now - searched_ago_s, now - wrote_ago_s


@dataclass
class Layer:
    """A collection that counts how often it was optimized."""

    pacing: Pacing
    changed_entries: int = 1000
    changed_bytes: int = 8 * MIB
    outdated_share: float = 0.1
    optimized: int = 0
    fails: bool = False
    blocks: bool = False
    entered: threading.Event = field(default_factory=threading.Event)

    def auto_optimize(self, report: Report = say_nothing) -> bool:
        self.entered.set()
        while self.blocks:
            report("index", 0, 0)
            time.sleep(0.001)
        if self.fails:
            raise StorageError("made to fail")
        self.changed_entries = 0
        self.optimized += 1  # last: whoever sees it may set the other
        return True


@pytest.mark.parametrize(
    ("searched_ago_s", "wrote_ago_s", "due"),
    [(1, 0, True), (60, 1, False), (60, 6, True), (1, 60, True)],
)
def test_it_is_time_when_somebody_searches_or_the_writing_has_paused(
    searched_ago_s: float, wrote_ago_s: float, due: bool
) -> None:
    layer = Layer(Moments(searched_ago_s, wrote_ago_s))
    assert is_due(layer, 8 * MIB) is due
    assert not is_due(layer, 9 * MIB)
    layer.outdated_share = 0.25
    assert is_due(layer, 9 * MIB) is due
    layer.changed_entries = 100
    assert not is_due(layer, 8 * MIB)


class Store:
    """A store with one memory of one layer."""

    def __init__(self, layer: Layer) -> None:
        self._layer, self.looks = layer, 0

    def memories(self) -> list[Any]:
        class Part:
            pass

        self.looks += 1

        memory, one = Part(), Part()
        memory.record, memory.layers = Part(), [one]  # type: ignore[attr-defined]
        memory.record.name, one.layer, one.collection = "m", 0, self._layer  # type: ignore[attr-defined]
        return [memory]


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def wait_for_looks(store: Store) -> None:
    """Until the thread has looked at the layers five times more."""
    before = store.looks
    wait_for(lambda: store.looks >= before + 5)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_optimizer, "_LOOK_EVERY_S", 0.002)


def test_a_layer_is_tidied_once_per_backlog() -> None:
    layer = Layer(Moments(0, 0))
    thread = AutoOptimizer(Store(layer), 8 * MIB)  # type: ignore[arg-type]
    thread.start()
    wait_for(lambda: layer.optimized == 1)
    layer.changed_entries = 1000
    wait_for(lambda: layer.optimized == 2)
    thread.stop()


def test_a_memory_that_an_operation_works_on_is_left_to_it() -> None:
    layer, held = Layer(Moments(0, 0), blocks=True), threading.Event()
    store = Store(layer)
    thread = AutoOptimizer(store, 8 * MIB, lambda memory: held.is_set() and memory == "m")  # type: ignore[arg-type]
    thread.start()
    assert layer.entered.wait(60)
    held.set()  # what goes on ends, and nothing begins
    wait_for_looks(store)
    layer.entered.clear()
    wait_for_looks(store)
    assert not layer.entered.is_set()
    held.clear()
    assert layer.entered.wait(60)
    thread.stop()
    assert layer.optimized == 0


def test_a_layer_that_fails_is_left_alone_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    layer = Layer(Moments(0, 0), fails=True)
    store = Store(layer)
    thread = AutoOptimizer(store, 8 * MIB)  # type: ignore[arg-type]
    thread.start()
    wait_for(lambda: "made to fail" in caplog.text)
    wait_for_looks(store)
    thread.stop()
    assert caplog.text.count("made to fail") == 1


def test_stop_ends_what_is_under_way() -> None:
    layer = Layer(Moments(0, 0), blocks=True)
    thread = AutoOptimizer(Store(layer), 8 * MIB)  # type: ignore[arg-type]
    thread.start()
    assert layer.entered.wait(60)
    thread.stop()
    assert layer.optimized == 0


def test_a_threshold_of_0_never_indexes() -> None:
    layer = Layer(Moments(0, 0))
    thread = AutoOptimizer(Store(layer), 0)  # type: ignore[arg-type]
    thread.start()
    assert not thread._thread.is_alive()
    thread.stop()
    assert layer.optimized == 0

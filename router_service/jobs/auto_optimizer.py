"""Keeps indexes up to date while the service runs: a thread that looks at every layer and optimizes one at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from router_service.backends.base import Maintained
from router_service.errors import Cancelled, CollectionClosed, StorageError
from router_service.memories.store import MemoryStore

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
# A layer that is searched is indexed as soon as there is enough to index; one that is only written to, for instance
# while a memory is built, when the writing has paused.
_SEARCHED_WITHIN_S = 10.0
_QUIET_S = 5.0
# Fewer entries are scanned as fast as a graph is walked.
_LEAST_ENTRIES = 512
# Searches get slow (see EdgeCollection) somewhat above it.
_MOST_OUTDATED = 0.2
_AFTER_FAILURE_S = 60.0


def is_due(collection: Maintained, threshold_bytes: int) -> bool:
    """Whether unindexed keys amount to `threshold_bytes`, or the index is outdated, and now is the time."""
    pacing = collection.pacing
    much = collection.changed_bytes >= threshold_bytes
    if collection.changed_entries < _LEAST_ENTRIES or not (
        much or collection.outdated_share > _MOST_OUTDATED
    ):
        return False
    return pacing.searched_ago_s < _SEARCHED_WITHIN_S or pacing.wrote_ago_s > _QUIET_S


@dataclass
class AutoOptimizer:
    """start() and stop() once each. A layer that cannot be optimized is left alone for a minute, and serves on.

    `held`: whether an operation works on a memory of that name; its layers are left to it.
    """

    store: MemoryStore
    threshold_bytes: int
    held: Callable[[str], bool] = lambda _: False
    _done: threading.Event = field(default_factory=threading.Event)
    _failed: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="auto-optimizer", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        if self.threshold_bytes:
            self._thread.start()

    def stop(self) -> None:
        """Ends what it is doing; nothing is left half done."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(_LOOK_EVERY_S):
            for memory, layer, collection in self._collections():
                name = f"{memory}, layer {layer}"
                if is_due(collection, self.threshold_bytes) and self._may_try(name):
                    self._optimize(memory, name, collection)

    def _collections(self) -> Iterator[tuple[str, int, Maintained]]:
        for memory in self.store.memories():
            for layer in memory.layers:
                name = memory.record.name
                if isinstance(layer.collection, Maintained) and not self.held(name):
                    yield name, layer.layer, layer.collection

    def _may_try(self, name: str) -> bool:
        failed = self._failed.get(name)
        return failed is None or time.monotonic() > failed + _AFTER_FAILURE_S

    def _optimize(self, memory: str, name: str, collection: Maintained) -> None:
        def report(stage: str, done: int, total: int) -> None:
            if self._done.is_set():
                raise Cancelled("the service stops")
            if self.held(memory):
                raise Cancelled(f"an operation works on {memory}")

        started, changed = time.monotonic(), collection.changed_entries
        try:
            if collection.auto_optimize(report):
                log.info(
                    "indexed %d changes of %s in %.1f s", changed, name, time.monotonic() - started
                )
        except (Cancelled, CollectionClosed) as why:
            log.info("indexing %s was ended: %s", name, why)
        except StorageError as error:
            self._failed[name] = time.monotonic()
            log.warning("indexing %s failed, next try in %.0f s: %s", name, _AFTER_FAILURE_S, error)

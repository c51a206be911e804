"""A memory takes the place of another, under whose name clients go on to ask: a rebuilt one, when it has proved good.

In RAM and on a server its collections take the names of the others while they are used. On disk its layers are closed,
moved and opened again; lookups of the other memory go on meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from router_service.catalogue import Takeover
from router_service.errors import InvalidField, RoutingServiceError, StorageError
from router_service.maintenance.adoption import adopt, require_same_model, retire
from router_service.maintenance.moved_memories import arrive, mark, moves, unmark
from router_service.maintenance.restored_files import home_of
from router_service.maintenance.snapshots import RETIRE_AFTER_S
from router_service.memory_layers import close_all
from router_service.memory_store import MemoryStore
from router_service.operations import Operations
from router_service.routing_memory import RoutingMemory

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Replacement:
    """The memory that serves now, and how many entries the one had that served before."""

    memory: RoutingMemory
    removed: int


def replace_memory(
    store: MemoryStore,
    operations: Operations,
    name: str,
    by: str,
    *,
    retire_after_s: float = RETIRE_AFTER_S,
) -> Replacement:
    """From one lookup to the next the memory `name` has the entries and settings of `by`, whose name is gone then.

    What it had itself goes on for `retire_after_s` to lookups that had begun, and is removed. Raises MemoryNotFound,
    InvalidField, ModelMismatch, KindMismatch, Busy (an operation works on either) or StorageError; then nothing has
    changed.
    """
    if name == by:
        raise InvalidField("by", by, "another memory than the one that it replaces")
    with operations.none_on(name, by):
        with store.exclusive():
            store.refresh()
            old, coming = store.get(name), store.get(by)
            _require_alike(old, coming)
            removed = sum(layer.info().entries for layer in old.layers)
            swap = _by_names if store.directory is None else _by_files
            end = swap(store, old, coming)
            memory = store.get(name)
        time.sleep(retire_after_s)
        end()
    return Replacement(memory, removed)


def _require_alike(old: RoutingMemory, coming: RoutingMemory) -> None:
    ours, theirs = (f"memory {each.record.name!r}" for each in (old, coming))
    remedy = "rebuild it for the same model and kind, or delete the other and make it anew"
    require_same_model(old.record, coming.record, ours, theirs, remedy)


def _by_names(store: MemoryStore, old: RoutingMemory, coming: RoutingMemory) -> Callable[[], None]:
    """In RAM and on a server; returns what removes the entries that were replaced."""
    name, now = old.record.name, time.time_ns() // 1_000_000
    created = max(now, old.record.created_unix_ms + 1)
    record = replace(coming.record, name=name, created_unix_ms=created)
    takeover = Takeover(record, coming.record.name)
    store.takeovers.begin(takeover, coming.record)
    memory = RoutingMemory(record, coming.layers)
    _continue(memory, old, coming)
    store.serve(memory)
    store.release(coming.record.name)
    with _logged(f"the hit counts of {name} are not in their place"):
        for before, layer in zip(old.layers, memory.layers, strict=True):
            before.hits.remove()
            layer.hits.move(store.hits_path(name, layer.layer))

    def end() -> None:
        close_all(old.layers)
        with _logged(f"what {name} held before is removed by the next start"):
            store.takeovers.end(takeover)

    return end


def _by_files(store: MemoryStore, old: RoutingMemory, coming: RoutingMemory) -> Callable[[], None]:
    """On disk; returns what removes the entries that were replaced."""
    memories, name = store.directory, old.record.name
    assert memories is not None  # noqa: S101  # replace_memory sees to it
    home = memories / home_of(memories, coming.record)
    entries = [layer.info().entries for layer in coming.layers]
    with _marked(memories, home), _closed(store, coming):
        adopt(
            store,
            home,
            replace(coming.record, name=name),
            entries,
            replacing=True,
            succeed=lambda memory, _: _continue(memory, old, coming),
        )
    store.release(coming.record.name)
    with _logged(f"what is left of {coming.record.name} goes at the next start"):
        arrived = memories / home_of(memories, store.get(name).record)
        for move in [each for each in moves(memories) if each.home == arrived]:
            arrive(move)
    return lambda: retire(store, old)


@contextmanager
def _marked(memories: Path, home: Path) -> Iterator[None]:
    """Inside, layers say where they lie; they need not any more when the inside raises and they are still there."""
    try:
        mark(memories, home)
        yield
    except BaseException:
        unmark(home)
        raise


@contextmanager
def _closed(store: MemoryStore, memory: RoutingMemory) -> Iterator[None]:
    """Inside, a memory's layers are closed. They are opened again when the inside raises."""
    try:
        if failures := close_all(memory.layers):
            raise failures[0]
        yield
    except BaseException:
        _reopen(store, memory)
        raise


def _reopen(store: MemoryStore, memory: RoutingMemory) -> None:
    try:
        again = RoutingMemory(memory.record, store.open_layers(memory.record))
    except StorageError as error:
        log.exception("memory %s cannot be opened again", memory.record.name)
        store.release(memory.record.name)
        store.broken[memory.record.name] = str(error)
        return
    again.version = memory.version
    for layer, before in zip(again.layers, memory.layers, strict=True):
        layer.counters = before.counters
    store.serve(again)


def _continue(memory: RoutingMemory, old: RoutingMemory, coming: RoutingMemory) -> None:
    """Versions go on rising for the clients of either; counters are those of the entries."""
    memory.version = max(old.version, coming.version) + 1
    for layer, before in zip(memory.layers, coming.layers, strict=True):
        layer.counters = before.counters


@contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except RoutingServiceError:
        log.exception("%s", what)

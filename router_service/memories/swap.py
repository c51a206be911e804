"""One memory in the place of another, from one lookup to the next: a restored copy, or a rebuilt one that proved good.

swap_in() serves layers that lie in a staged directory (a restored snapshot). replace_memory() lets the memory `by` have
the name of another: in RAM and on a server its collections take the names of the others while they are used; on disk
its layers are closed, moved and opened again, and lookups of the other memory go on meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

from router_service.backends.disk import fsync_directory, remove_tree, storage_call
from router_service.errors import (
    Busy,
    CorruptMemory,
    InvalidField,
    KindMismatch,
    MemoryExists,
    ModelMismatch,
    RoutingServiceError,
    StorageError,
    shorten,
)
from router_service.memories.catalogue import DOOMED, Swap
from router_service.memories.known_keys import require_all_found
from router_service.memories.layer import LayerMemory
from router_service.memories.manifest import (
    begin_creation,
    finish_creation,
    home_of,
    read_manifest,
    remove_strays,
    restored_directory,
    stamped,
    write_manifest,
)
from router_service.memories.memory import MemoryRecord, RoutingMemory, close_all
from router_service.memories.store import MemoryStore, check_name
from router_service.memories.unfinished_swaps import arrive, file_swaps, mark, unmark
from router_service.operations import Operations

log = logging.getLogger(__name__)

# How long the readers of a replaced memory may finish what they began.
RETIRE_AFTER_S = 1.0

# Called with the new memory and the one that it replaces, before the new one serves.
Succeed = Callable[[RoutingMemory, RoutingMemory], None]


@contextmanager
def staging(store: MemoryStore, name: str) -> Iterator[Path]:
    """A new directory for the layers of a memory; swap_in() takes it, else it is gone at the end.

    Raises Busy while there is one for that name, InvalidField, or StorageError when the store has no directory.
    """
    check_name(name)
    staged = _directory_of(store) / f"_restoring-{name}{DOOMED}"  # no memory's name begins with _
    with storage_call(f"create {staged}"):
        try:
            staged.mkdir()
        except FileExistsError:
            raise Busy(
                f"memory {name!r} is being restored already; try again when that is done (or restart the service, "
                f"should {staged} be left of a restore that failed)"
            ) from None
    try:
        yield staged
    finally:
        remove_tree(staged)


def require_room(store: MemoryStore, record: MemoryRecord, *, replacing: bool) -> None:
    """Raises InvalidField, MemoryExists, Busy, ModelMismatch or KindMismatch where swap_in() would."""
    check_name(record.name)
    store.require_not_in_the_making(record.name)
    if record.name not in store.names() and record.name not in store.broken:
        return
    if not replacing:
        raise MemoryExists(record.name)
    if (present := _present(store, record.name)) is not None:
        remedy = f"restore it under a name other than {record.name!r}"
        require_same_model(present, record, "memory", "snapshot", remedy)


def swap_in(
    store: MemoryStore,
    staged: Path,
    record: MemoryRecord,
    entries: Sequence[int],
    *,
    replacing: bool,
    succeed: Succeed | None = None,
) -> RoutingMemory | None:
    """Serves the layers in `staged` as the memory `record.name`, created now, from one lookup to the next.

    `succeed`: takes on what goes on from the memory whose place it takes; None: version and counts. Returns that
    memory, still open: retire() it when its readers are done. Raises what require_room() raises, and StorageError when
    a layer cannot be opened, has not `entries[layer]` entries or does not find them (KeysNotFound); then nothing has
    changed, and the layers are in `staged` again.
    """
    memories = _directory_of(store)
    with store.exclusive():
        require_room(store, record, replacing=replacing)
        present = _present(store, record.name)
        record = stamped(memories, record, present)
        memory = _moved_in(store, staged, record, entries, present)
        old = store.get(record.name) if record.name in store.names() else None
        if old is not None:
            (succeed or _continue_replaced)(memory, old)
        store.serve(memory)
        if old is None:
            with _left_to_the_next_start(record):
                remove_strays(memories, record)
    return old


def retire(store: MemoryStore, replaced: RoutingMemory) -> None:
    """Closes a memory that swap_in() replaced, and removes its files, or leaves that to the next start."""
    memories, record = _directory_of(store), replaced.record
    with store.exclusive(), _left_to_the_next_start(record):
        home = home_of(memories, record)
        serving = record.name in store.names() and store.get(record.name)
        if serving and home_of(memories, serving.record) == home:
            close_all(replaced.layers)  # deleted, and created again: the files are the new one's
            return
        store.discard_layers(home, replaced.layers)
        if home != record.name:
            remove_tree(memories / home)


@contextmanager
def _left_to_the_next_start(record: MemoryRecord) -> Iterator[None]:
    try:
        yield
    except StorageError:
        log.exception("the files of what was memory %s stay until the next start", record.name)


def _moved_in(
    store: MemoryStore,
    staged: Path,
    record: MemoryRecord,
    entries: Sequence[int],
    present: MemoryRecord | None,
) -> RoutingMemory:
    """Layers first, the manifest last, as for any new memory."""
    memories = _directory_of(store)
    directory, target = memories / record.name, restored_directory(memories, record)
    is_new = not directory.exists()
    if is_new:
        begin_creation(directory)
    layers: list[LayerMemory] = []
    try:
        _move(staged, target)
        layers += store.open_layers(record)
        _require_entries(layers, entries)
        require_all_found(record.name, layers, record.settings)
        finish_creation(directory, record)
    except BaseException:
        if present is not None and read_manifest(directory) != present:
            write_manifest(directory, present)
        close_all(layers)
        _move_back(target, staged)
        if is_new:
            remove_tree(directory)
        raise
    return RoutingMemory(record, layers)


def _require_entries(layers: Sequence[LayerMemory], entries: Sequence[int]) -> None:
    for layer, expected in zip(layers, entries, strict=True):
        if (found := layer.info().entries) != expected:
            raise CorruptMemory(f"layer {layer.layer} has {found} entries, expected {expected}")


def _move(source: Path, target: Path) -> None:
    with storage_call(f"move {source} to {target}"):
        source.rename(target)
        fsync_directory(target.parent)
        fsync_directory(source.parent)


def _move_back(target: Path, source: Path) -> None:
    if target.exists() and not source.exists():
        with storage_call(f"move {target} back to {source}"):
            target.rename(source)
            fsync_directory(source.parent)
            fsync_directory(target.parent)


def _continue_replaced(memory: RoutingMemory, old: RoutingMemory) -> None:
    """What a restored memory takes on: the version goes on rising, and what was counted stays counted."""
    memory.versions.advance(old.version + 1)
    for layer, before in zip(memory.layers, old.layers, strict=True):
        layer.counters = before.counters
        layer.hits.go_on_from(before.hits)


def _present(store: MemoryStore, name: str) -> MemoryRecord | None:
    """What is written down about a memory, also about one that was set aside, if that can be read."""
    if name in store.names():
        return store.get(name).record
    with suppress(CorruptMemory):
        return read_manifest(_directory_of(store) / name)
    return None


def require_same_model(
    present: MemoryRecord, coming: MemoryRecord, ours: str, theirs: str, remedy: str
) -> None:
    """Raises ModelMismatch or KindMismatch when the readers of `present` could not read `coming`.

    `ours`, `theirs`: what they are called in the error.
    """
    here, there = present.fingerprint, coming.fingerprint
    differing = [
        f"{field.name}: {theirs} {shorten(getattr(there, field.name), 40)}, "
        f"{ours} {shorten(getattr(here, field.name), 40)}"
        for field in fields(here)
        if getattr(here, field.name) != getattr(there, field.name)
    ]
    if differing:
        problem = f"the {theirs} was made for another model ({'; '.join(differing)})"
        raise ModelMismatch(f"{problem}; {remedy}")
    kinds = coming.settings.kind, present.settings.kind
    if kinds[0] is not kinds[1]:
        raise KindMismatch(
            f"the {theirs} holds {kinds[0].plural}, the {ours} {kinds[1].plural}; {remedy}"
        )


def _directory_of(store: MemoryStore) -> Path:
    if store.directory is None:
        raise StorageError("this service keeps memories in RAM only; start it with --backend edge")
    return store.directory


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
    InvalidField, ModelMismatch, KindMismatch, Busy (an operation works on either) or StorageError, KeysNotFound among
    them; then nothing has changed.
    """
    if name == by:
        raise InvalidField("by", by, "another memory than the one that it replaces")
    with operations.none_on(name, by):
        coming = store.get(by)
        require_all_found(by, coming.layers, coming.record.settings)
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
    swap = Swap(record, coming.record.name)
    store.swaps.begin(swap, coming.record)
    memory = RoutingMemory(record, coming.layers, coming.versions, coming.changes)
    _continue(memory, old, coming)
    memory.changes.restart()
    store.serve(memory)
    store.release(coming.record.name)
    with _logged(f"the hit counts of {name} are not in their place"):
        for before, layer in zip(old.layers, memory.layers, strict=True):
            before.hits.remove()
            layer.hits.move(store.hits_path(name, layer.layer))

    def end() -> None:
        close_all(old.layers)
        with _logged(f"what {name} held before is removed by the next start"):
            store.swaps.end(swap)

    return end


def _by_files(store: MemoryStore, old: RoutingMemory, coming: RoutingMemory) -> Callable[[], None]:
    """On disk; returns what removes the entries that were replaced."""
    memories, name = store.directory, old.record.name
    assert memories is not None  # noqa: S101  # replace_memory sees to it
    home = memories / home_of(memories, coming.record)
    entries = [layer.info().entries for layer in coming.layers]
    with _marked(memories, home), _closed(store, coming):
        swap_in(
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
        for move in [each for each in file_swaps(memories) if each.home == arrived]:
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
        layers = store.open_layers(memory.record)
    except StorageError as error:
        log.exception("memory %s cannot be opened again", memory.record.name)
        store.release(memory.record.name)
        store.broken[memory.record.name] = error
        return
    again = RoutingMemory(memory.record, layers, memory.versions)
    for layer, before in zip(again.layers, memory.layers, strict=True):
        layer.counters = before.counters
    store.serve(again)


def _continue(memory: RoutingMemory, old: RoutingMemory, coming: RoutingMemory) -> None:
    """What a swapped memory takes on: versions rise for the clients of either; counters are those of the entries."""
    memory.versions.advance(max(old.version, coming.version) + 1)
    for layer, before in zip(memory.layers, coming.layers, strict=True):
        layer.counters = before.counters


@contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except RoutingServiceError:
        log.exception("%s", what)

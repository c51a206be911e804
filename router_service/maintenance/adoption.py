"""Makes a memory of layers that came from elsewhere, in the place of another or in one that is free."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

from router_service.backends.boundary import storage_call
from router_service.backends.disk import fsync_directory, remove_tree
from router_service.catalogue import DOOMED
from router_service.errors import (
    Busy,
    CorruptMemory,
    KindMismatch,
    MemoryExists,
    ModelMismatch,
    StorageError,
    shorten,
)
from router_service.layer_memory import LayerMemory
from router_service.maintenance.restored_files import (
    home_of,
    remove_strays,
    restored_directory,
    stamped,
)
from router_service.manifest import begin_creation, finish_creation, read_manifest, write_manifest
from router_service.memory_layers import close_all
from router_service.memory_store import MemoryStore, check_name
from router_service.routing_memory import MemoryRecord, RoutingMemory

log = logging.getLogger(__name__)

# Told of a memory that takes the place of another, before it serves.
Succeed = Callable[[RoutingMemory, RoutingMemory], None]


@contextmanager
def staging(store: MemoryStore, name: str) -> Iterator[Path]:
    """A new directory for the layers of a memory; adopt() takes it, else it is gone at the end.

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
    """Raises InvalidField, MemoryExists, ModelMismatch or KindMismatch where adopt() would."""
    check_name(record.name)
    if record.name not in store.names() and record.name not in store.broken:
        return
    if not replacing:
        raise MemoryExists(record.name)
    if (present := _present(store, record.name)) is not None:
        remedy = f"restore it under a name other than {record.name!r}"
        require_same_model(present, record, "memory", "snapshot", remedy)


def adopt(
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
    a layer cannot be opened or has not `entries[layer]` entries; then nothing has changed, and the layers are in
    `staged` again.
    """
    memories = _directory_of(store)
    with store.exclusive():
        require_room(store, record, replacing=replacing)
        present = _present(store, record.name)
        record = stamped(memories, record, present)
        memory = _moved_in(store, staged, record, entries, present)
        old = store.get(record.name) if record.name in store.names() else None
        if old is not None:
            (succeed or _continue)(memory, old)
        store.serve(memory)
        if old is None:
            with _left_to_the_next_start(record):
                remove_strays(memories, record)
    return old


def retire(store: MemoryStore, replaced: RoutingMemory) -> None:
    """Closes a memory that adopt() replaced, and removes its files, or leaves that to the next start."""
    memories, record = _directory_of(store), replaced.record
    with store.exclusive(), _left_to_the_next_start(record):
        home = home_of(memories, record)
        serving = record.name in store.names() and store.get(record.name)
        if serving and home_of(memories, serving.record) == home:
            return  # deleted, and created again
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


def _continue(memory: RoutingMemory, old: RoutingMemory) -> None:
    """The version goes on rising, and what was counted stays counted."""
    memory.version = old.version + 1
    for layer, before in zip(memory.layers, old.layers, strict=True):
        layer.counters = before.counters
        layer.hits.add(before.hits.counts())


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
        raise KindMismatch(f"the {theirs} holds {kinds[0]}s, the {ours} {kinds[1]}s; {remedy}")


def _directory_of(store: MemoryStore) -> Path:
    if store.directory is None:
        raise StorageError("this service keeps memories in RAM only; start it with --backend edge")
    return store.directory

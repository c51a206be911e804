"""Makes the next generation of a collection's files beside the present one, which stays in use meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from router_service.backends.disk import FreeSpace, copy_tree, disk_bytes, remove_tree
from router_service.backends.edge.engine import EngineShard
from router_service.backends.edge.files import CollectionFiles, Pointer
from router_service.backends.edge.hosted_shard import HostedShard
from router_service.backends.edge.shard import Shard
from router_service.errors import DirectoryInUse

# How long the engine process of a service that was killed may take to let go of its files.
_ORPHAN_S = 5.0
# Keys and quantized keys of an indexed segment, most of the bytes: written once, deletions are marked elsewhere.
_NEVER_CHANGED = ("matrix.dat", "quantized.data")


@dataclass(frozen=True, slots=True)
class EdgeSettings:
    """What the collections of a backend share."""

    search_threads: int
    free_space: FreeSpace
    # A collection with more bytes of keys has a process of its own from its next opening or optimize on,
    isolate_above_bytes: int
    # as long as there is one to be had.
    hosts: Hosts


class Hosts:
    """The engine processes of a backend, at most `workers` of them. Safe to call from several threads."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._running: WeakSet[HostedShard] = WeakSet()
        self._starting = 0
        self._lock = threading.Lock()

    @contextmanager
    def one(self, replaced: Shard | None) -> Iterator[Callable[..., Shard]]:
        """How to open a shard that takes the place of `replaced`: in a process of its own if there may be one more."""
        with self._lock:
            others = sum(host.alive for host in self._running if host is not replaced)
            allowed = others + self._starting < self._workers
            self._starting += allowed
        try:
            yield self._started if allowed else EngineShard.load
        finally:
            with self._lock:
                self._starting -= allowed

    def _started(self, *arguments: Any) -> HostedShard:
        host = HostedShard.load(*arguments)
        with self._lock:
            self._running.add(host)
        return host


def create_files(files: CollectionFiles, pointer: Pointer, settings: EdgeSettings) -> None:
    """The files of an empty collection; after a crash they are all there or count as leftovers."""
    settings.free_space.require()
    files.remove_leftovers(None)
    directory = files.shard(pointer.generation)
    shard = EngineShard.create(directory, pointer.spec, settings.search_threads)
    shard.flush()
    shard.close()
    files.write(pointer)


def open_shard(
    files: CollectionFiles,
    pointer: Pointer,
    settings: EdgeSettings,
    entries: int | None = None,
    replaced: Shard | None = None,
) -> Shard:
    """The shard of a generation, in its own process when its `entries` (None: not known yet) are many.

    Raises what EngineShard.load() raises. Waits for the engine process of a killed service to end: the data directory
    is ours, so no other service can have the shard.
    """
    if entries is None:
        entries = files.entries_about(pointer)
    arguments = (
        files.shard(pointer.generation),
        pointer.spec,
        pointer.compression,
        settings.search_threads,
    )
    if entries * pointer.spec.dimension * 4 <= settings.isolate_above_bytes:
        return _patiently(EngineShard.load, arguments)
    with settings.hosts.one(replaced) as load:
        return _patiently(load, arguments)


def _patiently(load: Callable[..., Shard], arguments: tuple[Any, ...]) -> Shard:
    deadline = time.monotonic() + _ORPHAN_S
    while True:
        try:
            return load(*arguments)
        except DirectoryInUse:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def copy_generation(
    files: CollectionFiles, current: Pointer, target: Pointer, settings: EdgeSettings
) -> None:
    """Copies the engine's files, which must be flushed and not written to meanwhile. Raises DiskFull."""
    source = files.shard(current.generation)
    rebuilt = target.compression.apart or current.compression.apart
    # The copy, its index, and when search keys are stored apart perhaps another copy.
    settings.free_space.require((3 if rebuilt else 2) * disk_bytes(source))
    remove_tree(files.generation(target.generation))
    copy_tree(source, files.shard(target.generation), _NEVER_CHANGED)


@contextmanager
def new_generation(files: CollectionFiles, current: Pointer, target: Pointer) -> Iterator[None]:
    """Whatever fails inside leaves `current` in force and nothing of `target`."""
    try:
        yield
    except BaseException:
        if files.read() != current:
            files.write(current)
        remove_tree(files.generation(target.generation))
        raise

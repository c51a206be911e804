"""Makes the next generation of a collection's files beside the present one, which stays in use meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from router_service.backends.disk import FreeSpace, copy_tree, disk_bytes, remove_tree
from router_service.backends.edge_engine import EngineShard
from router_service.backends.edge_files import CollectionFiles, Pointer
from router_service.backends.hosted_shard import HostedShard
from router_service.backends.shard import Shard
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
    # as long as there are fewer than this.
    workers: int
    hosts: WeakSet[HostedShard] = field(default_factory=WeakSet)

    def loader(self, keys_bytes: int, replaced: Shard | None) -> Callable[..., Shard]:
        """How a shard with so many bytes of keys is opened that takes the place of another."""
        others = sum(host.alive for host in list(self.hosts) if host is not replaced)
        if keys_bytes > self.isolate_above_bytes and others < self.workers:
            return self._hosted
        return EngineShard.load

    def _hosted(self, *arguments: Any) -> HostedShard:
        host = HostedShard.load(*arguments)
        self.hosts.add(host)
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
    load = settings.loader(entries * pointer.spec.dimension * 4, replaced)
    directory, deadline = files.shard(pointer.generation), time.monotonic() + _ORPHAN_S
    while True:
        try:
            return load(directory, pointer.spec, pointer.compression, settings.search_threads)
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

"""The embedded backend: Qdrant Edge shards under one data directory, which one process holds at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from typing_extensions import override

from router_service.backends.base import Backend, CollectionSpec, Compression, require_name
from router_service.backends.disk import DirectoryLock, FreeSpace, storage_call
from router_service.backends.edge.collection import EdgeCollection
from router_service.backends.edge.engine import EngineShard
from router_service.backends.edge.files import CollectionFiles, Pointer
from router_service.backends.edge.generation import Resources
from router_service.backends.edge.processes import ShardOpener
from router_service.errors import CorruptMemory, StorageError

# Opening a shard of that size takes 10 ms, of 160 MB 250 ms, and keeps every thread of its process waiting.
ISOLATE_ABOVE_BYTES = 8 << 20


class EdgeBackend(Backend):
    """Safe to call from several threads."""

    def __init__(
        self,
        data_dir: Path,
        *,
        min_free_bytes: int | None = None,
        isolate_above_bytes: int = ISOLATE_ABOVE_BYTES,
        workers: int = 64,
    ) -> None:
        """Takes the directory, making it when it is not there. Raises DirectoryInUse.

        `min_free_bytes`: below it writes raise DiskFull; default max(1 GiB, 5 % of the file system).
        `isolate_above_bytes`: of keys, above which a collection has an engine process of its own, for at most `workers`
        of them.
        """
        self._data_dir = data_dir
        self._resources = Resources(
            FreeSpace(data_dir, min_free_bytes), ShardOpener(isolate_above_bytes, workers)
        )
        self._open: dict[str, EdgeCollection] = {}
        self._opening: set[str] = set()
        self._lock = threading.Lock()
        with storage_call(f"open {data_dir}"):
            data_dir.mkdir(parents=True, exist_ok=True)
            self._directory_lock = DirectoryLock(data_dir)

    @override
    def create(self, name: str, spec: CollectionSpec) -> EdgeCollection:
        files = self._files(name)
        with self._lock:
            if files.exists():
                raise StorageError(f"{files.directory} already holds a collection")
            pointer = Pointer(0, spec, Compression())
            self._create_files(files, pointer)
            return self._opened(name, files, pointer)

    def _create_files(self, files: CollectionFiles, pointer: Pointer) -> None:
        """After a crash they are all there, or count as leftovers."""
        self._resources.free_space.require()
        files.remove_leftovers(None)
        shard = EngineShard.create(files.shard(pointer.generation), pointer.spec)
        shard.flush()
        shard.close()
        files.write(pointer)

    @override
    def open(self, name: str, spec: CollectionSpec) -> EdgeCollection:
        """Removes what a crash left behind."""
        files = self._files(name)
        with self._alone_with(name):  # others open at the same time
            if not files.exists():
                raise CorruptMemory(f"{files.directory} holds no collection")
            pointer = files.require_spec(spec)
            files.remove_leftovers(pointer.generation)
            return self._opened(name, files, pointer)

    @contextmanager
    def _alone_with(self, name: str) -> Iterator[None]:
        with self._lock:
            if name in self._opening or (name in self._open and not self._open[name].closed):
                raise StorageError(f"collection {name!r} is already open")
            self._opening.add(name)
        try:
            yield
        finally:
            self._opening.discard(name)

    @override
    def drop(self, name: str) -> None:
        files = self._files(name)
        with self._lock:
            if name in self._open and not self._open[name].closed:
                raise StorageError(f"collection {name!r} is open; close it before dropping it")
            self._open.pop(name, None)
            files.remove()

    @override
    def close(self) -> None:
        with self._lock, ExitStack() as every_one:  # even when one fails
            every_one.callback(self._directory_lock.release)
            for collection in self._open.values():
                every_one.callback(collection.close)

    def _files(self, name: str) -> CollectionFiles:
        require_name(name)
        return CollectionFiles(self._data_dir, name)

    def _opened(self, name: str, files: CollectionFiles, pointer: Pointer) -> EdgeCollection:
        self._open[name] = EdgeCollection(files, pointer, self._resources)
        return self._open[name]

"""The embedded backend: Qdrant Edge shards under one data directory, which one process holds at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from router_service.backends.base import CollectionSpec, Compression
from router_service.backends.common import require_name
from router_service.backends.disk import DirectoryLock, FreeSpace, storage_call
from router_service.backends.edge.collection import EdgeCollection
from router_service.backends.edge.files import CollectionFiles, Pointer
from router_service.backends.edge.generation import EdgeSettings, Hosts, create_files
from router_service.errors import CorruptMemory, StorageError

# Opening a shard of that size takes 10 ms, of 160 MB 250 ms, and keeps every thread of its process waiting.
ISOLATE_ABOVE_BYTES = 8 << 20


class EdgeBackend:
    """See Backend. Safe to call from several threads."""

    def __init__(
        self,
        data_dir: Path,
        *,
        min_free_bytes: int | None = None,
        search_threads: int = 1,
        isolate_above_bytes: int = ISOLATE_ABOVE_BYTES,
        workers: int = 64,
    ) -> None:
        """Takes the directory, making it when it is not there. Raises DirectoryInUse.

        `min_free_bytes`: below it writes raise DiskFull; default max(1 GiB, 5 % of the file system).
        `search_threads`: of the engine, per collection; more than 1 gains nothing, a collection has one large segment.
        `isolate_above_bytes`: of keys, above which a collection has an engine process of its own, for at most `workers`
        of them.
        """
        self._data_dir = data_dir
        self._settings = EdgeSettings(
            search_threads, FreeSpace(data_dir, min_free_bytes), isolate_above_bytes, Hosts(workers)
        )
        self._open: dict[str, EdgeCollection] = {}
        self._opening: set[str] = set()
        self._lock = threading.Lock()
        with storage_call(f"open {data_dir}"):
            data_dir.mkdir(parents=True, exist_ok=True)
            self._directory_lock = DirectoryLock(data_dir)

    def create(self, name: str, spec: CollectionSpec) -> EdgeCollection:
        """See Backend.create."""
        files = self._files(name)
        with self._lock:
            if files.exists():
                raise StorageError(f"{files.directory} already holds a collection")
            pointer = Pointer(0, spec, Compression())
            create_files(files, pointer, self._settings)
            return self._opened(name, files, pointer)

    def open(self, name: str, spec: CollectionSpec) -> EdgeCollection:
        """See Backend.open. Removes what a crash left behind."""
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

    def drop(self, name: str) -> None:
        """See Backend.drop."""
        files = self._files(name)
        with self._lock:
            if name in self._open and not self._open[name].closed:
                raise StorageError(f"collection {name!r} is open; close it before dropping it")
            self._open.pop(name, None)
            files.remove()

    def close(self) -> None:
        """See Backend.close."""
        with self._lock, ExitStack() as every_one:  # even when one fails
            every_one.callback(self._directory_lock.release)
            for collection in self._open.values():
                every_one.callback(collection.close)

    def _files(self, name: str) -> CollectionFiles:
        require_name(name)
        return CollectionFiles(self._data_dir, name)

    def _opened(self, name: str, files: CollectionFiles, pointer: Pointer) -> EdgeCollection:
        self._open[name] = EdgeCollection(files, pointer, self._settings)
        return self._open[name]

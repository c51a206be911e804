"""Where memories are kept, by the settings: the one place that knows every backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from router_service.backends.base import Backend
from router_service.backends.disk import private_directory, storage_call
from router_service.backends.qdrant_server.options import BACKEND_SETTING, ServerOptions, is_url
from router_service.memories.store import MemoryStore
from router_service.settings import EDGE, EXACT, QdrantSettings, ServiceSettings
from router_service.snapshots.local import LocalSnapshotStore


def make_store(
    settings: ServiceSettings, named_by: str = BACKEND_SETTING
) -> tuple[Backend, MemoryStore]:
    """A backend and the memories in it, which are not open yet. Raises InvalidField or StorageError.

    `named_by`: the setting that errors about a server tell to change.
    """
    # An engine is imported only where it is used: the oracle needs none.
    if is_url(settings.backend):
        return _on_server(settings.qdrant.options(settings.backend, named_by), settings.data)
    if settings.backend == EXACT:
        from router_service.backends.exact import ExactBackend

        backend: Backend = ExactBackend()
        return backend, MemoryStore(backend, None)
    from router_service.backends.edge.backend import EdgeBackend

    memories = settings.on_disk("memories")
    assert memories is not None  # noqa: S101  # ServiceSettings sees to it
    backend = EdgeBackend(
        memories,
        min_free_bytes=settings.min_free_bytes,
        isolate_above_bytes=settings.isolate_above_mib << 20,
        workers=settings.workers,
    )
    return backend, MemoryStore(backend, memories)


def make_snapshot_store(
    settings: ServiceSettings, backend: Backend, store: MemoryStore
) -> LocalSnapshotStore:
    """Where the snapshots of make_store()'s memories are kept. Raises StorageError when that cannot be made."""
    directory, packs = settings.snapshots, settings.packs
    if settings.snapshot_dir is not None and directory is not None:
        with storage_call(f"use --snapshot-dir {directory}"):
            private_directory(directory)
    if not is_url(settings.backend):
        return LocalSnapshotStore(store, directory, settings.min_free_bytes, packs)
    from router_service.backends.qdrant_server.backend import ServerBackend
    from router_service.snapshots.server import ServerSnapshotStore

    assert isinstance(backend, ServerBackend)  # noqa: S101  # by make_store()
    return ServerSnapshotStore(store, backend, directory, settings.min_free_bytes, packs)


@contextmanager
def opened_store(
    place: str, qdrant: QdrantSettings, named_by: str = BACKEND_SETTING
) -> Iterator[MemoryStore]:
    """The memories of a directory that no service holds, or of a server, open. Raises as make_store()."""
    where: dict[str, Any] = {"backend": place, "data": None}
    if not is_url(place):
        where = {"backend": EDGE, "data": Path(place)}
    backend, store = make_store(ServiceSettings(**where, qdrant=qdrant), named_by)
    try:
        store.open_all()
        yield store
    finally:
        try:
            store.close()
        finally:
            backend.close()


def _on_server(options: ServerOptions, data: Path | None) -> tuple[Backend, MemoryStore]:
    from router_service.backends.qdrant_server.backend import ServerBackend
    from router_service.backends.qdrant_server.connection import Connection
    from router_service.memories.server_catalogue import ServerCatalogue

    connection = Connection(options)
    try:
        backend = ServerBackend(connection, data)
        hits = data / "hits" if data is not None else None
        return backend, MemoryStore(backend, None, shared=ServerCatalogue(backend), hits=hits)
    except BaseException:
        connection.close()
        raise

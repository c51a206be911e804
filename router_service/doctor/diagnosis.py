"""The two ways to ask: a data directory from outside, and the store of a running service."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from shlex import quote

from router_service.backends.boundary import storage_call
from router_service.doctor.directory import check_access, check_lock, check_space, lock_holder
from router_service.doctor.entries import check_entries
from router_service.doctor.findings import Findings, error, fine
from router_service.doctor.memories import check_memories
from router_service.doctor.settings import check_settings
from router_service.doctor.snapshots import check_snapshots
from router_service.doctor.versions import check_versions
from router_service.errors import StorageError
from router_service.memory_store import MemoryStore


def diagnose_directory(data: Path, min_free_bytes: int | None, *, deep: bool) -> Findings:
    """Everything that files say. `min_free_bytes`: default max(1 GiB, 5 % of the file system)."""
    yield from check_versions()
    if not data.is_dir():
        remedy = f"router-service serve --data {quote(str(data))}"
        yield error(
            "data", f"{data}: " + ("not a directory" if data.exists() else "not there"), remedy
        )
        return
    try:
        holder = lock_holder(data / "memories")
        in_use = holder is not None
        yield check_lock(data, holder)
        yield check_space(data, min_free_bytes)
        yield from _check_files(data, in_use=in_use)
        yield from check_snapshots(data / "snapshots", deep=deep, in_use=in_use)
    except StorageError as failed:
        yield error("data", str(failed), f"ls -lR {quote(str(data))}")


def diagnose_store(store: MemoryStore, min_free_bytes: int | None, *, deep: bool) -> Findings:
    """What a running service says about itself and its files. Raises StorageError."""
    yield from check_versions()
    yield from check_entries(store)
    if store.directory is None:
        yield fine("data", store.place)
        for memory in store.memories():
            yield from check_settings(memory.record)
        return
    data = store.directory.parent
    yield check_space(store.directory, min_free_bytes)
    with store.exclusive():  # no memory appears or goes meanwhile
        yield from _check_files(data, in_use=True, but=store.broken)
    yield from check_snapshots(data / "snapshots", deep=deep, in_use=True)


def _check_files(data: Path, *, in_use: bool, but: Collection[str] = ()) -> Findings:
    with storage_call(f"read {data}"):
        yield from check_access(data)
        if (data / "memories").is_dir():
            yield from check_memories(data / "memories", in_use=in_use, but=but)

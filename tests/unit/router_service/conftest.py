from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from router_service.backends.base import Compression, Quantization
from router_service.memories.memory import RoutingMemory
from router_service.memories.store import MemoryStore
from router_service.snapshots import files, local
from router_service.snapshots.local import SnapshotInfo
from tests.congruence.fast_dir import fast_dir
from tests.unit.router_service.numbered_memory import (
    MODEL,
    SETTINGS,
    fill,
    open_store,
)

__all__ = ["fast_dir", "memory", "monday", "prepared", "snapshot", "snapshot_store", "store"]


@pytest.fixture
def store(fast_dir: Path) -> Iterator[MemoryStore]:
    with open_store(fast_dir / "data") as opened:
        yield opened


@pytest.fixture
def memory(store: MemoryStore) -> RoutingMemory:
    """A memory named `bible` with entries 0 to 299 in every layer."""
    made = store.create("bible", MODEL, SETTINGS)
    fill(made, 0, 300)
    return made


@pytest.fixture
def snapshot_store(fast_dir: Path) -> Path:
    """The directory of snapshots."""
    return fast_dir / "snapshots"


@pytest.fixture
def snapshot(store: MemoryStore, memory: RoutingMemory, snapshot_store: Path) -> SnapshotInfo:
    """A snapshot named `monday` of `bible`."""
    return local.create(store, "bible", snapshot_store, "monday", min_free_bytes=0)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> SnapshotInfo:
    """A snapshot with files of every kind: one layer without index, one in int8 with a tail. Not to be changed."""
    directory = tmp_path_factory.mktemp("prepared")
    with open_store(directory / "data") as opened:
        made = opened.create("bible", MODEL, SETTINGS)
        fill(made, 0, 300)
        made.layers[1].optimize(Compression(Quantization.INT8))
        fill(made, 300, 310)
        return local.create(
            opened, "bible", directory / "snapshot_store", "monday", min_free_bytes=0
        )


@pytest.fixture
def monday(prepared: SnapshotInfo, snapshot_store: Path) -> Path:
    """A copy of the prepared snapshot."""
    path = snapshot_store / "bible" / "monday"
    files.copy_files(prepared.path, files.files_of(prepared.path), path, files.unwatched)
    return path

"""A shard that has never had an entry: the engine does not know of it, for an empty one costs it 13 MiB and 0.2 s.

On disk it is an empty directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from router_service.arrays import F32, U64, Entries, ExampleRef
from router_service.backends.base import CollectionSpec, SearchOptions
from router_service.backends.disk import fsync_directory, fsync_tree, remove_tree, storage_call
from router_service.backends.edge.engine import Audit, EngineShard, ShardCounts, read_hits
from router_service.backends.edge.files import CollectionFiles, Pointer


def create(files: CollectionFiles, pointer: Pointer) -> None:
    """The directory of a new shard. Raises StorageError."""
    shard = files.shard(pointer.generation)
    with storage_call(f"create {shard}"):
        shard.mkdir(parents=True)


def is_unwritten(files: CollectionFiles, pointer: Pointer) -> bool:
    """Whether nothing was ever written to a shard, with its directory in place again if a copy left that out.

    Whether it should have entries, the saved value rows say. Raises StorageError.
    """
    shard = files.shard(pointer.generation)
    with storage_call(f"open {shard}"):
        if files.values(pointer.generation).exists():
            shard.mkdir(exist_ok=True)
        remove_tree(_begun(shard))
        return shard.is_dir() and not any(shard.iterdir())


def _begun(shard: Path) -> Path:
    """Where a shard is made."""
    return shard.with_name(f"{shard.name}.begun")


class UnwrittenShard:
    """Answers as a shard without entries; make() it before the first is written."""

    alive = True  # it cannot die

    def __init__(self, directory: Path, spec: CollectionSpec) -> None:
        self._directory, self._spec = directory, spec

    def make(self) -> None:
        """The engine's files. They take the place of the empty directory at once: a crash leaves one or the other."""
        begun = _begun(self._directory)
        remove_tree(begun)
        shard = EngineShard.create(begun, self._spec)
        shard.flush()
        shard.close()
        with storage_call(f"create {self._directory}"):
            fsync_tree(begun)
            begun.rename(self._directory)
            fsync_directory(begun.parent)

    def search(
        self,
        queries: F32,
        limit: int,
        options: SearchOptions,
        excluded: Sequence[ExampleRef | None],
    ) -> tuple[U64, F32]:
        """See EngineShard."""
        return read_hits([[]] * len(queries), limit)

    def delete(self, ids: U64) -> None:
        """See EngineShard."""

    def scroll(
        self, after: int | None, limit: int, *, keys: bool = True, provenance: bool = True
    ) -> Entries:
        """See EngineShard."""
        return Entries.concat([], self._spec.dimension if keys else 0, self._spec.value_width)

    def retrieve(self, ids: U64, *, keys: bool = False) -> Entries:
        """See EngineShard."""
        return self.scroll(None, 0, keys=keys)

    def ids(self) -> U64:
        """See EngineShard."""
        return np.empty(0, np.uint64)

    def audit(self, ids: U64, generation: int, *, keys: bool) -> Audit:
        """See EngineShard."""
        return Audit.empty(self._spec)

    def problems(self) -> list[str]:
        """See EngineShard."""
        return []

    def counts(self, generation: int) -> ShardCounts:
        """See EngineShard."""
        return ShardCounts(0, 0, 0)

    def flush(self) -> None:
        """See EngineShard."""

    def close(self) -> None:
        """See EngineShard."""

"""The shard, values and files of one layer, and the locks that guard them.

Three locks, taken in this order. The maintenance lock: one optimize() at a time. The write lock makes writes take turns
with whoever needs the files to stand still. The engine lock guards the shard, the value table and the pointer, and is
held for one short engine call at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np

from router_service.arrays import U64
from router_service.backends.catch_up import CatchUp
from router_service.backends.disk import fsync_tree
from router_service.backends.edge_files import CollectionFiles, Pointer
from router_service.backends.edge_generation import EdgeSettings, open_shard
from router_service.backends.fifo_lock import FifoLock
from router_service.backends.optimize_job import OptimizeJob
from router_service.backends.pacing import Pacing
from router_service.backends.saved_values import SavedValues, read_table
from router_service.backends.shard import Shard, ShardCounts
from router_service.backends.value_table import ValueTable
from router_service.errors import CollectionClosed, StorageError

_REVIVE_EVERY_S = 1.0


class EdgeState:
    """What an EdgeCollection works with. Open from the start until close()."""

    def __init__(self, files: CollectionFiles, pointer: Pointer, settings: EdgeSettings) -> None:
        """Opens the collection. Raises CorruptMemory when its entries are not those of the last close()."""
        self._files, self._pointer, self._settings = files, pointer, settings
        self._spec = pointer.spec
        self._maintenance_lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._engine_lock = FifoLock()
        self._job: OptimizeJob | None = None
        self._catch_up: CatchUp | None = None  # of an optimize() whose copy has been taken
        self._tidying = self._overtaken = False
        self.pacing = Pacing()
        self._frozen = False
        self._flushed: ValueTable | None = None
        self._closing = self._closed = False
        self._worked_s = 0.0  # by the last write
        self._apart = (
            0  # entries outside of the largest segment that are indexed, as far as is known
        )
        self._revived = -_REVIVE_EVERY_S
        self._shard = open_shard(files, pointer, settings)
        try:
            counts = self._shard.counts(pointer.generation)
            path, width = files.values(pointer.generation), self._spec.value_width
            self._saved, saved = SavedValues.open(path, width)
            if saved is not None:
                self._table = self._saved.check(saved, counts.entries)
            else:
                self._table = read_table(self._shard, width)
            self._count(counts)
        except BaseException:
            self._shard.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    @property
    def changed_entries(self) -> int:
        """See Maintained."""
        return self._changed

    @property
    def changed_bytes(self) -> int:
        """See Maintained."""
        return self._changed * self._spec.dimension * 4

    @property
    def outdated_share(self) -> float:
        """See Maintained."""
        return self._outdated / max(self._graph_entries, 1)

    def _count(self, counts: ShardCounts) -> None:
        self._changed, self._graph_entries = counts.tail, counts.graph_vectors
        self._outdated = max(0, counts.graph_vectors - (counts.entries - counts.tail))

    @contextmanager
    def _writing(self, ids: U64) -> Iterator[Shard]:
        """The shard, for a change of the entries of `ids`; an optimize() under way will have them as they are then."""
        shard, started = self._open_shard(), time.monotonic()
        # Entries of the tail count here too when they are written again: too many, never too few.
        self._outdated += int(np.count_nonzero(self._table.holds(ids)))
        try:
            yield shard
        except BaseException:  # Ctrl-C too
            if shard.alive:  # else read when it is revived
                self._table = read_table(shard, self._spec.value_width)  # some may be written
            raise
        finally:
            self._changed += len(ids)
            if self._catch_up is not None:
                self._catch_up.note(ids)
            self._worked_s = time.monotonic() - started

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        """Inside, the files on disk are complete and nobody changes them; searches go on."""
        self.flush()  # so that little is left to do while writes wait
        with self._write_lock:
            try:
                with self._engine_lock:
                    self._flush_writes()
                    self._frozen = True
                yield
            finally:
                self._frozen = False

    def flush(self) -> None:
        """See Collection.flush. Returns at once while the files stand still, for they were flushed before."""
        if self._flushed is not self._table and not self._frozen:
            # Beside the engine, so that little is left for its own flush, during which no search is answered.
            with suppress(OSError):  # a file that is being replaced
                fsync_tree(self._files.shard(self._pointer.generation) / "segments")
        with self._engine_lock:
            if not self._frozen:
                self._flush_writes()

    def close(self) -> None:
        """See Collection.close."""
        self._closing = True
        if job := self._job:
            job.stop()
        with self._maintenance_lock, self._write_lock, self._engine_lock:
            if self._closed:
                return
            self._closed = True
            try:
                if self._shard.alive:
                    self._shard.flush()
                    self._saved.save(self._table)
            finally:
                self._shard.close()

    def _flush_writes(self) -> None:
        """Flushes unless nothing was written since: a flush takes 30 ms. Each write makes another table."""
        shard = self._open_shard()
        if self._flushed is not self._table:
            shard.flush()
            self._flushed = self._table

    def _open_shard(self) -> Shard:
        """Raises CollectionClosed. Opens the shard again when its process has died; call it under the engine lock."""
        if self._closing:
            raise CollectionClosed(self._files.directory)
        if not self._shard.alive:
            self._revive()
        return self._shard

    def _revive(self) -> None:
        if time.monotonic() < self._revived + _REVIVE_EVERY_S:
            raise StorageError(
                f"the engine process of {self._files.directory} ended; it is started again soon, retry"
            )
        self._revived = time.monotonic()
        self._shard.close()
        shard = open_shard(self._files, self._pointer, self._settings, len(self._table))
        self._shard, self._table = shard, read_table(shard, self._spec.value_width)

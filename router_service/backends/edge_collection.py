"""One layer's entries in an embedded Qdrant shard.

Two locks. The engine lock guards the shard, the value table and the pointer, and is held for one short engine call at a
time. The write lock makes writes and maintenance take turns; whoever needs both takes the write lock first.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from router_service.arrays import F32, U64, Entries, ExampleRef, Neighbours, Provenance
from router_service.backends.base import (
    CollectionInfo,
    FrozenFiles,
    Metric,
    Quantization,
    Report,
    SearchOptions,
    say_nothing,
)
from router_service.backends.common import as_stored, empty_neighbours, per_query
from router_service.backends.disk import disk_bytes, remove_durably, remove_tree
from router_service.backends.edge_engine import (
    EngineShard,
    delete_operation,
    read_hits,
    search_request,
    upsert_operation,
)
from router_service.backends.edge_files import CollectionFiles, Pointer
from router_service.backends.edge_generation import EdgeSettings, build_generation
from router_service.backends.edge_points import (
    VALUE,
    Record,
    entries_of,
    payloads_of,
    provenance_of,
    value_rows,
)
from router_service.backends.optimize_job import OptimizeJob
from router_service.backends.value_table import ValueTable
from router_service.errors import Busy, CollectionClosed, CorruptMemory, StorageError

# The GIL is held until an engine call returns: with 128, one token waits 40 ms beside a long request, with 64 half of
# that, and 512 tokens take 2 % longer (benchmarks/README.md).
_QUERIES_PER_CALL = 64
# An update of 65,536 floats holds the GIL for some 10 ms.
_FLOATS_PER_UPDATE = 65_536
_IDS_PER_DELETE = 512
_ENTRIES_PER_PAGE = 2048
_LOCK_POLL_S = 0.05


class EdgeCollection:
    """See Collection. Ties in distance come in the engine's order."""

    def __init__(self, files: CollectionFiles, pointer: Pointer, settings: EdgeSettings) -> None:
        """Opens the collection. Raises CorruptMemory when its entries are not those of the last close()."""
        self._files = files
        self._pointer = pointer
        self._settings = settings
        self._spec = pointer.spec
        self._engine_lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._job: OptimizeJob | None = None
        self._frozen = False
        self._flushed: ValueTable | None = None
        self._closing = False
        self._closed = False
        shard_path, threads = files.shard(pointer.generation), settings.search_threads
        self._shard = EngineShard.load(shard_path, self._spec, pointer.quantization, threads)
        try:
            saved = ValueTable.load(files.values(pointer.generation), self._spec.value_width)
            self._table_is_saved = saved is not None
            self._table = self._checked(saved) if saved is not None else self._read_table()
        except BaseException:
            self._shard.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    def search(
        self,
        queries: F32,
        k: int,
        options: SearchOptions,
        exclude: Sequence[ExampleRef] = (),
    ) -> Neighbours:
        """See Collection.search."""
        stored = as_stored(queries, self._spec.metric, "queries")
        excluded = per_query(exclude, len(queries))
        found = empty_neighbours(len(queries), k, self._spec.value_width)
        for start in range(0, len(queries), _QUERIES_PER_CALL):
            rows = np.s_[start : start + _QUERIES_PER_CALL]
            part = self._search_part(stored[rows], k, options, excluded[rows])
            width = part.ids.shape[1]
            found.ids[rows, :width] = part.ids
            found.distances[rows, :width] = part.distances
            found.values[rows, :width] = part.values
        return found

    def _search_part(
        self, stored: F32, k: int, options: SearchOptions, excluded: Sequence[ExampleRef | None]
    ) -> Neighbours:
        """Neighbours of at most _QUERIES_PER_CALL queries; as many columns as there are entries, at most k."""
        limit = min(k, len(self._table))
        request = search_request(stored, limit, options, excluded)
        with self._engine_lock:
            hits = self._open_shard().search(request) if limit else [()] * len(stored)
            table = self._table
        ids, scores = read_hits(hits, limit)
        return Neighbours(ids, self._distances(scores), table.gather(ids))

    def _distances(self, scores: F32) -> F32:
        """The engine's scores, d or cosine, as distances: d squared, or 1 - cosine."""
        wide = scores.astype(np.float64)
        if self._spec.metric is Metric.EUCLID:
            with np.errstate(over="ignore"):  # too far for f32 is inf
                return (wide * wide).astype(np.float32)
        return np.where(np.isinf(wide), np.inf, np.clip(1.0 - wide, 0.0, 2.0)).astype(np.float32)

    def upsert(self, entries: Entries, *, fsync: bool = False) -> None:
        """See Collection.upsert; each engine update of up to 512 entries is written whole or not at all."""
        keys = as_stored(entries.keys, self._spec.metric, "keys")
        stored = replace(entries, keys=keys)
        step = min(max(_FLOATS_PER_UPDATE // self._spec.dimension, 8), 512)
        with self._write_lock:
            self._settings.free_space.require()
            self._forget_saved_table()
            for start in range(0, len(stored), step):
                self._upsert_part(stored.slice(start, start + step))
        if fsync:
            self.flush()

    def _upsert_part(self, entries: Entries) -> None:
        payloads = payloads_of(entries, self._pointer.generation)
        operation = upsert_operation(entries.ids, entries.keys, payloads)
        with self._engine_lock:
            shard = self._open_shard()
            try:
                shard.apply(operation)
            except StorageError:
                self._table = self._read_table()  # some entries may have been written
                raise
            self._table = self._table.with_rows(entries.ids, entries.values)

    def delete(self, ids: U64, *, fsync: bool = False) -> int:
        """See Collection.delete; needs no free disk."""
        with self._write_lock:
            present = np.unique(ids[self._table.holds(ids)])
            if len(present):
                self._forget_saved_table()
            for start in range(0, len(present), _IDS_PER_DELETE):
                self._delete_part(present[start : start + _IDS_PER_DELETE])
        if fsync:
            self.flush()
        return len(present)

    def _delete_part(self, ids: U64) -> None:
        operation = delete_operation(ids)
        with self._engine_lock:
            shard = self._open_shard()
            try:
                shard.apply(operation)
            except StorageError:
                self._table = self._read_table()  # some entries may be gone
                raise
            self._table = self._table.without(ids)

    def scroll(self, after: int | None, limit: int, *, with_keys: bool = True) -> Entries:
        """See Collection.scroll."""
        records: list[Record] = []
        limit = min(limit, len(self._table))
        while len(records) < limit:
            size = min(limit - len(records), _ENTRIES_PER_PAGE)
            with self._engine_lock:
                page = self._open_shard().scroll(after, size, fields=True, with_keys=with_keys)
            records += page
            if len(page) < size:
                break
            after = page[-1].id
        dimension = self._spec.dimension if with_keys else 0
        return entries_of(records, dimension, self._spec.value_width)

    def provenance(self, ids: U64) -> dict[int, Provenance]:
        """See Collection.provenance."""
        with self._engine_lock:
            records = self._open_shard().retrieve(ids)
        return {record.id: provenance_of(record.payload) for record in records}

    def info(self) -> CollectionInfo:
        """See Collection.info."""
        with self._engine_lock:
            shard, pointer = self._open_shard(), self._pointer
            entries = shard.count()
            tail = shard.count(generation=pointer.generation)
            indexed = min(shard.indexed_vectors(), entries - tail)
        size = disk_bytes(self._files.generation(pointer.generation))
        return CollectionInfo(entries, indexed, pointer.quantization, size)

    def optimize(self, quantization: Quantization, report: Report = say_nothing) -> None:
        """See Collection.optimize; upserts wait until it is done, close() stops it."""
        job = OptimizeJob()
        with self._write_lock:
            self._freeze(job)
            try:
                target = self._pointer.next(quantization)
                shard = build_generation(
                    self._files, self._pointer, target, self._table, job, self._settings
                )
                self._swap(shard, target)
            finally:
                self._job, self._frozen = None, False

    @contextmanager
    def paused_for_copy(self) -> Iterator[FrozenFiles]:
        """See FileCollection."""
        while not self._write_lock.acquire(timeout=_LOCK_POLL_S):
            if self._job is not None:
                directory = self._files.directory
                raise Busy(f"{directory} is being optimized; try again when that is done")
        try:
            self._freeze(None)
            yield self._frozen_files()
        finally:
            self._frozen = False
            self._write_lock.release()

    def _frozen_files(self) -> FrozenFiles:
        with self._engine_lock:
            table, number = self._checked(self._table), self._pointer.generation

        def complete(copy: Path) -> None:
            table.save(CollectionFiles(copy.parent, copy.name).values(number))

        names = ("CURRENT", self._files.generation(number).name)
        return FrozenFiles(self._files.directory, names, len(table), complete)

    def flush(self) -> None:
        """See Collection.flush. Returns at once during optimize(), which flushed before it began."""
        with self._engine_lock:
            if not self._frozen:
                self._flush_writes()

    def close(self) -> None:
        """See Collection.close."""
        self._closing = True
        if job := self._job:
            job.stop()
        with self._write_lock, self._engine_lock:
            if self._closed:
                return
            self._closed = True
            try:
                self._shard.flush()
                self._save_table()
            finally:
                self._shard.close()

    def _freeze(self, job: OptimizeJob | None) -> None:
        """Makes the files on disk complete, and keeps flush() from changing them while they are copied."""
        # Before _closing is read: close() sets that first, then looks for a job to stop.
        self._job = job
        with self._engine_lock:
            self._flush_writes()
            self._frozen = True

    def _flush_writes(self) -> None:
        """Flushes unless nothing was written since: a flush holds the GIL for 30 ms. Each write makes another table."""
        shard = self._open_shard()
        if self._flushed is not self._table:
            shard.flush()
            self._flushed = self._table

    def _swap(self, shard: EngineShard, target: Pointer) -> None:
        """Lets searches and writes go to another generation and removes the present one."""
        with self._engine_lock:
            old_shard, old = self._shard, self._pointer
            self._shard, self._pointer = shard, target
            self._table_is_saved = True
        with suppress(
            StorageError
        ):  # the new generation counts; the next open removes what is left
            old_shard.close()
            remove_tree(self._files.generation(old.generation))

    def _open_shard(self) -> EngineShard:
        if self._closing:
            raise CollectionClosed(self._files.directory)
        return self._shard

    def _checked(self, saved: ValueTable) -> ValueTable:
        """A damaged write-ahead log shows only as missing entries. Raises CorruptMemory."""
        entries = self._shard.count()
        if entries != len(saved):
            raise CorruptMemory(
                f"{self._files.directory} has {entries} entries, {len(saved)} when it was closed; restore "
                f"the memory from a snapshot, or remove {self._files.values(self._pointer.generation)} to "
                "go on with what is left"
            )
        return saved

    def _read_table(self) -> ValueTable:
        """The value table as the engine has it; takes 20 us per entry."""
        ids: list[int] = []
        blocks = [np.empty((0, self._spec.value_width), np.float32)]
        page = self._shard.scroll(None, _ENTRIES_PER_PAGE, fields=[VALUE], with_keys=False)
        while page:
            ids += [record.id for record in page]
            blocks.append(value_rows((r.payload for r in page), self._spec.value_width))
            page = self._shard.scroll(ids[-1], _ENTRIES_PER_PAGE, fields=[VALUE], with_keys=False)
        return ValueTable(np.array(ids, np.uint64), np.concatenate(blocks))

    def _save_table(self) -> None:
        if not self._table_is_saved:
            with suppress(StorageError):  # a disk that is full now: the next open reads the engine
                self._table.save(self._files.values(self._pointer.generation))

    def _forget_saved_table(self) -> None:
        """A saved table promises that the shard has exactly its entries."""
        if self._table_is_saved:
            remove_durably(self._files.values(self._pointer.generation))
            self._table_is_saved = False

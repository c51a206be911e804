"""A lock that is handed on in the order of asking: a loop of short writes cannot starve a search."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from router_service.arrays import F32, U64, Entries, ExampleRef, Neighbours, Provenance
from router_service.backends.base import (
    CollectionInfo,
    Compression,
    FrozenFiles,
    Metric,
    Pacing,
    Quantization,
    Report,
    SearchOptions,
    say_nothing,
)
from router_service.backends.common import as_stored, empty_neighbours, per_query
from router_service.backends.disk import disk_bytes, fsync_tree, remove_tree
from router_service.backends.edge.files import CollectionFiles, Pointer
from router_service.backends.edge.generation import (
    EdgeSettings,
    copy_generation,
    new_generation,
    open_shard,
)
from router_service.backends.edge.optimizer import CatchUp, OptimizeJob
from router_service.backends.edge.shard import Shard, ShardCounts
from router_service.backends.edge.values import SavedValues, ValueTable, read_table
from router_service.errors import Busy, CollectionClosed, StorageError


class FifoLock:
    """Not reentrant. threading.Lock lets the thread that just released it take it again before those that wait."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._held = False

    def __enter__(self) -> None:
        with self._mutex:
            if not self._held:
                self._held = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()  # who waited longest holds it now
            else:
                self._held = False


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


# One engine call at a time: with 128, one token waits 40 ms beside a long request, with 64 half of that, and 512 tokens
# take 2 % longer (benchmarks/README.md).
_QUERIES_PER_CALL = 64
# An update of so many floats keeps the engine for 7 to 10 ms. Few large ones and long rests (see pacing) delay fewer
# lookups than many small ones: at 2,048 floats per key p99 is 7.4 ms rather than 9.5.
_FLOATS_PER_UPDATE = 131_072
_IDS_PER_DELETE = 128
_ENTRIES_PER_PAGE = 2048
_FLOATS_PER_PAGE = 1 << 19
# A graph search steps over replaced and deleted entries, but no longer finds its way when they are many: recall@1 is
# 0.99 with 0.3 of them, 0.17 to 0.8 with 0.8. From here on every entry is looked at until the next optimize().
_MOST_OUTDATED = 0.3
# What tidy() leaves: one large, one of what has come since, which takes a third of the time to index, and the one that
# is written to. Each costs a search 0.3 to 0.5 ms.
_SEGMENTS = 3
# Share of the entries that may be in the second one.
_MOST_APART = 0.25
_LOCK_POLL_S = 0.05


class EdgeCollection(EdgeState):
    """See Collection. Ties in distance come in the engine's order."""

    def search(
        self,
        queries: F32,
        k: int,
        options: SearchOptions,
        exclude: Sequence[ExampleRef] = (),
    ) -> Neighbours:
        """See Collection.search."""
        self.pacing.searched()
        if self.outdated_share > _MOST_OUTDATED:
            options = replace(options, exact=True)
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
        with self._engine_lock:
            shard, limit = self._open_shard(), min(k, len(self._table))
            if not limit:
                return empty_neighbours(len(stored), 0, self._spec.value_width)
            ids, scores = shard.search(stored, limit, options, excluded)
            table = self._table
        return Neighbours(ids, self._distances(scores), table.gather(ids))

    def _distances(self, scores: F32) -> F32:
        """The engine's scores, d or cosine, as distances: d squared, or 1 - cosine."""
        wide = scores.astype(np.float64)
        if self._spec.metric is Metric.EUCLID:
            with np.errstate(over="ignore"):  # too far for f32 is inf
                return (wide * wide).astype(np.float32)
        return np.where(np.isinf(wide), np.inf, np.clip(1.0 - wide, 0.0, 2.0)).astype(np.float32)

    def upsert(self, entries: Entries, *, fsync: bool = False) -> None:
        """See Collection.upsert; each engine update is written whole or not at all."""
        keys = as_stored(entries.keys, self._spec.metric, "keys")
        stored = replace(entries, keys=keys)
        step = min(max(_FLOATS_PER_UPDATE // self._spec.dimension, 8), 512)
        until = self.pacing.patience()
        self.pacing.wait_while(lambda: self._tidying, until)
        with self._write_lock:
            self._settings.free_space.require()
            self._saved.forget()
            for start in range(0, len(stored), step):
                self._upsert_part(stored.slice(start, start + step))
                self.pacing.rest(self._worked_s, until)
        if fsync:
            self.flush()

    def _upsert_part(self, entries: Entries) -> None:
        before = self._table
        after = before.with_rows(entries.ids, entries.values)
        with self._engine_lock, self._writing(entries.ids) as shard:
            shard.upsert(entries, self._pointer.generation)
            if self._table is not before:  # the shard's process was started again
                after = self._table.with_rows(entries.ids, entries.values)
            self._table = after

    def delete(self, ids: U64, *, fsync: bool = False) -> int:
        """See Collection.delete; needs no free disk."""
        until = self.pacing.patience()
        with self._write_lock:
            present = np.unique(ids[self._table.holds(ids)])
            if len(present):
                self._saved.forget()
            for start in range(0, len(present), _IDS_PER_DELETE):
                self._delete_part(present[start : start + _IDS_PER_DELETE])
                self.pacing.rest(self._worked_s, until)
        if fsync:
            self.flush()
        return len(present)

    def _delete_part(self, ids: U64) -> None:
        with self._engine_lock, self._writing(ids) as shard:
            shard.delete(ids)
            self._table = self._table.without(ids)

    def scroll(self, after: int | None, limit: int, *, with_keys: bool = True) -> Entries:
        """See Collection.scroll."""
        dimension = self._spec.dimension if with_keys else 0
        pages: list[Entries] = []
        most = max(64, _FLOATS_PER_PAGE // self._spec.dimension) if with_keys else _ENTRIES_PER_PAGE
        left = min(limit, len(self._table))
        while left > 0:
            size = min(left, most, _ENTRIES_PER_PAGE)
            with self._engine_lock:
                page = self._open_shard().scroll(after, size, keys=with_keys)
            pages.append(page)
            left -= size
            if len(page) < size:
                break
            after = int(page.ids[-1])
        return Entries.concat(pages, dimension, self._spec.value_width)

    def provenance(self, ids: U64) -> dict[int, Provenance]:
        """See Collection.provenance."""
        with self._engine_lock:
            found = self._open_shard().retrieve(ids)
        return dict(zip(found.ids.tolist(), found.provenance, strict=True))

    def info(self) -> CollectionInfo:
        """See Collection.info."""
        with self._engine_lock:
            shard, pointer = self._open_shard(), self._pointer
            counts = shard.counts(pointer.generation)
        indexed = min(counts.graph_vectors, counts.entries - counts.tail)
        size = disk_bytes(self._files.generation(pointer.generation))
        return CollectionInfo(counts.entries, indexed, pointer.compression, size)

    def optimize(
        self, compression: Compression | Quantization | None = None, report: Report = say_nothing
    ) -> None:
        """See Collection.optimize; ends what tidy() does at the time."""
        while not self._maintenance_lock.acquire(timeout=_LOCK_POLL_S):
            if not self._tidying:
                raise Busy(
                    f"{self._files.directory} is being optimized; try again when that is done"
                )
            self._overtaken = True
            if job := self._job:
                job.stop()
        try:
            self._change_generation(self._pointer.next(compression), report)
        finally:
            self._maintenance_lock.release()

    def tidy(self, report: Report = say_nothing) -> bool:
        """See Maintained."""
        if not self._maintenance_lock.acquire(blocking=False):
            return False
        self._tidying, self._overtaken = True, False
        try:
            self._change_generation(self._pointer.next(None), report, self._segments())
        except StorageError:
            if not self._overtaken:
                raise
            return False
        finally:
            self._tidying = False
            self._maintenance_lock.release()
        return True

    def _segments(self) -> int:
        """How many tidy() leaves: one when much is outdated, or much has come since there was but one."""
        new = self._changed + self._apart
        much = self.outdated_share > _MOST_OUTDATED / 2 or new > _MOST_APART * len(self._table)
        return 1 if much else _SEGMENTS

    def _change_generation(self, target: Pointer, report: Report, segments: int = 1) -> None:
        """Upserts wait only while files are copied, and while the new ones take over."""
        self._job = OptimizeJob(report)
        try:
            with new_generation(self._files, self._pointer, target):
                self._optimize(target, self._job, report, segments)
        finally:
            self._job = self._catch_up = None

    def _optimize(self, target: Pointer, job: OptimizeJob, report: Report, segments: int) -> None:
        report("copy", 0, 0)
        with self._standing_still():
            changed = self._changed
            copy_generation(self._files, self._pointer, target, self._settings)
            self._catch_up = CatchUp(self._read_again)
        job.run(self._files.shard(target.generation), target.spec, target.compression, segments)
        shard = open_shard(self._files, target, self._settings, len(self._table), self._shard)
        try:
            self._catch_up.bring(shard, target.generation, report)
            old, old_number = self._take_over(shard, target)
        except BaseException:
            shard.close()
            raise
        self._apart = self._apart + changed if segments > 1 else 0
        with suppress(
            StorageError
        ):  # the new generation counts; the next open removes what is left
            old.close()
            remove_tree(self._files.generation(old_number))

    def _take_over(self, shard: Shard, target: Pointer) -> tuple[Shard, int]:
        """Lets searches and writes go to another generation, of the same entries; returns what served until now."""
        catch_up = self._catch_up
        assert catch_up is not None  # noqa: S101  # set by _optimize
        with self._write_lock:
            catch_up.bring(shard, target.generation, say_nothing, down_to=0)
            counts = shard.counts(target.generation)
            if counts.entries != len(self._table):
                raise StorageError(
                    f"{self._files.shard(target.generation)} has {counts.entries} entries, expected {len(self._table)}"
                )
            shard.flush()
            self._table.save(self._files.values(target.generation))
            self._files.write(target)
            with self._engine_lock:
                old = self._shard, self._pointer.generation
                self._shard, self._pointer = shard, target
                self._saved = SavedValues(self._files.values(target.generation), is_saved=True)
                self._flushed, self._catch_up = self._table, None
                self._count(counts)
        return old

    def _read_again(self, ids: U64) -> Entries:
        with self._engine_lock:
            return self._open_shard().retrieve(ids, keys=True)

    @contextmanager
    def paused_for_copy(self) -> Iterator[FrozenFiles]:
        """See FileCollection."""
        with self._standing_still():
            yield self._frozen_files()

    def _frozen_files(self) -> FrozenFiles:
        with self._engine_lock:
            number = self._pointer.generation
            table = self._saved.check(self._table, self._open_shard().counts(number).entries)

        def complete(copy: Path) -> None:
            table.save(CollectionFiles(copy.parent, copy.name).values(number))

        names = ("CURRENT", self._files.generation(number).name)
        return FrozenFiles(self._files.directory, names, len(table), complete)

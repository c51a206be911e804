"""The embedded backend: Qdrant Edge shards under one data directory, which one process holds at a time.

A collection holds the generation of files that it serves, and an optimizer beside it that builds the next one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from typing_extensions import override

from router_service.arrays import (
    F32,
    OF_KEY,
    U64,
    Entries,
    ExampleRef,
    Neighbours,
    Provenance,
    combined_digests,
    digests_of,
    key_digests,
    rest_digests,
    rows_of,
)
from router_service.backends.base import (
    Backend,
    Collection,
    CollectionInfo,
    CollectionSpec,
    Compression,
    Engines,
    FileCollection,
    FrozenFiles,
    Hosting,
    Hurried,
    Maintained,
    Metric,
    Pacing,
    Report,
    SearchOptions,
    Verifiable,
    Versions,
    as_stored,
    numbers_of_scan,
    per_query,
    require_name,
    say_nothing,
)
from router_service.backends.disk import (
    DirectoryLock,
    FreeSpace,
    disk_bytes,
    keep_room,
    private_directory,
    storage_call,
)
from router_service.backends.edge import unwritten
from router_service.backends.edge.engine import ShardCounts
from router_service.backends.edge.files import CollectionFiles, Pointer
from router_service.backends.edge.generation import Generation, Resources
from router_service.backends.edge.key_files import SoughtKeys, read_keys
from router_service.backends.edge.ledger import Damage
from router_service.backends.edge.optimizer import MOST_OUTDATED, Optimizer
from router_service.backends.edge.processes import ShardOpener
from router_service.backends.edge.served import FifoLock, ServedGeneration
from router_service.errors import CorruptMemory, DeadlineTooShort, EngineStopped, StorageError

# Where a search is cut, the only place on this side of the wire: an engine call holds the engine (and in this process
# the GIL), so other lookups get in between, and what has expired is dropped there. With 128, one token waits 40 ms
# beside a long request, with 64 half of that, and 512 tokens take 2 % longer (benchmarks/README.md).
QUERIES_PER_CALL = 64
# Numbers of keys that one engine call compares when it looks at every entry: some 30 ms.
_NUMBERS_PER_SCAN = 1 << 27
# Of a layer that is scanned whether it has an index or not (512 x 2,048): as fast as the graph.
_NUMBERS_OF_SMALL = 1 << 20
# An update of so many floats keeps the engine for 7 to 10 ms. Few large ones and long rests (see pacing) delay fewer
# lookups than many small ones: at 2,048 floats per key p99 is 7.4 ms rather than 9.5.
_FLOATS_PER_UPDATE = 131_072
_IDS_PER_DELETE = 128
# A look at the keys of so many floats keeps the engine for 16 ms.
_FLOATS_PER_AUDIT = 1 << 18
_ENTRIES_PER_PAGE = 2048
# Reading so many floats of keys keeps the engine for 6 ms.
_FLOATS_PER_READ = 1 << 17
# The rest of so many entries: 2 ms.
_REST_PER_READ = 256
# Opening a shard of that size takes 10 ms, of 160 MB 250 ms, and keeps every thread of its process waiting.
ISOLATE_ABOVE_BYTES = 8 << 20
# Longest wait of those who only want to know how many entries there are.
_INFO_S = 1.0


class EdgeCollection(Collection, FileCollection, Maintained, Verifiable):
    """Open from the start until close(). Ties in distance come in the engine's order."""

    def __init__(self, files: CollectionFiles, pointer: Pointer, resources: Resources) -> None:
        """Opens the collection. Raises CorruptMemory when its entries are not those of the last close()."""
        self.pacing, self._pacing_of_all = Pacing(), resources.pacing
        self._spec = pointer.spec
        self._free_space = resources.free_space
        self._served = ServedGeneration(Generation.open(files, pointer, resources), resources)
        self._optimizer = Optimizer(self._served, resources)
        self._worked_s = 0.0  # by the last write
        # Around each engine call that writes, and around a whole lookup that writes came between: before the engine's.
        self._steps = FifoLock()
        self._counts = ShardCounts(0, 0, 0)  # when the engine was last asked

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._served.closed

    @property
    def versions(self) -> Versions:
        """Of the memory that the collection belongs to."""
        return self._served.versions

    @versions.setter
    def versions(self, of_memory: Versions) -> None:
        self._served.versions = of_memory

    @property
    @override
    def changed_entries(self) -> int:
        return self._served.now.changed

    @property
    @override
    def changed_bytes(self) -> int:
        return self.changed_entries * self._spec.dimension * 4

    @property
    @override
    def outdated_share(self) -> float:
        return self._served.now.outdated_share

    @override
    def search(
        self, queries: F32, k: int, options: SearchOptions, exclude: Sequence[ExampleRef] = ()
    ) -> Neighbours:
        entries = len(self._served.now.table)
        small = numbers_of_scan(entries, self._spec.dimension) <= _NUMBERS_OF_SMALL
        if small or self.outdated_share > MOST_OUTDATED:
            options = replace(options, exact=True)
        stored = as_stored(queries, self._spec.metric, "queries")
        excluded = per_query(exclude, len(queries))
        step = self._queries_per_call(looks_at_all=options.exact or bool(exclude))
        found = self._search_parts(stored, k, options, excluded, step)
        while found is None:
            with self._steps.held(options.wait_s):
                found = self._search_parts(stored, k, options, excluded, step)
        return found

    def _search_parts(
        self,
        stored: F32,
        k: int,
        options: SearchOptions,
        excluded: Sequence[ExampleRef | None],
        step: int,
    ) -> Neighbours | None:
        """An engine call for every `step` queries; None when entries changed between two of them."""
        part, changes = self._search_part(stored[:step], k, options, excluded[:step])
        if len(stored) <= step and part.ids.shape[1] == k:
            return part
        version = part.version
        found = Neighbours.empty(len(stored), k, self._spec.value_width)
        for start in range(0, len(stored), step):
            rows = np.s_[start : start + step]
            if start:
                part, seen = self._search_part(stored[rows], k, options, excluded[rows])
                if changes != seen:
                    return None
            width = part.ids.shape[1]
            found.ids[rows, :width] = part.ids
            found.distances[rows, :width] = part.distances
            found.values[rows, :width] = part.values
        return replace(found, version=version)

    def _queries_per_call(self, *, looks_at_all: bool) -> int:
        if not looks_at_all:
            return QUERIES_PER_CALL
        numbers = max(1, len(self._served.now.table)) * self._spec.dimension
        return max(1, min(QUERIES_PER_CALL, _NUMBERS_PER_SCAN // numbers))

    def _search_part(
        self, stored: F32, k: int, options: SearchOptions, excluded: Sequence[ExampleRef | None]
    ) -> tuple[Neighbours, int]:
        """One engine call for its queries; as many columns as there are entries, at most k. And how often they changed.

        What writes changes both within an engine call of its own: here they are those of the entries.
        """
        self.pacing.searched()
        self._pacing_of_all.searched()
        with self._served.engine_call(options.wait_s) as generation:
            options.require_time()  # here, for waiting for one's turn takes time too
            table = generation.table
            version, changes = self.versions.now, self._served.changes
            limit = min(k, len(table))
            if not limit:
                nothing = Neighbours.empty(len(stored), 0, self._spec.value_width)
                return replace(nothing, version=version), changes
            ids, scores = generation.shard.search(stored, limit, options, excluded)
        return Neighbours(ids, self._distances(scores), table.gather(ids), version), changes

    def _distances(self, scores: F32) -> F32:
        """The engine's scores, d or cosine, as distances: d squared, or 1 - cosine."""
        wide = scores.astype(np.float64)
        if self._spec.metric is Metric.EUCLID:
            with np.errstate(over="ignore"):  # too far for f32 is inf
                return (wide * wide).astype(np.float32)
        return np.where(np.isinf(wide), np.inf, np.clip(1.0 - wide, 0.0, 2.0)).astype(np.float32)

    @override
    def upsert(self, entries: Entries, *, fsync: bool = False) -> None:
        """Each engine update is written whole or not at all."""
        stored = replace(entries, keys=as_stored(entries.keys, self._spec.metric, "keys"))
        step = min(max(_FLOATS_PER_UPDATE // self._spec.dimension, 8), 512)
        until = self.pacing.patience()
        self.pacing.wait_while(lambda: self._optimizer.automatic, until)
        digests = digests_of(stored)
        with self._served.writing:
            self._served.before_write()
            self._free_space.require()
            with self._served.now.writing(stored.ids, digests):
                for start in range(0, len(stored), step):
                    rows = slice(start, start + step)
                    self._upsert_part(stored.slice(start, start + step), digests[rows])
                    self.pacing.rest(self._worked_s, until)
        if fsync:
            self.flush()

    def _upsert_part(self, entries: Entries, digests: U64) -> None:
        before = self._served.now.table
        after = before.with_rows(entries.ids, entries.values, digests)
        with self._changing(entries.ids) as generation:
            self._served.written().upsert(entries, generation.pointer.generation)
            if generation.table is not before:  # the shard's process was started again
                after = generation.table.with_rows(entries.ids, entries.values, digests)
            generation.table = after

    @override
    def delete(self, ids: U64, *, fsync: bool = False) -> int:
        until = self.pacing.patience()
        with self._served.writing:
            self._served.before_write()
            present = np.unique(ids[self._served.now.table.holds(ids)])
            if len(present):
                if self._free_space.is_short():
                    keep_room(self._served.now.files.shard(self._served.now.pointer.generation))
                with self._served.now.writing(present, None):
                    for start in range(0, len(present), _IDS_PER_DELETE):
                        self._delete_part(present[start : start + _IDS_PER_DELETE])
                        self.pacing.rest(self._worked_s, until)
        if fsync:
            self.flush()
        return len(present)

    def _delete_part(self, ids: U64) -> None:
        with self._changing(ids) as generation:
            generation.shard.delete(ids)
            generation.table = generation.table.without(ids)

    @contextmanager
    def _changing(self, ids: U64) -> Iterator[Generation]:
        """The generation, for one engine call that changes the entries of `ids`."""
        with self._steps, self._served.engine_call() as generation:
            started = time.monotonic()
            try:
                with generation.changing(ids):
                    yield generation
            finally:
                self._served.changed()
                self._optimizer.note(ids)
                self._worked_s = time.monotonic() - started

    @override
    def scroll(self, after: int | None, limit: int, *, with_keys: bool = True) -> Entries:
        dimension = self._spec.dimension if with_keys else 0
        pages: list[Entries] = []
        self._served.require_use()
        most = max(16, _FLOATS_PER_READ // self._spec.dimension) if with_keys else _ENTRIES_PER_PAGE
        left = min(limit, len(self._served.now.table))
        while left > 0:
            size = min(left, most, _ENTRIES_PER_PAGE)
            with self._served.engine_call() as generation:
                page = generation.shard.scroll(after, size, keys=with_keys)
            pages.append(page)
            left -= size
            if len(page) < size:
                break
            after = int(page.ids[-1])
        return Entries.concat(pages, dimension, self._spec.value_width)

    @override
    def provenance(self, ids: U64) -> dict[int, Provenance]:
        with self._served.engine_call() as generation:
            found = generation.shard.retrieve(ids)
        return dict(zip(found.ids.tolist(), found.provenance, strict=True))

    @override
    def all_entries(self, page_entries: int) -> Iterator[tuple[Entries, U64]]:
        """Keys from the engine's files; only those that are not found there are asked of the engine."""
        with self._served.engine_call() as generation:
            table, number = generation.table, generation.pointer.generation
        sought = SoughtKeys(table.ids, table.digests[:, OF_KEY])
        shard = self._served.files.shard(number)
        for keys in read_keys(shard, self._spec.dimension, page_entries):
            digests = key_digests(keys)
            ids, rows = sought.take(digests)
            for start in range(0, len(ids), page_entries):
                page = np.s_[start : start + page_entries]
                yield self._with_rest(ids[page], keys[rows[page]], digests[rows[page]])
        left = sought.left
        for start in range(0, len(left), page_entries):
            found = self.entries(left[start : start + page_entries])
            yield found, combined_digests(digests_of(found))

    def _with_rest(self, ids: U64, keys: F32, of_keys: U64) -> tuple[Entries, U64]:
        """Entries of these ids [n], keys [n, d] and digests [n] of the keys, without those that are gone."""
        parts: list[Entries] = []
        for start in range(0, len(ids), _REST_PER_READ):
            with self._served.engine_call() as generation:
                parts.append(generation.shard.retrieve(ids[start : start + _REST_PER_READ]))
        rest = Entries.concat(parts, 0, self._spec.value_width)
        order = np.argsort(ids)
        rows, _ = rows_of(ids[order], rest.ids)
        rows = order[rows]
        digests = np.stack([of_keys[rows], rest_digests(rest)], axis=1)
        return replace(rest, keys=keys[rows]), combined_digests(digests)

    @override
    def entries(self, ids: U64) -> Entries:
        found: list[Entries] = []
        step = max(16, _FLOATS_PER_READ // self._spec.dimension)
        for start in range(0, len(ids), step):
            with self._served.engine_call() as generation:
                part = generation.shard.retrieve(ids[start : start + step], keys=True)
            found.append(part.take(np.argsort(part.ids)))
        return Entries.concat(found, self._spec.dimension, self._spec.value_width)

    @override
    def digests(self, after: int | None, limit: int) -> tuple[U64, U64]:
        """From RAM."""
        with self._served.engine_call() as generation:  # of an engine that is there
            table = generation.table
        return table.digests_above(after, limit)

    @override
    def info(self) -> CollectionInfo:
        """Of an engine that does not answer soon: what it last said, and the entries there are."""
        if (damage := self._served.now.damage) is not None:
            now = self._served.now
            size = disk_bytes(self._served.files.generation(now.pointer.generation))
            return CollectionInfo(
                len(now.table), 0, now.pointer.compression, size, damage=str(damage)
            )
        options = SearchOptions(deadline=time.monotonic() + _INFO_S)
        try:
            with self._served.engine_call(options.wait_s) as generation:
                pointer = generation.pointer
                self._counts = generation.shard.counts(pointer.generation)
            counts = self._counts
        except (DeadlineTooShort, EngineStopped):
            pointer, entries = self._served.now.pointer, len(self._served.now.table)
            counts = replace(self._counts, entries=entries)
        indexed = min(counts.graph_vectors, counts.entries - counts.tail)
        size = disk_bytes(self._served.files.generation(pointer.generation))
        return CollectionInfo(
            counts.entries, indexed, pointer.compression, size, segments=counts.segments
        )

    @override
    def optimize(
        self, compression: Compression | None = None, report: Report = say_nothing
    ) -> None:
        """Ends an auto_optimize()."""
        self._served.require_use()
        self._optimizer.optimize(compression, report)

    @override
    def auto_optimize(self, report: Report = say_nothing) -> bool:
        return self._optimizer.auto_optimize(report)

    @override
    @contextmanager
    def paused_for_copy(self) -> Iterator[FrozenFiles]:
        def complete(copy: Path) -> None:
            copied = CollectionFiles(copy.parent, copy.name)
            with storage_call(f"write {copied.values(number)}"):
                # Of a layer without entries nothing was copied
                copied.generation(number).mkdir(exist_ok=True)
            table.save(copied.values(number))
            for path in (copied.base(number), copied.log(number)):  # it is not open
                path.unlink(missing_ok=True)

        files = self._served.files
        with self._served.frozen():
            with self._served.engine_call() as generation:
                number, table = generation.pointer.generation, generation.table
                generation.require_all(generation.shard.counts(number))
            names = ("CURRENT", files.generation(number).name)
            yield FrozenFiles(files.directory, names, len(table), complete)

    @override
    def verify(self) -> None:
        self._served.require_use()
        ids, step = self._served.now.table.ids, max(16, _FLOATS_PER_AUDIT // self._spec.dimension)
        damage = Damage.none()
        for start in range(0, len(ids), step):
            with self._served.engine_call() as generation:
                damage += generation.compare(ids[start : start + step])
        with self._served.writing, self._served.engine_call() as generation:
            if problem := "; ".join(filter(None, [str(damage), *generation.other_problems()])):
                raise generation.set_apart(problem)

    @override
    def flush(self) -> None:
        """Returns at once while the files are copied, for they were flushed before."""
        self._served.flush()

    @override
    def close(self) -> None:
        self._served.refuse_calls()
        self._optimizer.stop()
        self._served.close()


class EdgeBackend(Backend, Hosting, Hurried):
    """Safe to call from several threads."""

    def __init__(
        self,
        data_dir: Path,
        *,
        min_free_bytes: int | None = None,
        isolate_above_bytes: int = ISOLATE_ABOVE_BYTES,
        workers: int = 64,
    ) -> None:
        """Takes the directory, making it when it is not there, and from other users. Raises DirectoryInUse.

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
            private_directory(data_dir)
            self._directory_lock = DirectoryLock(data_dir)

    @override
    def create(
        self, name: str, spec: CollectionSpec, compression: Compression | None = None
    ) -> EdgeCollection:
        """`compression`: what optimize() builds; not one apart, whose search keys are there from the beginning."""
        files = self._files(name)
        with self._lock:
            if files.exists():
                raise StorageError(f"{files.directory} already holds a collection")
            pointer = Pointer(0, spec, compression or Compression())
            self._create_files(files, pointer)
            return self._opened(name, files, pointer)

    def _create_files(self, files: CollectionFiles, pointer: Pointer) -> None:
        """After a crash they are all there, or count as leftovers."""
        self._resources.free_space.require()
        files.remove_leftovers(None)
        unwritten.create(files, pointer)
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
    def hurry(self) -> None:
        self._resources.shards.hurry()

    @override
    def engines(self) -> Engines:
        return self._resources.shards.engines()

    @override
    def close(self) -> None:
        with self._lock, ExitStack() as every_one:  # even when one fails
            every_one.callback(self._directory_lock.release)
            every_one.callback(self._resources.shards.close)
            for collection in self._open.values():
                every_one.callback(collection.close)

    def _files(self, name: str) -> CollectionFiles:
        require_name(name)
        return CollectionFiles(self._data_dir, name)

    def _opened(self, name: str, files: CollectionFiles, pointer: Pointer) -> EdgeCollection:
        self._open[name] = EdgeCollection(files, pointer, self._resources)
        return self._open[name]

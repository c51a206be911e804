"""The generation of its files that a collection serves: open, its value rows in RAM, and the locks around it."""

from __future__ import annotations

import logging
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router_service.arrays import F32, NO_ID, U64, Bool, Entries
from router_service.backends.base import CollectionSpec, Versions
from router_service.backends.disk import FreeSpace, fsync_tree, remove_durably, write_atomically
from router_service.backends.edge.engine import ShardCounts
from router_service.backends.edge.files import CollectionFiles, Pointer
from router_service.backends.edge.processes import HostedShard, Shard, ShardOpener
from router_service.backends.edge.unwritten import UnwrittenShard, is_unwritten
from router_service.errors import CollectionClosed, CorruptMemory, EngineStopped, StorageError

log = logging.getLogger(__name__)

_REVIVE_EVERY_S = 1.0
_ENTRIES_PER_PAGE = 2048
_SMALLEST_CAPACITY = 1024


@dataclass(slots=True)
class _Rows:
    """Rows [0, used) of `array` [capacity, W] are written and never change."""

    array: F32
    used: int


class ValueTable:
    """id -> value row [W] of n entries, so that a search never parses a payload.

    A table is a snapshot: adding rows makes a new table and leaves the old one as it was, so readers need no lock. All
    tables of one history share one growing array; a table sees only the rows that its own index names.
    """

    def __init__(self, ids: U64, values: F32) -> None:
        """`ids` [n] ascending and unique, `values` [n, W]; both are kept, not copied."""
        self._ids: U64 = ids
        self._row_of: NDArray[np.intp] = np.arange(len(ids))
        self._rows = _Rows(values, len(ids))

    def __len__(self) -> int:
        return len(self._ids)

    def gather(self, ids: U64) -> F32:
        """Value rows [..., W] of ids [...]; 0 where an id is NO_ID. Raises CorruptMemory on an unknown id."""
        if not len(self):
            position = np.zeros(ids.shape, np.intp)
            known = np.zeros(ids.shape, np.bool_)
            values = np.zeros((*ids.shape, self._rows.array.shape[1]), np.float32)
        else:
            position = np.minimum(np.searchsorted(self._ids, ids), len(self) - 1)
            known = self._ids[position] == ids
            values = self._rows.array[self._row_of[position]]
            values[~known] = 0.0
        if not np.array_equal(known, ids != NO_ID):
            raise CorruptMemory(f"the engine found entries without a value row: {ids[~known][:3]}")
        return values

    def with_rows(self, ids: U64, values: F32) -> ValueTable:
        """A table that also has `values` [m, W] under `ids` [m]; of repeated ids the last counts."""
        added, last = np.unique(ids[::-1], return_index=True)
        rows, first = self._append(values)
        row_of = first + len(ids) - 1 - last
        position = np.searchsorted(self._ids, added)
        known = np.zeros(len(added), np.bool_)
        inside = position < len(self)
        known[inside] = self._ids[position[inside]] == added[inside]
        table = ValueTable.__new__(ValueTable)
        table._rows = rows
        table._ids = np.insert(self._ids, position[~known], added[~known])
        base = self._row_of if rows is self._rows else np.arange(len(self))
        replaced = base.copy()
        replaced[position[known]] = row_of[known]
        table._row_of = np.insert(replaced, position[~known], row_of[~known])
        return table

    def without(self, ids: U64) -> ValueTable:
        """A table that lacks the entries of these ids; those it does not have count for nothing."""
        kept = ~np.isin(self._ids, ids)
        table = ValueTable.__new__(ValueTable)
        table._rows, table._ids, table._row_of = self._rows, self._ids[kept], self._row_of[kept]
        return table

    def holds(self, ids: U64) -> Bool:
        """Which of these ids [n] are in the table."""
        return np.isin(ids, self._ids)

    def _append(self, values: F32) -> tuple[_Rows, int]:
        """The array that holds `values` after this table's rows, and where they start."""
        rows = self._rows
        if rows.used + len(values) > len(rows.array):
            rows = self._compacted(len(self) + len(values))
        first = rows.used
        rows.array[first : first + len(values)] = values
        rows.used += len(values)
        return rows, first

    def _compacted(self, needed: int) -> _Rows:
        """A copy of the rows in use, in the order of ids, with room to grow."""
        capacity = max(_SMALLEST_CAPACITY, 2 * needed)
        array = np.empty((capacity, self._rows.array.shape[1]), np.float32)
        array[: len(self)] = self._rows.array[self._row_of]
        return _Rows(array, len(self))

    def save(self, path: Path) -> None:
        """Writes the table to `path` at once and durably. Raises StorageError."""
        values = self._rows.array[self._row_of]
        write_atomically(path, lambda file: np.savez(file, ids=self._ids, values=values))

    @staticmethod
    def load(path: Path, value_width: int) -> ValueTable | None:
        """The table saved at `path`, or None when there is no intact one: it can be rebuilt from the engine."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
                ids, values = saved["ids"], saved["values"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        if ids.dtype != np.uint64 or values.dtype != np.float32:
            return None
        if ids.ndim != 1 or values.shape != (len(ids), value_width):
            return None
        return ValueTable(ids, values)


@dataclass(frozen=True, slots=True)
class Resources:
    """What the collections of a backend share."""

    free_space: FreeSpace
    shards: ShardOpener


class Generation:
    """An open generation: its files, the engine's shard, and in RAM the value row of each entry.

    Not thread-safe: whatever touches the shard is an engine call, see ServedGeneration.
    """

    def __init__(
        self,
        files: CollectionFiles,
        pointer: Pointer,
        shard: Shard | UnwrittenShard,
        table: ValueTable,
        counts: ShardCounts,
    ) -> None:
        self.files, self.pointer, self.shard, self.table = files, pointer, shard, table
        self.changed, self._in_graphs = counts.tail, counts.graph_vectors
        self._outdated = max(0, counts.graph_vectors - (counts.entries - counts.tail))
        self._saved = False  # whether the file of value rows is there: only while it has all
        self._flushed: ValueTable | None = None
        self._revived = -_REVIVE_EVERY_S

    @staticmethod
    def open(files: CollectionFiles, pointer: Pointer, resources: Resources) -> Generation:
        """Raises CorruptMemory when its entries are not those of the last close()."""
        shard: Shard | UnwrittenShard
        if is_unwritten(files, pointer):
            shard = UnwrittenShard(files.shard(pointer.generation), pointer.spec)
        else:
            shard = resources.shards.open(files, pointer)
        try:
            counts = shard.counts(pointer.generation)
            saved = ValueTable.load(files.values(pointer.generation), pointer.spec.value_width)
            table = _read_table(shard, pointer.spec) if saved is None else saved
            made = Generation(files, pointer, shard, table, counts)
            made.require_all(counts)
            made._saved = saved is not None
        except BaseException:
            shard.close()
            raise
        return made

    @property
    def flushed(self) -> bool:
        """Whether nothing was written since the last flush(): each write makes another table."""
        return self._flushed is self.table

    @property
    def outdated_share(self) -> float:
        """Share of the graphs' entries that were replaced or deleted since they were built."""
        return self._outdated / max(self._in_graphs, 1)

    def require_all(self, counts: ShardCounts) -> None:
        """A damaged write-ahead log shows only as missing entries. Raises CorruptMemory."""
        if counts.entries != len(self.table):
            values = self.files.values(self.pointer.generation)
            raise CorruptMemory(
                f"{self.files.directory} has {counts.entries} entries, {len(self.table)} when it was closed; restore "
                f"the memory from a snapshot, or remove {values} to go on with what is left"
            )

    def written(self, resources: Resources) -> Shard:
        """The shard, to be written to. Raises StorageError."""
        if isinstance(self.shard, UnwrittenShard):
            self.shard.make()
            self.shard = resources.shards.open(self.files, self.pointer)
        return self.shard

    def before_writes(self) -> None:
        """The saved value rows go first: from here on they are not those of all entries."""
        if self._saved:
            remove_durably(self.files.values(self.pointer.generation))
            self._saved = False

    @contextmanager
    def changing(self, ids: U64) -> Iterator[None]:
        """Around an engine call that writes or deletes the entries of `ids`, and sets the table."""
        # Entries of the tail count here too when they are written again: too many, never too few.
        self._outdated += int(np.count_nonzero(self.table.holds(ids)))
        try:
            yield
        except BaseException:  # Ctrl-C too
            if self.shard.alive:  # else read when it is revived
                self.table = _read_table(self.shard, self.pointer.spec)  # some may be written
            raise
        finally:
            self.changed += len(ids)

    def revive(self, resources: Resources) -> None:
        """Opens the shard again whose process died. Raises EngineStopped when that was tried a moment ago."""
        if time.monotonic() < self._revived + _REVIVE_EVERY_S:
            raise EngineStopped(
                f"the engine process of {self.files.directory} ended; it is started again soon, retry"
            )
        self._revived = time.monotonic()
        self.shard.close()
        self.shard = resources.shards.open(self.files, self.pointer, len(self.table))
        self.table = _read_table(self.shard, self.pointer.spec)

    def flush(self) -> None:
        """Flushes unless nothing was written since: a flush takes 30 ms."""
        if not self.flushed:
            self.shard.flush()
            self._flushed = self.table

    def save_values(self) -> None:
        """Saves the value rows, so that the next open reads no payloads. Raises StorageError."""
        if not self._saved:
            self.table.save(self.files.values(self.pointer.generation))
            self._saved = True

    def close(self) -> None:
        """Flushes, saves the value rows and releases the files."""
        try:
            if self.shard.alive:
                self.shard.flush()
                with suppress(StorageError):  # the next open reads the engine instead
                    self.save_values()
            self.shard.close()
        except EngineStopped as error:  # every write is in the log, which the next open replays
            log.warning("%s", error)
        finally:
            self.shard.close()


def _read_table(shard: Shard | UnwrittenShard, spec: CollectionSpec) -> ValueTable:
    """The value rows as the engine has them; takes 20 us per entry."""
    pages: list[Entries] = []
    after = None
    while len(page := shard.scroll(after, _ENTRIES_PER_PAGE, keys=False, provenance=False)):
        pages.append(page)
        after = int(page.ids[-1])
    read = Entries.concat(pages, 0, spec.value_width)
    return ValueTable(read.ids, read.values)


class FifoLock:
    """Handed on in the order of asking: a loop of short writes cannot starve a search. Not reentrant.

    threading.Lock lets the thread that just released it take it again before those that wait.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._held = False

    def __enter__(self) -> None:
        self._take(None)

    def __exit__(self, *_: object) -> None:
        self._give()

    @contextmanager
    def held(self, wait_s: Callable[[], float] | None) -> Iterator[None]:
        """Like `with`, with a wait that what `wait_s` raises ends; it is called again after the seconds it returns."""
        self._take(wait_s)
        try:
            yield
        finally:
            self._give()

    def _take(self, wait_s: Callable[[], float] | None) -> None:
        with self._mutex:
            if not self._held:
                self._held = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            while not turn.acquire(timeout=-1 if wait_s is None else wait_s()):
                pass
        except BaseException:
            self._leave(turn)
            raise

    def _leave(self, turn: threading.Lock) -> None:
        with self._mutex:
            if turn in self._waiting:
                self._waiting.remove(turn)
                return
        self._give()  # it was its turn already

    def _give(self) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()  # who waited longest holds it now
            else:
                self._held = False


class ServedGeneration:
    """The generation that a collection serves now, and the locks that all who use it take. Open until close()."""

    def __init__(self, generation: Generation, resources: Resources) -> None:
        self.now = generation  # changed under all three locks
        self.files = generation.files
        self.versions = Versions()
        self.changes = 0  # of the entries; this collection's own, where a version is the memory's
        self._resources = resources
        # The order of locks, outermost first; who needs only a later one takes only that.
        # 1. One optimize at a time; close() waits for it.
        self.optimizing = threading.Lock()
        # 2. One writer at a time. Held while files are copied and generations are swapped too: then writes wait.
        self.writing = threading.Lock()
        # 3. One engine call at a time. The only one that searches take; never held over a copy or a build.
        self._engine = FifoLock()
        self._frozen = False
        self._closing = False  # engine_call() raises CollectionClosed
        self.closed = False  # whether close() was called

    @contextmanager
    def engine_call(self, wait_s: Callable[[], float] | None = None) -> Iterator[Generation]:
        """The generation, for one call of its shard, which is opened again when its process has died.

        `wait_s`: of a caller who may leave, see SearchOptions; only for calls that change nothing.
        Raises CollectionClosed, and what `wait_s` raises.
        """
        with self._engine.held(wait_s):
            if self._closing:
                raise CollectionClosed(self.files.directory)
            if not self.now.shard.alive:
                self.now.revive(self._resources)
                self.changed()
            if wait_s is not None and isinstance(shard := self.now.shard, HostedShard):
                with shard.waiting(wait_s):
                    yield self.now
            else:
                yield self.now

    def changed(self) -> None:
        """Inside engine_call(): the entries are, or may be, others than before."""
        self.changes += 1
        self.versions.advance()

    def written(self) -> Shard:
        """Inside engine_call(): the shard, to be written to. Raises StorageError."""
        return self.now.written(self._resources)

    def flush(self) -> None:
        """Makes every write durable. Returns at once while the files are frozen, for they were flushed before."""
        if not self.now.flushed and not self._frozen:
            # Beside the engine, so that little is left for its own flush, during which no search is answered.
            with suppress(OSError):  # a file that is being replaced
                fsync_tree(self.files.shard(self.now.pointer.generation) / "segments")
        with self.engine_call() as generation:
            if not self._frozen:
                generation.flush()

    @contextmanager
    def frozen(self) -> Iterator[Generation]:
        """Inside, the files on disk are complete and nobody changes them; searches go on."""
        self.flush()  # so that little is left to do while writes wait
        with self.writing:
            try:
                with self.engine_call() as generation:
                    generation.flush()
                    self._frozen = True
                yield generation
            finally:
                self._frozen = False

    def swap(self, successor: Generation) -> Generation:
        """Serves `successor`, of the same entries, from the next engine call on; returns what served until now.

        For who holds `optimizing` and `writing`.
        """
        with self._engine:
            replaced, self.now = self.now, successor
        return replaced

    def refuse_calls(self) -> None:
        """From here on engine_call() raises CollectionClosed: what goes on ends soon, and close() waits for it."""
        self._closing = True

    def close(self) -> None:
        """After refuse_calls(): flushes and releases the files. Closing twice is allowed."""
        with self.optimizing, self.writing, self._engine:
            if not self.closed:
                self.closed = True
                self.now.close()

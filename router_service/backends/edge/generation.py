"""A generation of a collection's files: opened, compared after an unclean stop, with its value rows in RAM."""

from __future__ import annotations

import logging
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_service.arrays import (
    F32,
    NO_ID,
    OF_KEY,
    U64,
    Bool,
    Entries,
    combined_digests,
    rows_of,
)
from router_service.backends.base import CollectionSpec, Pacing, numbers_of_scan
from router_service.backends.disk import (
    FreeSpace,
    fsync_directory,
    remove_durably,
    storage_call,
    write_atomically,
)
from router_service.backends.edge.engine import Audit, ShardCounts
from router_service.backends.edge.files import CollectionFiles, Pointer
from router_service.backends.edge.ledger import (
    UNREADABLE,
    Damage,
    Known,
    Sums,
    Write,
    WriteLog,
    impossible_lengths,
    read_log,
)
from router_service.backends.edge.processes import Shard, ShardOpener
from router_service.backends.edge.unwritten import UnwrittenShard, is_unwritten
from router_service.errors import (
    CorruptMemory,
    DirectoryInUse,
    DiskFull,
    EngineStopped,
    OutOfDescriptors,
    StorageError,
)

log = logging.getLogger(__name__)

_REVIVE_EVERY_S = 1.0
_ENTRIES_PER_PAGE = 2048
# Of a log of writes, which an open reads: some 0.3 s.
_LONG_LOG_BYTES = 16 << 20
_LOG_BYTES_PER_ENTRY = 128
_SMALLEST_CAPACITY = 1024
# A layer of 4,096 entries (of 512 numbers or fewer; 1,024 of 2,048) answers one token as fast without an index, and 512
# tokens in 1.1 to 1.8 times the time, exactly; with four times as many in 3 to 4 times (docs/recall.md).
_NUMBERS_WITHOUT_INDEX = 1 << 21


@dataclass(slots=True)
class _Rows:
    """Rows [0, used) of `array` [capacity, W] and `digests` [capacity, 2] are written and never change."""

    array: F32
    digests: U64
    used: int


class ValueTable:
    """id -> value row [W] and digests [2] of n entries, so that a search never parses a payload; see ledger.

    A table is a snapshot: adding rows makes a new table and leaves the old one as it was, so readers need no lock. All
    tables of one history share one growing array; a table sees only the rows that its own index names.
    """

    def __init__(self, ids: U64, values: F32, digests: U64 | None = None) -> None:
        """`ids` [n] ascending and unique, `values` [n, W], `digests` [n, 2]; all are kept, not copied."""
        self._ids: U64 = ids
        self._row_of: NDArray[np.intp] = np.arange(len(ids))
        self._rows = _Rows(values, _unknown(len(ids)) if digests is None else digests, len(ids))

    def __len__(self) -> int:
        return len(self._ids)

    def gather(self, ids: U64) -> F32:
        """Value rows [..., W] of ids [...]; 0 where an id is NO_ID. Raises CorruptMemory on an unknown id."""
        if not len(self):
            known = np.zeros(ids.shape, np.bool_)
            values = np.zeros((*ids.shape, self._rows.array.shape[1]), np.float32)
        else:
            position = np.searchsorted(self._ids, ids)
            known = self._ids.take(position, mode="clip") == ids
            values = self._rows.array.take(self._row_of.take(position, mode="clip"), axis=0)
        if not known.all():
            values[~known] = 0.0
            if (strange := ids[~known & (ids != NO_ID)]).size:
                raise CorruptMemory(f"the engine found entries without a value row: {strange[:3]}")
        return values

    @property
    def ids(self) -> U64:
        """Ids [n], ascending."""
        return self._ids

    @property
    def digests(self) -> U64:
        """Digests [n, 2] in the order of ids."""
        return self._rows.digests[self._row_of]

    def with_rows(self, ids: U64, values: F32, digests: U64 | None = None) -> ValueTable:
        """A table that also has `values` [m, W], `digests` [m, 2] under `ids` [m]; of repeated ids the last counts."""
        added, last = np.unique(ids[::-1], return_index=True)
        rows, first = self._append(values, _unknown(len(ids)) if digests is None else digests)
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

    def digests_of(self, ids: U64) -> U64:
        """Digests [m, 2] of these ids [m]; 0 where one is not in the table."""
        rows, known = rows_of(self._ids, ids)
        found = _unknown(len(ids))
        found[known] = self._rows.digests[self._row_of[rows[known]]]
        return found

    def digests_above(self, after: int | None, limit: int) -> tuple[U64, U64]:
        """The next ids [n] above an id, at most `limit`, and the digests of their entries [n], both in one."""
        start = 0 if after is None else int(np.searchsorted(self._ids, np.uint64(after), "right"))
        rows = np.s_[start : start + limit]
        return self._ids[rows], combined_digests(self._rows.digests[self._row_of[rows]])

    @staticmethod
    def empty(spec: CollectionSpec) -> ValueTable:
        """Of no entries."""
        return ValueTable(np.empty(0, np.uint64), np.empty((0, spec.value_width), np.float32))

    def holds(self, ids: U64) -> Bool:
        """Which of these ids [n] are in the table."""
        return np.isin(ids, self._ids)

    def _append(self, values: F32, digests: U64) -> tuple[_Rows, int]:
        """The array that holds `values` after this table's rows, and where they start."""
        rows = self._rows
        if rows.used + len(values) > len(rows.array):
            rows = self._compacted(len(self) + len(values))
        first = rows.used
        rows.array[first : first + len(values)] = values
        rows.digests[first : first + len(values)] = digests
        rows.used += len(values)
        return rows, first

    def _compacted(self, needed: int) -> _Rows:
        """A copy of the rows in use, in the order of ids, with room to grow."""
        capacity = max(_SMALLEST_CAPACITY, 2 * needed)
        array = np.empty((capacity, self._rows.array.shape[1]), np.float32)
        array[: len(self)] = self._rows.array[self._row_of]
        digests = np.empty((capacity, 2), np.uint64)
        digests[: len(self)] = self.digests
        return _Rows(array, digests, len(self))

    def save(self, path: Path) -> None:
        """Writes the table to `path` at once and durably. Raises StorageError."""
        values = self._rows.array[self._row_of]
        arrays: dict[str, Any] = {"ids": self._ids, "values": values, "digests": self.digests}
        write_atomically(path, lambda file: np.savez(file, **arrays))

    @staticmethod
    def load(path: Path, value_width: int) -> ValueTable | None:
        """The table saved at `path`, or None when there is no intact one: it can be rebuilt from the engine."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
                ids, values = saved["ids"], saved["values"]
                digests = saved.get("digests")  # not in 0.1.0
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        if ids.dtype != np.uint64 or values.dtype != np.float32:
            return None
        if ids.ndim != 1 or values.shape != (len(ids), value_width):
            return None
        if digests is not None and (digests.dtype, digests.shape) != (np.uint64, (len(ids), 2)):
            return None
        return ValueTable(ids, values, digests)


def _unknown(entries: int) -> U64:
    return np.zeros((entries, 2), np.uint64)


@dataclass(frozen=True, slots=True)
class Resources:
    """What the collections of a backend share."""

    free_space: FreeSpace
    shards: ShardOpener
    pacing: Pacing = field(default_factory=Pacing)  # of all together


class Generation:
    """An open generation: its files, the engine's shard, and in RAM the value row and the digests of each entry.

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
        self.damage: CorruptMemory | None = None  # what every call raises then
        self._log: WriteLog | None = None
        self._begun: Write | None = None  # a write that may not have been made
        self._saved = False  # whether the file of value rows is there: only while it has all
        self._flushed: ValueTable | None = None
        self._revived = -_REVIVE_EVERY_S

    @staticmethod
    def open(files: CollectionFiles, pointer: Pointer, resources: Resources) -> Generation:
        """After an unclean stop what is not as it was written sets the collection apart, see `damage`.

        Raises CorruptMemory when its entries are not those of the last close().
        """
        if files.log(pointer.generation).exists():
            return _open_unclean(files, pointer, resources)
        shard = _opened(files, pointer, resources)
        try:
            counts = shard.counts(pointer.generation)
            saved = ValueTable.load(files.values(pointer.generation), pointer.spec.value_width)
            table = _read_table(shard, pointer.spec) if saved is None else saved
            made = Generation(files, pointer, shard, table, counts)
            made.require_all(counts)
            made._saved = saved is not None and bool(saved.digests.all())
            if not made._saved:
                made.table = _without_comparison(shard, pointer, table)
            if not isinstance(shard, UnwrittenShard):
                made.keep()
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

    @property
    def needs_no_index(self) -> bool:
        """Whether nothing has an index, or was replaced or deleted since, and a scan of all entries takes no longer."""
        entries = len(self.table)
        scan = numbers_of_scan(entries, self.pointer.spec.dimension)
        return not self._in_graphs and self.changed <= entries and scan <= _NUMBERS_WITHOUT_INDEX

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

    def set_apart(self, problem: str) -> CorruptMemory:
        """From here on nothing of the collection is answered, and its files stay as they are for the next start."""
        problem = problem.removesuffix("; restore the memory from a snapshot")
        self.damage = CorruptMemory(f"{self.files.directory} is set apart: {problem}; {_REMEDY}")
        log.error("%s", self.damage)
        return self.damage

    def keep(self) -> WriteLog:
        """Saves the table unless it is saved, and begins a log of what is written from here on. Raises StorageError."""
        # A new collection's has no entries: making one costs no file.
        if not self._saved and (
            len(self.table) or self.files.base(self.pointer.generation).exists()
        ):
            self._save()
        if self._log is not None:
            self._log.close()
        self._log = WriteLog(self.files.log(self.pointer.generation), len(self.table))
        return self._log

    def _save(self) -> None:
        self.table.save(self.files.values(self.pointer.generation))
        self._saved = True

    @property
    def log_is_long(self) -> bool:
        """Whether the log of writes has become much larger than a new table would be."""
        most = max(_LONG_LOG_BYTES, _LOG_BYTES_PER_ENTRY * len(self.table))
        return self._log is not None and self._log.size_bytes > most

    @contextmanager
    def writing(self, ids: U64, digests: U64 | None) -> Iterator[None]:
        """Around the engine calls of one write of entries with their digests [n, 2], or of a deletion."""
        log_of_writes = self._log or self.keep()  # which a shard without entries does not have
        number, before = self.pointer.generation, self.table
        if self._saved:  # the saved table goes first: from here on it is not that of all entries
            with storage_call(f"write {self.files.base(number)}"):
                self.files.values(number).rename(self.files.base(number))
                fsync_directory(self.files.generation(number))
            self._saved = False
        durable = digests is None or bool(before.holds(ids).any())
        log_of_writes.begin(ids, digests, durable=durable)
        self._begun = Write(ids, digests)
        yield
        log_of_writes.done()
        self._begun = None

    @contextmanager
    def changing(self, ids: U64) -> Iterator[None]:
        """Around an engine call that writes or deletes the entries of `ids`, and sets the table."""
        # Entries of the tail count here too when they are written again: too many, never too few.
        self._outdated += int(np.count_nonzero(self.table.holds(ids)))
        try:
            yield
        except BaseException:  # Ctrl-C too
            if self.shard.alive:  # else read when it is revived
                found = self.shard.audit(np.unique(ids), self.pointer.generation, keys=True)
                kept = self.table.without(ids)  # some may be written
                self.table = kept.with_rows(found.ids, found.values, found.digests)
            raise
        finally:
            self.changed += len(ids)

    def compare(self, ids: U64) -> Damage:
        """What is wrong with the entries of these ids, those that are there."""
        wanted = ids[self.table.holds(ids)]
        found = _audit(self.shard, self.pointer, wanted, keys=True)
        return Known(wanted, self.table.digests_of(wanted), {}).compare(found.ids, found.digests)[0]

    def other_problems(self) -> list[str]:
        """What is wrong beside entries that are known, while nobody writes. Raises StorageError."""
        unknown = np.setdiff1d(self.shard.ids(), self.table.ids, assume_unique=True)
        none: U64 = np.empty(0, np.uint64)
        found = [str(Damage(none, none, unknown))] if len(unknown) else []
        return [*found, *_file_problems(self.files, self.pointer), *self.shard.problems()]

    def revive(self, resources: Resources) -> None:
        """Opens the shard again whose process died. Raises EngineStopped when that was tried a moment ago."""
        if time.monotonic() < self._revived + _REVIVE_EVERY_S:
            raise EngineStopped(
                f"the engine process of {self.files.directory} ended; it is started again soon, retry"
            )
        self._revived = time.monotonic()
        self.shard.close()
        self.shard = resources.shards.open(self.files, self.pointer, len(self.table))
        resources.shards.note_restart()
        known = Known.of(self.table.ids, self.table.digests, self._begun)
        try:
            self.table, problem = _compared(self.shard, self.pointer, known, self.table)
        except BaseException:
            self.shard.close()  # nothing of it is served before it was compared
            raise
        if problem:
            raise self.set_apart(problem)
        self._begun = None

    def flush(self) -> None:
        """Flushes unless nothing was written since: a flush takes 30 ms."""
        if not self.flushed and self.damage is None:
            if self._log is not None:
                self._log.sync()
            self.shard.flush()
            if self._log is not None:
                self._log.flushed()
            self._flushed = self.table

    def close(self) -> None:
        """Flushes, saves the value rows and the sums of all files, and releases these.

        The files of what is set apart stay as they are, and so does what has come into the place of removed ones.
        """
        if self._log is not None and self._log.removed:
            log.info("%s is closed after its files were removed", self.files.directory)
            self.abandon()
            return
        closed = False
        try:
            if self.shard.alive and self.damage is None:
                self.shard.flush()
                with suppress(StorageError):  # then the next open compares instead
                    if not self._saved:
                        self._save()
                    closed = self._log is not None
            self.shard.close()
        except EngineStopped as error:
            # Every write is in the engine's log, which the next open replays
            log.warning("%s", error)
            closed = False
        finally:
            self.abandon()
        if closed:
            with suppress(StorageError, OSError):
                self._leave_closed()

    def _leave_closed(self) -> None:
        """The log goes last: that it is not there says that all else is."""
        number = self.pointer.generation
        sums = self.files.sums(number)
        Sums.of(self.files.shard(number), Sums.load(sums), everything=True).save(sums)
        self.files.base(number).unlink(missing_ok=True)
        remove_durably(self.files.log(number))

    def abandon(self) -> None:
        """Releases the files as they are."""
        if self._log is not None:
            self._log.close()
        self.shard.close()


_REMEDY = (
    "restore the memory from a snapshot: router-admin snapshot restore MEMORY SNAPSHOT --replace"
)


def _opened(
    files: CollectionFiles, pointer: Pointer, resources: Resources
) -> Shard | UnwrittenShard:
    """Raises StorageError."""
    if is_unwritten(files, pointer):
        return UnwrittenShard(files.shard(pointer.generation), pointer.spec)
    return resources.shards.open(files, pointer)


def _open_unclean(
    files: CollectionFiles, pointer: Pointer, resources: Resources, *, again: bool = True
) -> Generation:
    """Compares what is there with what was written, before any of it is served.

    `again`: once more when the engine's process ends meanwhile, for that need not be the files' fault.
    """
    started = time.monotonic()
    try:
        with ExitStack() as stack:
            table, known = _as_written(files, pointer)
            if problems := _file_problems(files, pointer):
                raise CorruptMemory("; ".join(problems))
            shard = _opened(files, pointer, resources)
            stack.callback(shard.close)
            if known is None:
                table = _without_comparison(shard, pointer, _read_table(shard, pointer.spec))
            else:
                table, problem = _compared(shard, pointer, known, table)
                if problem:
                    raise CorruptMemory(problem)
            if problems := shard.problems():
                raise CorruptMemory("; ".join(problems))
            made = Generation(files, pointer, shard, table, shard.counts(pointer.generation))
            made.flush()
            made.keep()
            stack.pop_all()
    except (DirectoryInUse, DiskFull, OutOfDescriptors):  # which say nothing of the files
        raise
    except StorageError as error:
        if again and isinstance(error, EngineStopped):
            log.warning("%s", error)
            return _open_unclean(files, pointer, resources, again=False)
        nothing = UnwrittenShard(files.shard(pointer.generation), pointer.spec)  # in its place
        empty = ValueTable.empty(pointer.spec)
        apart = Generation(files, pointer, nothing, empty, ShardCounts(0, 0, 0))
        apart.set_apart(str(error))
        return apart
    log.info(
        "%s: %d entries compared after an unclean stop, %.1f s",
        files.directory,
        len(table),
        time.monotonic() - started,
    )
    return made


def _as_written(files: CollectionFiles, pointer: Pointer) -> tuple[ValueTable, Known | None]:
    """The last saved table, and what the entries must be; None where nobody knows."""
    number, width = pointer.generation, pointer.spec.value_width
    if (saved := ValueTable.load(files.values(number), width)) is not None:
        return saved, Known(saved.ids, saved.digests, {})
    base = ValueTable.load(files.base(number), width)
    if base is None and (files.base(number).exists() or files.values(number).exists()):
        return ValueTable.empty(pointer.spec), None
    base = base or ValueTable.empty(pointer.spec)
    return base, read_log(files.log(number), base.ids, base.digests)


def _file_problems(files: CollectionFiles, pointer: Pointer) -> list[str]:
    """What is wrong with the files that never change. Raises StorageError."""
    number = pointer.generation
    shard, path = files.shard(number), files.sums(number)
    if (sums := Sums.load(path)) is None:
        if path.exists():
            log.warning("%s is damaged or another engine's: nothing to compare files with", path)
        Sums.of(shard).save(path)
        return impossible_lengths(shard)
    return [*sums.problems(shard, everything=False), *impossible_lengths(shard)]


def _compared(
    shard: Shard | UnwrittenShard, pointer: Pointer, known: Known, table: ValueTable
) -> tuple[ValueTable, str]:
    """The table of what the engine has, and what is wrong with it; `table` has the digests that are not read."""
    found = _audit(shard, pointer, shard.ids(), keys=False)
    damage, removed = known.compare(found.ids, found.digests)
    if damage:
        return table, str(damage)
    if len(removed):
        log.warning("removing %d entries whose write was not acknowledged as durable", len(removed))
        shard.delete(removed)
    kept = ~np.isin(found.ids, removed)
    digests = found.digests[kept]
    unread = digests[:, OF_KEY] == 0
    digests[unread, OF_KEY] = table.digests_of(found.ids[kept][unread])[:, OF_KEY]
    return ValueTable(found.ids[kept], found.values[kept], digests), ""


def _without_comparison(
    shard: Shard | UnwrittenShard, pointer: Pointer, table: ValueTable
) -> ValueTable:
    """The table with the digests that its entries have now: an earlier version, or a damaged file, left none."""
    if not len(table):
        return table
    found = _audit(shard, pointer, table.ids, keys=True)
    if len(found.ids) != len(table) or (found.digests == UNREADABLE).any():
        raise CorruptMemory(f"some of its entries cannot be read; {_REMEDY}")
    log.warning("%d entries get digests of what is there: none were kept before", len(table))
    return ValueTable(found.ids, found.values, found.digests)


def _audit(shard: Shard | UnwrittenShard, pointer: Pointer, ids: U64, *, keys: bool) -> Audit:
    """Of all entries of these ids, page by page."""
    starts = range(0, len(ids), _ENTRIES_PER_PAGE)
    pages = (ids[start : start + _ENTRIES_PER_PAGE] for start in starts)
    found = [_audit_page(shard, pointer, page, keys=keys) for page in pages]
    return Audit.concat([Audit.empty(pointer.spec), *found])


def _audit_page(shard: Shard | UnwrittenShard, pointer: Pointer, ids: U64, *, keys: bool) -> Audit:
    """Finds out which entries it is that cannot be read."""
    try:
        return shard.audit(ids, pointer.generation, keys=keys)
    except StorageError:
        if not shard.alive:
            raise
    if len(ids) == 1:
        unread = np.zeros((1, pointer.spec.value_width), np.float32)
        return Audit(ids, unread, np.full((1, 2), UNREADABLE))
    halves = np.array_split(ids, 2)
    return Audit.concat([_audit_page(shard, pointer, half, keys=keys) for half in halves])


def _read_table(shard: Shard | UnwrittenShard, spec: CollectionSpec) -> ValueTable:
    """The value rows as the engine has them; takes 20 us per entry."""
    pages: list[Entries] = []
    after = None
    while len(page := shard.scroll(after, _ENTRIES_PER_PAGE, keys=False, provenance=False)):
        pages.append(page)
        after = int(page.ids[-1])
    read = Entries.concat(pages, 0, spec.value_width)
    return ValueTable(read.ids, read.values)

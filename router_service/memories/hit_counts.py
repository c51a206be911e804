"""How often entries of a layer were retrieved: noted while routing, merged and written beside its files afterwards."""

from __future__ import annotations

import logging
import struct
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from router_service.arrays import F32, I64, U64, Bool, HitCounts
from router_service.backends.disk import remove_durably, write_atomically
from router_service.errors import StorageError

log = logging.getLogger(__name__)

# A neighbour counts when it is at least this similar.
MIN_SIMILARITY = 0.01
# Ids noted before a caller merges them itself rather than leave them to the flush: 4 MiB, and some milliseconds.
_MOST_PENDING = 1 << 19
# Clients whose last report is remembered.
_CLIENTS = 4096
# What NumPy and zipfile raise on files that they did not write.
_DAMAGE = (
    *(OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError, TypeError, SyntaxError),
    *(OverflowError, struct.error, zipfile.BadZipFile),
)


# By client the number of its last report; who reported last comes last.
Reports = OrderedDict[str, int]


@dataclass(frozen=True, slots=True)
class HitSummary:
    """All hits, and the entries that have any."""

    total: int
    entries: int


class HitCounter:
    """Hits of one layer's entries. Safe to call from several threads."""

    def __init__(self, path: Path | None = None) -> None:
        """Counts go to `path`, or with None nowhere."""
        self._path = path
        self._counts = HitCounts(np.empty(0, np.uint64), np.empty(0, np.int64))
        self._pending: list[U64] = []
        self._pending_ids = 0
        self._reports: Reports = OrderedDict()
        self._changed = False
        self._lock = threading.Lock()
        self._file_lock = threading.Lock()

    @classmethod
    def load(cls, path: Path | None) -> HitCounter:
        """Those that were saved; of a file that is not there or cannot be read, none."""
        counter = cls(path)
        try:
            if path is not None:
                # Layers on a server have no directory
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.exists():
                    counter._counts, counter._reports = _read(path)
        except _DAMAGE as error:
            log.warning("%s cannot be read (%s); counting hits from 0", path, error)
        return counter

    def note(self, ids: U64, similarities: F32, read: Bool) -> None:
        """Counts the neighbours [T, K] of the tokens [T] whose routing they changed, if they are near enough."""
        hits = ids[(similarities >= MIN_SIMILARITY) & read[:, None]]
        if not len(hits):
            return
        with self._lock:
            self._pending.append(hits)
            self._pending_ids += len(hits)
            if self._pending_ids > _MOST_PENDING:
                self._merge()

    def counts(self) -> HitCounts:
        """All that was noted so far."""
        with self._lock:
            return self._merge()

    def summary(self) -> HitSummary:
        """Totals of all that was noted so far."""
        counts = self.counts()
        return HitSummary(int(counts.hits.sum()), len(counts.ids))

    def has_report(self, client: str, number: int) -> bool:
        """Whether this report of a client, or a later one, was counted; by an earlier process of the service too."""
        with self._lock:
            return number <= self._reports.get(client, -1)

    def add_report(self, client: str, number: int, counts: HitCounts) -> None:
        """Counts what was counted elsewhere. Its number is saved with it: what is lost in a crash may come again."""
        with self._lock:
            self._counts = _sum(self._merge(), counts)
            self._note_reports({client: max(number, self._reports.get(client, -1))})

    def go_on_from(self, before: HitCounter) -> None:
        """Counts what another one has counted, which is not used any more."""
        counts = before.counts()
        with self._lock:
            self._counts = _sum(self._merge(), counts)
            self._note_reports(before._reports)

    def _note_reports(self, last: Mapping[str, int]) -> None:
        for client, number in last.items():
            self._reports[client] = number
            self._reports.move_to_end(client)
        while len(self._reports) > _CLIENTS:
            self._reports.popitem(last=False)
        self._changed = True

    def forget(self, ids: U64) -> None:
        """Drops the counts of entries that were deleted."""
        with self._lock:
            counts = self._merge()
            kept = ~np.isin(counts.ids, ids)
            if not kept.all():
                self._counts = HitCounts(counts.ids[kept], counts.hits[kept])
                self._changed = True

    def save(self) -> None:
        """Writes what changed since the last time. When that fails the log says so, and serving goes on."""
        with self._file_lock:
            with self._lock:
                counts, changed = self._merge(), self._changed
                reports = self._reports.copy()
                self._changed = False
            if self._path is None or not changed:
                return
            try:
                write_atomically(self._path, lambda file: _write(file, counts, reports))
            except StorageError as error:
                self._changed = True
                log.warning(
                    "hit counts are not saved, and lost if the service is killed: %s", error
                )

    def move(self, path: Path | None) -> None:
        """Counts go to another file from the next save() on. Raises StorageError when the one they were in stays."""
        with self._file_lock:
            before, self._path = self._path, path
            with self._lock:
                self._changed = True
            if before is not None and before.exists():
                remove_durably(before)

    def remove(self) -> None:
        """Removes the file and forgets everything. Raises StorageError."""
        with self._file_lock:
            if self._path is not None and self._path.exists():
                remove_durably(self._path)
            self._path = None

    def _merge(self) -> HitCounts:
        """Brings the pending hits into the table."""
        if self._pending:
            ids, hits = np.unique(np.concatenate(self._pending), return_counts=True)
            self._pending, self._pending_ids = [], 0
            self._counts = _sum(self._counts, HitCounts(ids, hits.astype(np.int64)))
            self._changed = True
        return self._counts


def _sum(one: HitCounts, other: HitCounts) -> HitCounts:
    ids, rows = np.unique(np.concatenate([one.ids, other.ids]), return_inverse=True)
    hits: I64 = np.zeros(len(ids), np.int64)
    np.add.at(hits, rows, np.concatenate([one.hits, other.hits]))
    return HitCounts(ids, hits)


def _write(file: IO[bytes], counts: HitCounts, reports: Reports) -> None:
    np.savez(
        file,
        ids=counts.ids,
        hits=counts.hits,
        clients=np.array(list(reports), np.str_),
        reports=np.array(list(reports.values()), np.uint64),
    )


def _read(path: Path) -> tuple[HitCounts, Reports]:
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        ids, hits = file["ids"], file["hits"]
        # 0.1.0 knew no reports
        clients, numbers = (file.get(name, []) for name in ("clients", "reports"))
        reports = OrderedDict(zip(map(str, clients), map(int, numbers), strict=True))
    if (ids.dtype, hits.dtype) != (np.uint64, np.int64) or ids.ndim != 1 or ids.shape != hits.shape:
        raise ValueError("no columns of ids and hits")
    if (ids[:-1] >= ids[1:]).any() or (hits < 0).any():
        raise ValueError("ids that do not ascend, or negative hits")
    return HitCounts(ids, hits), reports

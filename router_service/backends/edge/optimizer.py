"""Starts the process that optimizes a copy of a shard, waits for it, and stops it when asked."""

from __future__ import annotations

import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np

from router_service.arrays import U64, Entries
from router_service.backends.base import CollectionSpec, Compression, Report
from router_service.backends.disk import storage_call
from router_service.backends.edge.child_process import start_module
from router_service.backends.edge.shard import Shard
from router_service.errors import StorageError

_CHILD = "router_service.backends.edge.optimize_child"
_STDERR_TAIL = 2000
_NICENESS = 19  # searches come first
_REPORT_EVERY_S = 0.1


class OptimizeJob:
    """One run of the child."""

    def __init__(self, report: Report) -> None:
        """`report` is called about every 0.1 s; what it raises ends the child."""
        self._report = report
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(
        self, shard: Path, spec: CollectionSpec, compression: Compression, segments: int = 1
    ) -> None:
        """Optimizes the shard in place, see configuration().

        Raises StorageError with the end of the child's stderr when it fails.
        """
        with storage_call(f"optimize {shard}"), tempfile.TemporaryFile() as stderr:
            what = [str(shard), str(spec.dimension), spec.metric, compression.label]
            process = self._start([*what, str(segments)], stderr.fileno())
            self._wait(process)
            stderr.seek(0)
            text = stderr.read().decode(errors="replace")
        if self._stopped:
            raise StorageError(f"optimizing {shard} was stopped")
        if process.returncode:
            tail = text[-_STDERR_TAIL:].strip()
            raise StorageError(
                f"optimizing {shard} failed with status {process.returncode}: {tail}"
            )

    def stop(self) -> None:
        """Kills the child, now or as soon as it starts; run() raises."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()

    def _start(self, arguments: list[str], stderr: int) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._stopped:
                raise StorageError("the optimization was stopped before it began")
            self._process = start_module(_CHILD, arguments, stderr=stderr, niceness=_NICENESS)
            return self._process

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        """Until the child has ended; it does not outlive an interrupt, or what the report raises."""
        started = time.monotonic()
        try:
            while process.poll() is None:
                self._report("index", int(time.monotonic() - started), 0)
                try:
                    process.wait(_REPORT_EVERY_S)
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            process.kill()
            process.wait()
            raise


_IDS_PER_STEP = 16
# What is left when writes have to wait for the rest: some 50 ms.
_FEW = 128


class CatchUp:
    """Ids of changed entries. note() is called after the change, so that what is read again is never older."""

    def __init__(self, read: Callable[[U64], Entries]) -> None:
        """`read` gives the entries of ids that the present shard has, with keys."""
        self._read = read
        self._ids: dict[int, None] = {}  # in the order of writing
        self._lock = threading.Lock()

    def note(self, ids: U64) -> None:
        """Marks entries as written or deleted."""
        with self._lock:
            self._ids.update(dict.fromkeys(ids.tolist()))

    def bring(self, shard: Shard, generation: int, report: Report, *, down_to: int = _FEW) -> None:
        """Writes to `shard` what was noted, until at most `down_to` ids are left."""
        done = 0
        while len(self._ids) > down_to:
            ids = self._taken()
            entries = self._read(ids)
            gone = np.setdiff1d(ids, entries.ids)
            if len(entries):
                shard.upsert(entries, generation)
            if len(gone):
                shard.delete(gone)
            done += len(ids)
            report("catch up", done, done + len(self._ids))

    def _taken(self) -> U64:
        with self._lock:
            ids = list(islice(self._ids, _IDS_PER_STEP))
            for number in ids:
                del self._ids[number]
        return np.array(ids, np.uint64)

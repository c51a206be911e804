"""Builds the next generation of a collection beside the one that is served, and swaps it in.

The files are copied while writes wait, the copy is indexed by a process of its own while they go on, what they changed
is replayed to the copy, and writes wait once more for the swap. Searches never wait for more than one engine call.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np

from router_service.arrays import U64
from router_service.backends.base import CollectionSpec, Compression, Pacing, Report, say_nothing
from router_service.backends.disk import copy_tree, disk_bytes, remove_tree, storage_call
from router_service.backends.edge.files import Pointer
from router_service.backends.edge.generation import Generation, Resources
from router_service.backends.edge.ledger import Sums
from router_service.backends.edge.processes import Shard
from router_service.backends.edge.served import ServedGeneration
from router_service.backends.edge.unwritten import UnwrittenShard
from router_service.children import start_module
from router_service.errors import Busy, StorageError

# A graph search steps over replaced and deleted entries, but no longer finds its way when they are many: recall@1 is
# 0.99 with 0.3 of them, 0.17 to 0.8 with 0.8. From here on every entry is looked at until the next optimize().
MOST_OUTDATED = 0.3
# What auto_optimize() leaves: one large, one of what has come since, which takes a third of the time to index, and the
# one that is written to. Each costs a search 0.3 to 0.5 ms.
_SEGMENTS = 3
# Share of the entries that may be in the second one.
_MOST_APART = 0.25
_LOCK_POLL_S = 0.05
# Keys and quantized keys of an indexed segment, most of the bytes: written once, deletions are marked elsewhere.
_NEVER_CHANGED = ("matrix.dat", "quantized.data")
# An engine call of so many holds the GIL for a few ms, and lookups get in between.
_IDS_PER_STEP = 16
# What is left when writes have to wait for the rest: some 50 ms.
_FEW = 128
_CHILD = "router_service.backends.edge.optimize_child"
_STDERR_TAIL = 2000
_NICENESS = 19  # searches come first
_REPORT_EVERY_S = 0.1


class OptimizeJob:
    """One run of the child that indexes a copy of a shard."""

    def __init__(self, report: Report, pacing: Pacing) -> None:
        """`report` is called about every 0.1 s; what it raises ends the child.

        While any layer is searched, by `pacing`, the child has half of the cores; else a lookup waits for one.
        """
        self._report, self._pacing = report, pacing
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
            with self._lock:
                if self._stopped:
                    raise StorageError("the optimization was stopped before it began")
                process = start_module(
                    _CHILD, [*what, str(segments)], stderr=stderr.fileno(), niceness=_NICENESS
                )
                self._process = process
            # Nobody waits for what the service does on its own account
            self._wait(process, always_half=segments > 1)
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

    def _wait(self, process: subprocess.Popen[bytes], *, always_half: bool) -> None:
        """Until the child has ended; it does not outlive an interrupt, or what the report raises."""
        started = time.monotonic()
        try:
            while process.poll() is None:
                _share_cores(process.pid, half=always_half or self._pacing.being_searched)
                self._report("index", int(time.monotonic() - started), 0)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_REPORT_EVERY_S)
        except BaseException:
            process.kill()
            process.wait()
            raise


def _share_cores(process: int, *, half: bool) -> None:
    """Gives all threads of a process the cores that this one has, or half of them."""
    cores = sorted(os.sched_getaffinity(0))
    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        for task in Path(f"/proc/{process}/task").iterdir():
            os.sched_setaffinity(int(task.name), cores[len(cores) // 2 :] if half else cores)


class Replay:
    """Ids of entries that were changed since the copy. note() comes after the change: none is read too early."""

    def __init__(self, served: ServedGeneration) -> None:
        self._served = served
        self._ids: dict[int, None] = {}  # in the order of writing
        self._lock = threading.Lock()

    def note(self, ids: U64) -> None:
        """Marks entries as written or deleted."""
        with self._lock:
            self._ids.update(dict.fromkeys(ids.tolist()))

    def run(self, shard: Shard, generation: int, report: Report, *, down_to: int = _FEW) -> None:
        """Writes to `shard` what was noted, until at most `down_to` ids are left."""
        done = 0
        while len(self._ids) > down_to:
            ids = self._taken()
            with self._served.engine_call() as served:
                entries = served.shard.retrieve(ids, keys=True)
            gone = np.setdiff1d(ids, entries.ids)
            if len(entries):
                shard.upsert(entries, generation)
            if len(gone):
                shard.delete(gone)
            done += len(ids)
            report("replay", done, done + len(self._ids))

    def _taken(self) -> U64:
        with self._lock:
            ids = list(islice(self._ids, _IDS_PER_STEP))
            for number in ids:
                del self._ids[number]
        return np.array(ids, np.uint64)


class Optimizer:
    """Optimizes one collection, on a caller's account or on the service's own."""

    def __init__(self, served: ServedGeneration, resources: Resources) -> None:
        self._served, self._resources = served, resources
        self._job: OptimizeJob | None = None
        self._replay: Replay | None = None  # of an optimize whose copy has been taken
        self.automatic = False  # whether auto_optimize() is at work
        self._ended = False  # and an optimize() ended it
        self._apart = 0  # entries outside of the largest indexed segment, as far as is known

    def note(self, ids: U64) -> None:
        """After a write or deletion, by who holds `writing`: the next generation will have what these entries are."""
        if replay := self._replay:
            replay.note(ids)

    def optimize(self, compression: Compression | None, report: Report) -> None:
        """As Collection.optimize(); ends an auto_optimize()."""
        while not self._served.optimizing.acquire(timeout=_LOCK_POLL_S):
            if not self.automatic:
                raise Busy(
                    f"{self._served.files.directory} is being optimized; try again when that is done"
                )
            self._ended = True
            self.stop()
        try:
            if compression is not None or not self._served.now.needs_no_index:
                self._build(self._served.now.pointer.next(compression), report)
        finally:
            self._served.optimizing.release()

    def auto_optimize(self, report: Report) -> bool:
        """With the compression there is. Returns False when an optimize() is at work, or ended this one."""
        if not self._served.optimizing.acquire(blocking=False):
            return False
        self.automatic, self._ended = True, False
        try:
            self._build(self._served.now.pointer.next(None), report, self._segments())
        except StorageError:
            if not self._ended:
                raise
            return False
        finally:
            self.automatic = False
            self._served.optimizing.release()
        return True

    def stop(self) -> None:
        """Ends the child that is indexing, if there is one; who waits for it gets a StorageError."""
        if job := self._job:
            job.stop()

    def _segments(self) -> int:
        """How many auto_optimize() leaves: one when much is outdated, or much has come since there was but one."""
        now = self._served.now
        apart = now.changed + self._apart
        much = now.outdated_share > MOST_OUTDATED / 2 or apart > _MOST_APART * len(now.table)
        return 1 if much else _SEGMENTS

    def _build(self, target: Pointer, report: Report, segments: int = 1) -> None:
        """Whatever fails leaves the served generation in force and nothing of the next."""
        served, files = self._served, self._served.files
        if self._is_done_already(target):
            return
        self._job = job = OptimizeJob(report, self._resources.pacing)
        try:
            changed = self._copy(target, report)
            shard = files.shard(target.generation)
            job.run(shard, target.spec, target.compression, segments)
            replaced = self._open_and_swap(target, report)
        except BaseException:
            if files.read() != served.now.pointer:
                files.write(served.now.pointer)
            remove_tree(files.generation(target.generation))
            raise
        finally:
            self._job = self._replay = None
        self._apart = self._apart + changed if segments > 1 else 0
        with suppress(StorageError):  # the next open removes what is left
            replaced.abandon()
            remove_tree(files.generation(replaced.pointer.generation))

    def _is_done_already(self, target: Pointer) -> bool:
        """Whether there is nothing to index; a shard that has never had an entry is made for another compression."""
        with self._served.engine_call() as now:
            if not isinstance(now.shard, UnwrittenShard):
                return False
            if target.compression == now.pointer.compression:
                return True
            self._served.written()
            return False

    def _copy(self, target: Pointer, report: Report) -> int:
        """Copies the files of the engine; returns how many of the entries are not indexed yet. Raises DiskFull."""
        report("copy", 0, 0)
        files = self._served.files
        with self._served.frozen() as now:
            source = files.shard(now.pointer.generation)
            rebuilt = target.compression.apart or now.pointer.compression.apart
            # The copy, its index, and when search keys are stored apart perhaps another copy.
            self._resources.free_space.require((3 if rebuilt else 2) * disk_bytes(source))
            remove_tree(files.generation(target.generation))
            copy_tree(source, files.shard(target.generation), _NEVER_CHANGED)
            if (sums := Sums.load(files.sums(now.pointer.generation))) is not None:
                # Of files that the next generation has too
                sums.save(files.sums(target.generation))
            self._replay = Replay(self._served)
            return now.changed

    def _open_and_swap(self, target: Pointer, report: Report) -> Generation:
        """Opens the next generation and serves it; returns the one that was served."""
        now, replay = self._served.now, self._replay
        assert replay is not None  # noqa: S101  # set by _copy
        shard = self._resources.shards.open(self._served.files, target, len(now.table), now.shard)
        try:
            replay.run(shard, target.generation, report)
            with self._served.writing:
                replay.run(shard, target.generation, say_nothing, down_to=0)
                return self._served.swap(self._complete(shard, target))
        except BaseException:
            shard.close()
            raise

    def _complete(self, shard: Shard, target: Pointer) -> Generation:
        """The next generation with the entries of the present one, made the one that counts on disk."""
        files, table = self._served.files, self._served.now.table
        counts = shard.counts(target.generation)
        if counts.entries != len(table):
            raise StorageError(
                f"{files.shard(target.generation)} has {counts.entries} entries, expected {len(table)}"
            )
        complete = Generation(files, target, shard, table, counts)
        try:
            complete.flush()
            complete.keep()
            files.write(target)
        except BaseException:
            complete.abandon()
            raise
        return complete

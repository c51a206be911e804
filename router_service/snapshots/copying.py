"""A memory of a Qdrant server copied into embedded collections, all layers as they are at one moment.

Entries are copied while lookups and writes go on. Then each layer is listed again without its keys, and what is no
longer as it was copied is copied again, until a listing finds nothing: then each entry was the same from its copy to
that listing, so the copy is the memory of the moment at which the listing began. While this service's own writes keep
it from that, they wait until those before them are copied too; that is the moment then, and what they write after it is
left out of the listing. What it cannot see is what another service changed and changed back, or this service wrote
over, between two listings, and a key that another service changed without another creation time.

In RAM are 16 bytes per entry, the value rows of the layers under way, and the entries that the last listing found.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from router_service.arrays import U64, Entries, rows_of
from router_service.backends.base import Collection, Report
from router_service.backends.edge.backend import ISOLATE_ABOVE_BYTES, EdgeBackend, EdgeCollection
from router_service.backends.qdrant_server.collection import ServerCollection
from router_service.errors import Busy, Cancelled, StorageError
from router_service.memories.memory import MemoryRecord, RoutingMemory, spec_of
from router_service.memories.write_gate import Watch
from router_service.snapshots.manifest import layer_directory

T = TypeVar("T")

# Layers that are copied at a time, each with an engine process when they are large.
_TOGETHER = 4
# How often a layer is listed while writes go on; and then after writes have waited.
_LISTINGS, _PAUSES = 8, 4
# How long those that come may wait for writes under way, in all layers together.
_WRITES_END_S = 5.0
# What is copied between two flushes of the engine, whose log would hold all of it once more.
_FLUSHED_BYTES = 256 << 20
_LOOK_S = 0.05
_NO_IDS: U64 = np.empty(0, np.uint64)

# Called now and then by work that may have to end; what it raises ends it.
Tick = Callable[[], None]


def side_by_side(
    jobs: Sequence[Callable[[Tick], T]], report: Tick, together: int = _TOGETHER
) -> list[T]:
    """The results of jobs, several at a time. When one fails, or `report` raises, the others end at their next tick."""
    ended = threading.Event()

    def tick() -> None:
        if ended.is_set():
            raise Cancelled("work beside it failed")

    with ThreadPoolExecutor(together, thread_name_prefix="layer") as pool:
        under_way = [pool.submit(job, tick) for job in jobs]
        try:
            waiting = set(under_way)
            while waiting:
                report()
                done, waiting = wait(waiting, _LOOK_S, FIRST_EXCEPTION)
                for each in done:
                    each.result()
        except BaseException:
            ended.set()
            for each in under_way:
                each.cancel()
            raise
    return [each.result() for each in under_way]


def bytes_of(record: MemoryRecord, entries: int) -> int:
    """About what so many entries take as files: keys, value rows as text and once more beside the engine, the rest."""
    return entries * (4 * record.fingerprint.hidden_size + 10 * record.value_width + 400)


@dataclass(frozen=True, slots=True)
class Copied:
    """What was copied: the memory as it was at `created_unix_ms`."""

    record: MemoryRecord
    created_unix_ms: int
    write_pause_ms: int
    entries: tuple[int, ...]  # per layer


@dataclass(frozen=True, slots=True)
class Changes:
    """What has become of a layer since it was copied: entries that differ, and the ids of those and of what is gone."""

    entries: Entries
    ids: U64  # [n] ascending

    def __len__(self) -> int:
        return len(self.ids)


class LayerCopy:
    """The copy of one layer."""

    def __init__(
        self, backend: EdgeBackend, name: str, source: ServerCollection, record: MemoryRecord
    ) -> None:
        self._backend, self.name, self._source, self._spec = backend, name, source, spec_of(record)
        self._ids, self._digests = _NO_IDS, _NO_IDS  # of what was copied
        self.done = 0  # entries of the work under way

    @property
    def entries(self) -> int:
        """How many were copied."""
        return len(self._ids)

    def fill(self, tick: Tick) -> None:
        """The first copy, into a new collection."""
        compression = self._source.info().compression
        ids, digests, after, unflushed = [_NO_IDS], [_NO_IDS], None, 0
        with self._open(self._backend.create(self.name, self._spec, compression)) as target:
            while True:
                tick()
                page, found = self._source.copied(after)
                if not len(page):
                    break
                target.upsert(page)
                unflushed += page.keys.nbytes
                if unflushed > _FLUSHED_BYTES:
                    target.flush()
                    unflushed = 0
                ids.append(page.ids)
                digests.append(found)
                after = int(page.ids[-1])
                self.done += len(page)
            self._ids, self._digests = np.concatenate(ids), np.concatenate(digests)

    def changes(
        self, written: U64, tick: Tick, but: Callable[[], U64] = lambda: _NO_IDS
    ) -> Changes:
        """Lists the layer. `written`: ids of what is read again whatever the listing says.

        `but`: asked for after it, ids of what stays as it was copied.
        """
        ids, digests, after = [_NO_IDS], [_NO_IDS], None
        while True:
            tick()
            found, marks = self._source.listed(after)
            if not len(found):
                break
            ids.append(found)
            digests.append(marks)
            after = int(found[-1])
            self.done += len(found)
        listed, marks = np.concatenate(ids), np.concatenate(digests)
        rows, known = rows_of(self._ids, listed)
        same = known.copy()
        same[known] = self._digests[rows[known]] == marks[known]
        gone = self._ids[~np.isin(self._ids, listed)]
        changed = np.setdiff1d(np.concatenate([listed[~same], gone, written]), but())
        return self.read(changed, tick)

    def read(self, ids: U64, tick: Tick) -> Changes:
        """The entries of these ids as they are now; from here on they count as copied, see apply()."""
        pages, digests, step = [], [_NO_IDS], self._source.entries_per_page
        for start in range(0, len(ids), step):
            tick()
            page, found = self._source.copied_ids(ids[start : start + step])
            pages.append(page)
            digests.append(found)
        entries = Entries.concat(pages, self._spec.dimension, self._spec.value_width)
        kept = ~np.isin(self._ids, ids)
        numbers = np.concatenate([self._ids[kept], entries.ids])
        marks = np.concatenate([self._digests[kept], *digests])
        order = np.argsort(numbers)
        self._ids, self._digests = numbers[order], marks[order]
        return Changes(entries, ids)

    def apply(self, changes: Sequence[Changes], tick: Tick) -> None:
        """Makes changes() in the copy, the oldest first."""
        if not any(map(len, changes)):
            return
        with self._open(self._backend.open(self.name, self._spec)) as target:
            for each in changes:
                tick()
                target.delete(np.setdiff1d(each.ids, each.entries.ids))
                target.upsert(each.entries)

    def require_led_to(self, tick: Tick) -> None:
        """Raises CollectionClosed when another collection has come into the place of the one that was copied."""
        self._source.require_led_to()

    @contextmanager
    def _open(self, target: EdgeCollection) -> Iterator[EdgeCollection]:
        """Inside, the copy is written to. Raises StorageError unless it then holds as many entries as were copied."""
        try:
            yield target
            if (found := target.info().entries) != self.entries:
                raise StorageError(
                    f"the copy of {self.name} holds {found} entries, {self.entries} were copied"
                )
        finally:
            target.close()


def copy_memory(
    memory: RoutingMemory,
    directory: Path,
    current: Callable[[], MemoryRecord],
    report: Report,
    min_free_bytes: int | None = None,
) -> Copied:
    """Copies the layers of a memory on a server to `layer-LLL` in a directory.

    `current`: the memory's record as the server has it now; raises Busy when another memory has come into its place.
    Raises Busy while other services keep writing, or a write of this one does not end; StorageError; and what
    `report` raises.
    """
    sources = [_of_server(layer.collection) for layer in memory.layers]
    backend = EdgeBackend(
        directory,
        min_free_bytes=min_free_bytes,
        isolate_above_bytes=-1 if _are_large(memory) else ISOLATE_ABOVE_BYTES,
        workers=_TOGETHER,
    )
    try:
        layers = [
            LayerCopy(backend, layer_directory(number), source, memory.record)
            for number, source in enumerate(sources)
        ]
        with ExitStack() as open_watches:
            watches = [open_watches.enter_context(each.gate.watched()) for each in memory.layers]
            return _Copying(memory, layers, watches, current, report).run()
    finally:
        backend.close()
        (directory / "LOCK").unlink()


def _of_server(collection: Collection) -> ServerCollection:
    if not isinstance(collection, ServerCollection):
        raise StorageError(f"{collection} is no collection of a Qdrant server")
    return collection


def _are_large(memory: RoutingMemory) -> bool:
    """Whether an engine in this process would keep lookups waiting."""
    entries = max((layer.info().entries for layer in memory.layers), default=0)
    return entries * 4 * memory.record.fingerprint.hidden_size > ISOLATE_ABOVE_BYTES


class _Copying:
    """A copy under way."""

    def __init__(
        self,
        memory: RoutingMemory,
        layers: Sequence[LayerCopy],
        watches: Sequence[Watch],
        current: Callable[[], MemoryRecord],
        report: Report,
    ) -> None:
        self._memory, self._layers, self._watches = memory, layers, watches
        self._current, self._report = current, report
        self._record, self._moment_ms = memory.record, 0  # of which the copy is
        self._entries = sum(layer.info().entries for layer in memory.layers)

    def run(self) -> Copied:
        """Raises what copy_memory() raises."""
        self._each("copy entries", [layer.fill for layer in self._layers])
        found, before = 0, None
        for _ in range(_LISTINGS):
            changes = self._changes()
            found = sum(map(len, changes))
            self._apply([[each] for each in changes])
            if not found or (before is not None and 2 * found > before):
                break
            before = found
        pause_ms = self._paused() if found else 0
        self._each("check the copy", [layer.require_led_to for layer in self._layers])
        self._current()
        entries = tuple(layer.entries for layer in self._layers)
        return Copied(self._record, self._moment_ms, pause_ms, entries)

    def _paused(self) -> int:
        """A moment up to which all is copied that this service wrote; how long its writes waited at the most, in ms."""
        rounds, longest_s = list[list[Changes]](), 0.0
        for _ in range(_PAUSES):
            started = time.monotonic()
            with ExitStack() as pause:
                until = started + _WRITES_END_S
                for layer in self._memory.layers:
                    pause.enter_context(layer.gate.closed(self._waiting, until))
                self._look()
                rounds.append(self._each("read what was written", self._jobs(LayerCopy.read)))
            longest_s = max(longest_s, time.monotonic() - started)
            pairs = zip(self._layers, self._watches, strict=True)
            jobs = [partial(layer.changes, _NO_IDS, but=watch.seen) for layer, watch in pairs]
            rounds.append(self._each("list entries", jobs))
            if not any(map(len, rounds[-1])):
                break
        else:
            self._refuse(sum(map(len, rounds[-1])))
        self._apply(list(zip(*rounds, strict=True)))
        return math.ceil(1000 * longest_s)

    def _waiting(self) -> None:
        self._report("wait for writes", 0, self._entries)

    def _changes(self) -> list[Changes]:
        """Of each layer, by a listing that begins now."""
        self._look()
        return self._each("list entries", self._jobs(LayerCopy.changes))

    def _look(self) -> None:
        self._record, self._moment_ms = self._current(), time.time_ns() // 1_000_000

    def _jobs(
        self, read: Callable[[LayerCopy, U64, Tick], Changes]
    ) -> list[Callable[[Tick], Changes]]:
        pairs = zip(self._layers, self._watches, strict=True)
        return [partial(read, layer, watch.taken()) for layer, watch in pairs]

    def _apply(self, changes: Sequence[Sequence[Changes]]) -> None:
        pairs = zip(self._layers, changes, strict=True)
        jobs = [partial(LayerCopy.apply, layer, each) for layer, each in pairs]
        self._each("copy what changed", jobs)

    def _each(self, stage: str, jobs: Sequence[Callable[[Tick], T]]) -> list[T]:
        for layer in self._layers:
            layer.done = 0
        total = self._entries

        def report() -> None:
            self._report(stage, sum(layer.done for layer in self._layers), total)

        return side_by_side(jobs, report)

    def _refuse(self, changed: int) -> None:
        raise Busy(
            f"memory {self._record.name!r} is written to by others than this service: {changed} entries changed before "
            f"the last of {_LISTINGS} to {_LISTINGS + _PAUSES} listings ended; pause the other writers while it is "
            "copied, or try again"
        )

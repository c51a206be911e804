"""Makes and removes the snapshots of a memory's layers on a Qdrant server; a crash leaves none that nobody knows of."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

from router_service.backends.qdrant_server.rest import SnapshotFile
from router_service.backends.qdrant_server.snapshot_book import (
    RENEW_S,
    LayerSnapshot,
    ServerSnapshot,
    SnapshotBook,
)
from router_service.backends.qdrant_server.snapshots import CollectionSnapshots, Tick
from router_service.errors import (
    BackendUnavailable,
    Busy,
    Cancelled,
    RoutingServiceError,
    StorageError,
)
from router_service.routing_memory import RoutingMemory

log = logging.getLogger(__name__)

# As Qdrant names them: COLLECTION-PEER-2026-01-31-23-59-59.snapshot, in UTC.
_MOMENT = re.compile(r"-(\d{4}(?:-\d{2}){5})\.snapshot")
# How far the clocks of service and server may be apart.
_CLOCKS_S = 60.0


class SnapshotDraft:
    """A snapshot that is being made, layer by layer."""

    def __init__(
        self, book: SnapshotBook, snapshots: CollectionSnapshots, started: ServerSnapshot
    ) -> None:
        self._book, self._snapshots, self.snapshot = book, snapshots, started
        self._kept = time.monotonic()

    def add(self, memory: RoutingMemory, collection: str, report: Tick) -> None:
        """The next layer. Raises StorageError, Busy, and what `report` raises."""
        before = tuple(file.name for file in self._snapshots.list(collection))
        now = time.time_ns() // 1_000_000
        self._keep(replace(self.snapshot, making=collection, making_since_ms=now, before=before))
        version, entries = memory.version, self._snapshots.count(collection)
        file = self._snapshots.create(collection, lambda: self._tick(report))
        if file.name in before:
            raise Busy(
                f"the server has put it in the place of {file.name!r}, made in the same second; make it again"
            )
        after = self._snapshots.count(collection)
        layer = LayerSnapshot(file, after, exact=(version, entries) == (memory.version, after))
        self._keep(
            replace(self.snapshot, layers=(*self.snapshot.layers, layer), making="", before=())
        )

    def _keep(self, snapshot: ServerSnapshot) -> None:
        self._book.keep(snapshot)
        self.snapshot, self._kept = snapshot, time.monotonic()

    def _tick(self, report: Tick) -> None:
        report()
        if time.monotonic() > self._kept + RENEW_S:
            self._keep(self.snapshot)


@contextmanager
def making(
    book: SnapshotBook, snapshots: CollectionSnapshots, started: ServerSnapshot
) -> Iterator[SnapshotDraft]:
    """A snapshot that is whole at the end; when something is raised inside, nothing is left of it."""
    book.begin(started)
    draft = SnapshotDraft(book, snapshots, started)
    try:
        yield draft
        book.commit(draft.snapshot)
    except BaseException as error:
        with left_to_the_next_sweep(started):
            discard_files(book, snapshots, draft.snapshot)
            if outcome_unknown(error):
                book.leave(draft.snapshot)
            else:
                book.remove(draft.snapshot)
        raise


def discard_files(
    book: SnapshotBook, snapshots: CollectionSnapshots, snapshot: ServerSnapshot
) -> None:
    """Removes what the server keeps of a snapshot. Raises StorageError."""
    for layer in snapshot.layers:
        with snapshots.reachable(layer.file.collection):
            snapshots.delete(layer.file.collection, layer.file.name)
    if snapshot.making:
        known = book.files(but=snapshot)
        with snapshots.reachable(snapshot.making):
            for file in snapshots.list(snapshot.making):
                if file not in known and _is_stray(file, snapshot):
                    snapshots.delete(file.collection, file.name)


@contextmanager
def left_to_the_next_sweep(what: object) -> Iterator[None]:
    """Logs what cannot be removed now."""
    try:
        yield
    except StorageError as error:
        log.warning("what is left of %s stays for now: %s", what, error)


def outcome_unknown(error: BaseException) -> bool:
    """Whether the server may still be at work on what failed here."""
    return isinstance(error, BackendUnavailable | Cancelled) or not isinstance(
        error, RoutingServiceError
    )


def _is_stray(file: SnapshotFile, snapshot: ServerSnapshot) -> bool:
    """Whether a file is what the server made when the service did not hear of it, and not another program's."""
    moment = _MOMENT.search(file.name)
    if file.name in snapshot.before or moment is None:
        return False
    made = datetime.strptime(moment[1], "%Y-%m-%d-%H-%M-%S").replace(tzinfo=UTC)
    return abs(made.timestamp() - snapshot.making_since_ms / 1000) < _CLOCKS_S

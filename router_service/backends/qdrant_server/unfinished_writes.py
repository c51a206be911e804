"""Writes that a server did not acknowledge, and that some of its replicas may have: finished in the background.

Qdrant undoes nothing when too few replicas take a write: these have it, the others do not, and stay so until somebody
writes the same ids again. So each write is noted before it is sent, in RAM and (with a data directory) in a file that
survives SIGKILL, and one that fails is sent again until it is acknowledged. What was written or deleted since stays.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from router_service.backends.base import UnfinishedEntries
from router_service.backends.qdrant_server.connection import Connection
from router_service.backends.qdrant_server.wire import REPLACED, q
from router_service.backends.qdrant_server.write_log import (
    DELETE,
    DONE,
    UPSERT,
    VOID,
    Record,
    WriteLog,
)
from router_service.errors import (
    BackendMisconfigured,
    BackendUnavailable,
    CollectionClosed,
    ForeignCollection,
    Overloaded,
    RoutingServiceError,
    StorageError,
)

log = logging.getLogger(__name__)

# Writes that are noted, under way or unfinished, and what they take in RAM and on disk, before more are refused.
MOST_WRITES, MOST_BYTES = 10_000, 256 << 20
# Of the file, from which on what is done is left out of it.
_LONG_FILE_BYTES = 2 * MOST_BYTES
# Between two rounds, doubling while nothing can be finished; a new write of the same ids waits for one that is sent.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
_SEND_S = 5.0
# For so long nothing is found to lead to a collection: a node that comes back does not know of its alias at first.
_GONE_S = 15.0
_MOST_NAMED = 5
# Of a collection in one round, before the others of it are left to the next.
_MOST_REFUSED = 64
_CREATED = "created"
# A request names so many points by different times; more are left to what is read before.
_MOST_TIMES = 64

# Of an entry: its id and its time of creation in ms, None: without one.
Version = tuple[int, int | None]


class Write:
    """A request that finishes it: UpsertPoints, or DeletePoints of certain versions of entries."""

    def __init__(self, request: Any, number: int = 0) -> None:
        self.request, self.number = request, number
        self.size_bytes = request.ByteSize()
        self.ids = _ids_of(request)  # of which it is still to be sent
        self.busy = True  # under way, by who writes or by who finishes
        self.problem = ""
        self.failures = 0  # of sending it again
        self.unled_since: float | None = None  # of time.monotonic()

    @property
    def collection(self) -> str:
        """Its own name."""
        return str(self.request.collection_name)

    def rest(self) -> Any:
        """The request for what is still to be sent."""
        versions = _versions(self.request)
        if len(self.ids) == len({number for number, _ in versions}):
            return self.request
        if not isinstance(self.request, q.UpsertPoints):
            left = [each for each in versions if each[0] in self.ids]
            return deletion(self.collection, left, self.request.ordering)
        left = [point for point in self.request.points if point.id.num in self.ids]
        return _of_points(self.request, left)

    def overlaps(self, other: Write) -> bool:
        """Whether both write an entry."""
        return self.collection == other.collection and not self.ids.isdisjoint(other.ids)


def deletion(collection: str, versions: Sequence[Version], ordering: Any) -> Any:
    """The request that deletes these versions of entries, and none that came into their place."""
    return q.DeletePoints(
        collection_name=collection,
        wait=True,
        points=q.PointsSelector(filter=q.Filter(should=_exactly(versions))),
        ordering=ordering,
    )


class UnfinishedWrites:
    """Of all collections of a server that one service writes to. Safe to call from several threads."""

    def __init__(
        self,
        connection: Connection,
        directory: Path | None,
        finished: Callable[[str], None] = lambda collection: None,
    ) -> None:
        """`directory`: where the file lies; None: in RAM only. `finished`: told of each collection that was changed.

        Goes on with what is in the file. Raises DirectoryInUse or StorageError.
        """
        self._connection, self._finished = connection, finished
        lock = threading.Lock()
        self._freed, self._work = threading.Condition(lock), threading.Condition(lock)
        self._live: dict[int, Write] = {}  # by number, which is their order
        self._bytes = self._numbers = 0
        self._stopping = False
        self._file = None if directory is None else WriteLog(directory, connection.options)
        for kind, number, body in self._file.read() if self._file else ():
            self._replay(kind, number, body)
        for write in list(self._live.values()):
            write.busy = False
            self._supersede(write)
        if self._file is not None:
            self._file.rewrite(map(_record, self._live.values()))
        self._thread = threading.Thread(target=self._run, name="unfinished-writes", daemon=True)
        if self._live:
            self._say("go on from the last start")
        self._thread.start()

    @contextmanager
    def writing(self, requests: Sequence[Any]) -> Iterator[Callable[[], None]]:
        """Around writes of one collection, sent in this order; call what it yields after each acknowledgement.

        Waits for writes of the same ids. What is left when an error comes out is finished in the background, unless
        nothing of it can be done or was. Raises BackendUnavailable when too much is unfinished, DiskFull, StorageError.
        """
        left = deque(self._note(requests))
        try:
            yield lambda: self._end(left.popleft(), done=True)
        except BaseException as error:
            kept = _may_be_half_done(error, begun=len(left) < len(requests))
            for write in left:
                write.problem = str(error) or type(error).__name__
                self._end(write, done=False, kept=kept)
            if kept and left:
                self._say("were not acknowledged", first=len(left))
            raise

    def of(self, collection: str) -> UnfinishedEntries | None:
        """What is unfinished of a collection; None: nothing."""
        with self._freed:
            found = [write for write in self._left() if write.collection == collection]
            if not found:
                return None
            ids = sorted({each for write in found for each in write.ids})
            return UnfinishedEntries(
                len(found), ids, found[-1].problem, on_disk=self._file is not None
            )

    def versions_of(self, collection: str, ids: set[int]) -> list[Version]:
        """Those of these entries that an unfinished upsert may have written."""
        with self._freed:
            return [
                version
                for write in self._live.values()
                if write.collection == collection and isinstance(write.request, q.UpsertPoints)
                for version in _versions(write.request)
                if version[0] in write.ids and version[0] in ids
            ]

    def stop(self) -> None:
        """Begins nothing more; before the connection is closed, which ends what is under way."""
        with self._work:
            self._stopping = True
            self._work.notify_all()

    def close(self) -> None:
        """After stop(): what is unfinished stays in the file. Closing twice is allowed."""
        self._thread.join()
        kept = (
            "the next start goes on" if self._file is not None else "without --data they end here"
        )
        self._say(f"are left, {kept}")
        if self._file is not None:
            self._file.close()

    def _note(self, requests: Sequence[Any]) -> list[Write]:
        writes = [Write(each) for each in requests]
        with self._freed:
            while any(
                each.busy and each.overlaps(write)
                for each in self._live.values()
                for write in writes
            ):
                self._freed.wait()
            self._require_room(sum(write.size_bytes for write in writes))
            for write in writes:
                self._numbers += 1
                write.number = self._numbers
            if self._file is not None:
                self._file.append(*map(_record, writes))
            for write in writes:
                self._keep(write)
        return writes

    def _require_room(self, size: int) -> None:
        waiting = self._left()
        full = self._bytes + size > MOST_BYTES or len(self._live) >= MOST_WRITES
        if waiting and full:
            raise BackendUnavailable(
                f"{len(waiting)} writes that the Qdrant server at {self._connection.options.url} did not acknowledge "
                f"are still to be finished, {self._bytes >> 20} MiB, and more are refused until its nodes are whole; "
                "`router-admin doctor` names them",
                _LONGEST_PAUSE_S,
            )

    def _left(self) -> list[Write]:
        """Those that failed, being sent again or not."""
        return [write for write in self._live.values() if write.problem]

    def _waiting(self) -> list[Write]:
        return [write for write in self._live.values() if not write.busy]

    def _keep(self, write: Write) -> None:
        self._live[write.number] = write
        self._bytes += write.size_bytes

    def _drop(self, write: Write) -> None:
        if self._live.pop(write.number, None) is not None:
            self._bytes -= write.size_bytes

    def _end(self, write: Write, *, done: bool, kept: bool = False) -> None:
        """Of a write that was under way: it is done, or it is kept to be finished, or nothing of it was done."""
        with self._freed:
            write.busy = False
            if done or kept:
                self._supersede(write)
            if not kept:
                self._drop(write)
                self._note_end(DONE if done else VOID, write.number)
            self._freed.notify_all()
            if kept:
                self._work.notify()

    def _supersede(self, write: Write) -> None:
        """What is unfinished of the same entries from before it, is not sent any more."""
        for each in list(self._live.values()):
            if each.number < write.number and each.collection == write.collection:
                each.ids -= write.ids
                if not each.ids:
                    self._drop(each)

    def _note_end(self, kind: int, number: int) -> None:
        if self._file is None:
            return
        try:
            if not self._live:
                self._file.clear()
            elif self._file.size_bytes > _LONG_FILE_BYTES:
                self._file.rewrite(map(_record, self._live.values()))
            else:
                self._file.append((kind, number, b""))
        except StorageError:  # it is sent again after a kill, no more
            log.exception("%s still says that a write is unfinished", self._file.path)

    def _replay(self, kind: int, number: int, body: bytes) -> None:
        self._numbers = max(self._numbers, number)
        if kind in _REQUESTS:
            write = Write(_REQUESTS[kind].FromString(body), number)
            write.problem = "the service ended before it was acknowledged"
            self._keep(write)
        elif (ended := self._live.get(number)) is not None:
            if kind == DONE:
                self._supersede(ended)
            self._drop(ended)

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            with self._work:
                self._work.wait_for(lambda: self._stopping or self._waiting())
                if self._work.wait_for(lambda: self._stopping, pause_s):
                    return
                waiting = self._waiting()
            done = self._round(waiting)
            pause_s = _FIRST_PAUSE_S if done else min(2 * pause_s, _LONGEST_PAUSE_S)

    def _round(self, waiting: Sequence[Write]) -> bool:
        """Tries each write, those last that failed most often; returns whether one succeeded.

        Of a collection only as long as it answers: a refusal may be of that write alone.
        """
        failed, done = Counter[str](), False
        for write in sorted(waiting, key=lambda each: each.failures):
            if failed[write.collection] >= _MOST_REFUSED or not self._take(write):
                continue
            try:
                changed = self._sent_again(write)
            except Exception as error:
                # ValueError: gRPC's, of a channel that was closed
                if not (isinstance(error, (StorageError, Overloaded)) or self._stopping):
                    log.exception("a write of %s is not finished", write.collection)
                with self._freed:
                    write.problem = str(error) or type(error).__name__
                    write.failures += 1
                    write.busy = False
                    self._freed.notify_all()
                refused = isinstance(error, (BackendMisconfigured, ForeignCollection))
                failed[write.collection] += 1 if refused else _MOST_REFUSED
                continue
            done = True
            if changed:
                self._finished(write.collection)
                log.info("finished: %s entries of %s", len(write.ids), write.collection)
            self._end(write, done=True)
        return done

    def _take(self, write: Write) -> bool:
        """Whether a write is still to be finished, and nobody writes the same entries just now."""
        with self._freed:
            if self._stopping or write.number not in self._live:
                return False
            if any(w.busy and w.overlaps(write) for w in self._live.values()):
                return False
            write.busy = True
            return True

    def _sent_again(self, write: Write) -> bool:
        """Sends what is left of a write; False when there is nothing to do. Raises StorageError, Overloaded."""
        if not self._is_led_to(write):
            log.warning(
                "not finished, %d entries: %s is no memory's any more on the Qdrant server at %s",
                len(write.ids),
                write.collection,
                self._connection.options.url,
            )
            return False
        request = write.rest()
        if isinstance(request, q.UpsertPoints):
            return self._upsert_again(write, request)
        return self._delete_again(write, request)

    def _delete_again(self, write: Write, request: Any) -> bool:
        """Entries that were made anew, by another service, stay."""
        try:
            self._connection.call("points", "Delete", request, _SEND_S, repeat=False)
        except BackendMisconfigured:  # strict mode: no filter on what has no index, or none so long
            noted, there = set(_versions(request)), self._times_of(write)
            # What is not where it was read may be on another replica.
            ids = [n for n in sorted(write.ids) if n not in there or (n, there[n]) in noted]
            if not ids:
                return False
            named = q.PointsIdsList(ids=[q.PointId(num=number) for number in ids])
            by_id = q.DeletePoints(
                collection_name=write.collection,
                wait=True,
                points=q.PointsSelector(points=named),
                ordering=request.ordering,
            )
            self._connection.call("points", "Delete", by_id, _SEND_S, repeat=False)
        return True

    def _upsert_again(self, write: Write, request: Any) -> bool:
        """Entries that were made later, by another service, stay as they are."""
        there = self._times_of(write)
        kept = [e for e in request.points if (there.get(e.id.num) or 0) <= _time_of(e)]
        if not kept:
            return False
        request = _of_points(request, kept)
        versions = _versions(request)
        if len({created for _, created in versions}) <= _MOST_TIMES:
            # A request that was late would else undo what came after it (Qdrant 1.16 and later).
            request.update_filter.CopyFrom(q.Filter(should=_not_after(versions)))
        self._connection.call("points", "Upsert", request, _SEND_S, repeat=False)
        return True

    def _times_of(self, write: Write) -> dict[int, int | None]:
        request = q.GetPoints(
            collection_name=write.collection,
            ids=[q.PointId(num=number) for number in sorted(write.ids)],
            with_payload=TIME_ONLY,
            with_vectors=q.WithVectorsSelector(enable=False),
        )
        found = self._connection.call("points", "Get", request, _SEND_S, repeat=False).result
        return dict(map(version_of, found))

    def _is_led_to(self, write: Write) -> bool:
        """Whether a memory's name leads to the collection. Raises StorageError, also while it is not certain."""
        request = q.ListCollectionAliasesRequest(collection_name=write.collection)
        try:
            found = self._connection.call("collections", "ListCollectionAliases", request, _SEND_S)
            led = any(not each.alias_name.endswith(REPLACED) for each in found.aliases)
        except CollectionClosed:
            led = False
        now_s = time.monotonic()
        write.unled_since = None if led else write.unled_since or now_s
        if write.unled_since is not None and now_s < write.unled_since + _GONE_S:
            raise CollectionClosed(f"collection {write.collection!r}")
        return led

    def _say(self, what: str, first: int | None = None) -> None:
        """Warns of what is unfinished, if anything is; `first`: only when that is so much, and not more than before."""
        with self._freed:
            waiting = self._left()
        if not waiting or len(waiting) > (first or len(waiting)):
            return
        ids = sorted({each for write in waiting for each in write.ids})
        log.warning(
            "%d writes of %d entries to the Qdrant server at %s %s (ids %s%s; %s)",
            len(waiting),
            len(ids),
            self._connection.options.url,
            what,
            ", ".join(map(str, ids[:_MOST_NAMED])),
            " and more" if len(ids) > _MOST_NAMED else "",
            waiting[-1].problem,
        )


def _may_be_half_done(error: BaseException, *, begun: bool) -> bool:
    """Whether writes that ended so are to be finished; `begun`: parts before them were acknowledged."""
    if isinstance(error, CollectionClosed):
        return False
    if not isinstance(error, RoutingServiceError) or error.half_done:
        return True
    return begun and not isinstance(error, (BackendMisconfigured, ForeignCollection))


def _ids_of(request: Any) -> set[int]:
    return {number for number, _ in _versions(request)}


def _versions(request: Any) -> list[Version]:
    """What an upsert writes, or a deletion removes."""
    if isinstance(request, q.UpsertPoints):
        return [(point.id.num, _time_of(point)) for point in request.points]
    found: list[Version] = []
    for each in request.points.filter.should:
        ids, time_of_all = each.filter.must
        is_set = time_of_all.HasField("field")
        created = time_of_all.field.match.integer if is_set else None
        found += [(point.num, created) for point in ids.has_id.has_id]
    return found


def _of_points(request: Any, points: Sequence[Any]) -> Any:
    return q.UpsertPoints(
        collection_name=request.collection_name,
        wait=True,
        points=points,
        ordering=request.ordering,
    )


def version_of(point: Any) -> Version:
    """Of a point that was read with the time of its creation."""
    return point.id.num, _time_of(point) if _CREATED in point.payload else None


# What is read of a point for version_of().
TIME_ONLY = q.WithPayloadSelector(include=q.PayloadIncludeSelector(fields=[_CREATED]))


def _time_of(point: Any) -> int:
    return int(point.payload[_CREATED].integer_value) if _CREATED in point.payload else 0


def _exactly(versions: Sequence[Version]) -> list[Any]:
    """Conditions, one of which the points of these versions meet."""

    def made_at(created: int | None) -> Any:
        if created is None:
            return q.Condition(is_empty=q.IsEmptyCondition(key=_CREATED))
        match = q.Match(integer=created)
        return q.Condition(field=q.FieldCondition(key=_CREATED, match=match))

    return [_both(ids, made_at(created)) for created, ids in _by_time(versions)]


def _not_after(versions: Sequence[Version]) -> list[Any]:
    """Conditions, one of which the points of these ids meet that were made no later."""
    nothing = q.Condition(is_empty=q.IsEmptyCondition(key=_CREATED))
    conditions = []
    for created, ids in _by_time(versions):
        until = q.FieldCondition(key=_CREATED, range=q.Range(lte=float(created or 0)))
        conditions += [_both(ids, q.Condition(field=until)), _both(ids, nothing)]
    return conditions


def _by_time(versions: Sequence[Version]) -> list[tuple[int | None, list[int]]]:
    found: dict[int | None, list[int]] = {}
    for number, created in versions:
        found.setdefault(created, []).append(number)
    return list(found.items())


def _both(ids: Sequence[int], other: Any) -> Any:
    named = q.HasIdCondition(has_id=[q.PointId(num=number) for number in ids])
    return q.Condition(filter=q.Filter(must=[q.Condition(has_id=named), other]))


_REQUESTS = {UPSERT: q.UpsertPoints, DELETE: q.DeletePoints}


def _record(write: Write) -> Record:
    kind = UPSERT if isinstance(write.request, q.UpsertPoints) else DELETE
    return kind, write.number, write.rest().SerializeToString()

"""The server's own snapshots of collections: made, listed and removed over gRPC, read and restored over REST."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from router_service.backends.qdrant_server.connection import (
    ADMIN_TIMEOUT_S,
    WRITE_TIMEOUT_S,
    Connection,
)
from router_service.backends.qdrant_server.rest import UPLOAD, RestSide, SnapshotFile
from router_service.backends.qdrant_server.wire import q
from router_service.errors import (
    BackendMisconfigured,
    CollectionClosed,
    CorruptMemory,
    SnapshotInvalid,
    StorageError,
)

# Until the server has made a snapshot of one collection.
_CREATE_S = 3600.0
_LOOK_S = 0.02
# A cluster may need a moment until all of a restored collection answers.
_COUNT_S = 10.0

# Called while there is something to wait for; what it raises ends the work.
Tick = Callable[[], object]


class CollectionSnapshots:
    """Names are those of collections, not of aliases. Raises StorageError. Safe to call from several threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def require_whole(self, collection: str) -> None:
        """Raises BackendMisconfigured when the node that is asked does not hold all shards of a collection."""
        request = q.CollectionClusterInfoRequest(collection_name=collection)
        found = self._call("collections", "CollectionClusterInfo", request)
        here = {each.shard_id for each in found.local_shards if each.state == q.ReplicaState.Active}
        missing = {each.shard_id for each in (*found.local_shards, *found.remote_shards)} - here
        if missing:
            raise BackendMisconfigured(
                f"peer {found.peer_id} of the Qdrant cluster at {self._connection.options.url} has no active replica "
                f"of shards {sorted(missing)} of {collection!r}, and a Qdrant snapshot holds what one node holds; make "
                "Qdrant's own snapshots of each node, or copy the memory with `router-admin migrate --to DIR` or "
                "`router-admin export`"
            )

    def create(self, collection: str, tick: Tick) -> SnapshotFile:
        """A new snapshot. Ended by `tick`, or by time, the server may finish it nevertheless; see stray()."""
        request = q.CreateSnapshotRequest(collection_name=collection)
        call = self._connection.begin("snapshots", "Create", request, _CREATE_S)
        try:
            _wait_for(call.done, tick)
        except BaseException:
            call.cancel()
            raise
        with self._connection.failures(_CREATE_S):
            return _file(collection, call.result().snapshot_description)

    def list(self, collection: str) -> list[SnapshotFile]:
        """Those of a collection that is there."""
        request = q.ListSnapshotsRequest(collection_name=collection)
        reply = self._call("snapshots", "List", request)
        return [_file(collection, each) for each in reply.snapshot_descriptions]

    def require_listed(self, file: SnapshotFile) -> None:
        """Raises SnapshotInvalid unless the server still lists a snapshot as it was made."""
        for found in self.list(file.collection):
            if found.name == file.name:
                if found != file:
                    was, now = _described(file), _described(found)
                    raise SnapshotInvalid(
                        f"{file.name} of {file.collection!r} was {was}, the server now lists {now}; use another "
                        "snapshot"
                    )
                return
        raise SnapshotInvalid(
            f"the Qdrant server at {self._connection.options.url} has no snapshot {file.name} of {file.collection!r} "
            "any more (removed by others, or this is another node than the one that made it); use another snapshot"
        )

    def delete(self, collection: str, name: str) -> None:
        """No error when there is none of that name."""
        request = q.DeleteSnapshotRequest(collection_name=collection, snapshot_name=name)
        try:
            self._call("snapshots", "Delete", request)
        except CollectionClosed:  # what is not found
            return

    @contextmanager
    def reachable(self, collection: str) -> Iterator[None]:
        """Inside, the snapshots of a collection that was dropped can be listed, read and deleted.

        Qdrant keeps their files when a collection goes, and shows them while there is one of that name.
        """
        made = self._make_empty(collection)
        try:
            yield
        finally:
            if made:
                drop = q.DeleteCollection(collection_name=collection)
                self._call("collections", "Delete", drop)

    def read(self, file: SnapshotFile, tick: Callable[[int], object]) -> None:
        """See RestSide.read; `tick` gets the bytes so far."""
        rest = RestSide(self._connection)
        _in_thread(rest, lambda: rest.read(file), tick)

    def restore(self, file: SnapshotFile, target: str, tick: Callable[[int], object]) -> None:
        """See RestSide.copy; what the server keeps of the upload is removed."""
        rest = RestSide(self._connection)
        _in_thread(rest, lambda: rest.copy(file, target), tick)
        self.delete(target, UPLOAD)

    def count(self, collection: str) -> int:
        """Exact number of entries."""
        request = q.CountPoints(collection_name=collection, exact=True)
        return int(self._call("points", "Count", request).result.count)

    def require_count(self, collection: str, entries: int, tick: Tick) -> None:
        """Raises CorruptMemory unless a collection holds so many entries within a few seconds."""
        until, found = time.monotonic() + _COUNT_S, -1
        while found != entries:
            if time.monotonic() > until:
                problem = f"{collection!r} was restored with {found} entries, its snapshot has"
                raise CorruptMemory(f"{problem} {entries}; use another snapshot")
            if found >= 0:
                time.sleep(_LOOK_S)
            tick()
            found = self.count(collection)

    def _make_empty(self, collection: str) -> bool:
        """Whether there was none of that name."""
        if self._connection.exists(collection):
            return False
        nothing = q.VectorParams(size=1, distance=q.Distance.Euclid)
        request = q.CreateCollection(
            collection_name=collection,
            vectors_config=q.VectorsConfig(params=nothing),
            shard_number=1,
        )
        try:
            self._connection.call("collections", "Create", request, ADMIN_TIMEOUT_S, repeat=False)
        except StorageError:
            if not self._connection.exists(collection):  # another service may have been first
                raise
            return False
        return True

    def _call(self, service: str, method: str, request: Any) -> Any:
        timeout_s = ADMIN_TIMEOUT_S if method == "Delete" else WRITE_TIMEOUT_S
        return self._connection.call(service, method, request, timeout_s)


def _file(collection: str, described: Any) -> SnapshotFile:
    return SnapshotFile(collection, described.name, described.size, described.checksum)


def _described(file: SnapshotFile) -> str:
    return f"{file.content_bytes} bytes with sha256 {file.sha256 or 'not given'}"


def _in_thread(rest: RestSide, work: Callable[[], None], tick: Callable[[int], object]) -> None:
    with ThreadPoolExecutor(1, thread_name_prefix="snapshot-file") as pool:
        done = pool.submit(work)
        try:
            _wait_for(done.done, lambda: tick(rest.passed_bytes))
        except BaseException:
            rest.abort()
            raise
    done.result()


def _wait_for(done: Callable[[], bool], tick: Tick) -> None:
    tick()
    while not done():
        time.sleep(_LOOK_S)
        tick()

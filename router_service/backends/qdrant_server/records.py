"""Small records that services share: a point for each in a collection without vectors of use, its payload flat."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from router_service.backends.qdrant_server.connection import WRITE_TIMEOUT_S, Connection
from router_service.backends.qdrant_server.consensus import agree
from router_service.backends.qdrant_server.wire import q
from router_service.errors import CollectionExists, StorageError

log = logging.getLogger(__name__)

_PAGE = 256
_CHANGED = "changed"
# One node orders the writes of a record. With strong ordering none is written while the node is away that is to do so.
_ORDERED = q.WriteOrdering(type=q.WriteOrderingType.Medium)


class Records:
    """Payloads by key in the collection `name`, each with the time of its last change. Raises StorageError."""

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection, self.name = connection, name
        self._lock = threading.Lock()
        self._busy = Counter[str]()  # changes under way
        # By key, of changes that failed, perhaps half way: the times that they have in `changed`; 0: none.
        self._torn: dict[str, set[int]] = {}

    def ensure(self) -> None:
        """Makes the collection when it is not there."""
        if self.exist():
            return
        with suppress(CollectionExists):  # another service was first
            self._create()
        self.connection.wait_for(self.name)

    def exist(self) -> bool:
        """Whether the collection is there."""
        return self.connection.exists(self.name)

    def write(self, key: str, fields: Mapping[str, str], *, new: bool = False) -> None:
        """Puts a record in the place of the one with this key, if there is one; `new`: then that one stays.

        A server before 1.17 replaces it all the same.
        """
        payload = {name: q.Value(string_value=text) for name, text in fields.items()}
        changed = _now_ms()
        payload[_CHANGED] = q.Value(integer_value=changed)
        with self._changing(key, changed):
            self._put(key, payload, new=new)

    def mend(self) -> None:
        """Makes replicas of a record alike that a failed change left different: as the one is that answers.

        Called now and then; what cannot be done yet is left for the next time. What another service changes meanwhile
        stays (Qdrant 1.16 and later), unless it is made where there was none.
        """
        with self._lock:
            idle = [key for key in self._torn if not self._busy[key]]
        for key in idle:
            try:
                with self._changing(key) as torn:
                    found = self._point(key)
                    if found is None:
                        self._delete(key)
                    else:
                        self._put(key, found.payload, over=_not_after(found, torn))
            except StorageError as error:
                log.warning("a change of %s in %s is still half done: %s", key, self.name, error)

    @contextmanager
    def _changing(self, key: str, changed: int = 0) -> Iterator[set[int]]:
        """Around a change; yields the times of those before it that failed: once it is done, it has mended them."""
        with self._lock:
            self._busy[key] += 1
            torn = set(self._torn.get(key, ()))
        try:
            yield torn
        except BaseException:
            with self._lock:
                self._torn.setdefault(key, set()).add(changed)
            raise
        else:
            with self._lock:
                if left := self._torn.pop(key, set()) - torn:
                    self._torn[key] = left
        finally:
            with self._lock:
                self._busy[key] -= 1

    def _put(
        self,
        key: str,
        payload: Mapping[str, Any],
        *,
        new: bool = False,
        over: Any | None = None,
    ) -> None:
        """`new`: never over another record; `over`: only over those that a filter lets through."""
        vector = q.Vectors(vector=q.Vector(dense=q.DenseVector(data=[1.0])))
        request = q.UpsertPoints(
            collection_name=self.name,
            wait=True,
            points=[q.PointStruct(id=_point_id(key), vectors=vector, payload=payload)],
            ordering=_ORDERED,
            update_mode=q.UpdateMode.InsertOnly if new else None,
            update_filter=over,
        )
        self.connection.call("points", "Upsert", request, WRITE_TIMEOUT_S)

    def read(self, key: str, timeout_s: float = WRITE_TIMEOUT_S) -> dict[str, Any] | None:
        """The record with this key, or None."""
        found = self._point(key, timeout_s)
        return None if found is None else _plain(found)

    def _point(self, key: str, timeout_s: float = WRITE_TIMEOUT_S) -> Any | None:
        request = q.GetPoints(
            collection_name=self.name,
            ids=[_point_id(key)],
            with_payload=q.WithPayloadSelector(enable=True),
        )
        found = self.connection.call("points", "Get", request, timeout_s).result
        return found[0] if found else None

    def all(self) -> Iterator[dict[str, Any]]:
        """Every record."""
        offset = None
        while True:
            request = q.ScrollPoints(
                collection_name=self.name,
                offset=offset,
                limit=_PAGE,
                with_payload=q.WithPayloadSelector(enable=True),
            )
            page = self.connection.call("points", "Scroll", request, WRITE_TIMEOUT_S)
            yield from map(_plain, page.result)
            if not page.HasField("next_page_offset"):
                return
            offset = page.next_page_offset

    def remove(self, key: str) -> None:
        """No error when there is none with this key."""
        with self._changing(key):
            self._delete(key)

    def _delete(self, key: str) -> None:
        request = q.DeletePoints(
            collection_name=self.name,
            wait=True,
            points=q.PointsSelector(points=q.PointsIdsList(ids=[_point_id(key)])),
            ordering=_ORDERED,
        )
        self.connection.call("points", "Delete", request, WRITE_TIMEOUT_S)

    def _create(self) -> None:
        options = self.connection.options
        nothing = q.VectorParams(size=1, distance=q.Distance.Euclid)
        request = q.CreateCollection(
            collection_name=self.name,
            vectors_config=q.VectorsConfig(params=nothing),
            shard_number=None if options.shard_number is None else 1,
            replication_factor=options.replication_factor,
            write_consistency_factor=options.write_consistency_factor,
        )
        agree(self.connection, "collections", "Create", request, self.exist)


def age_ms(fields: Mapping[str, Any]) -> int:
    """Milliseconds since a record was written."""
    return _now_ms() - int(fields.get(_CHANGED, 0))


def _not_after(point: Any, torn: set[int]) -> Any:
    """The filter that lets through what is no newer than a record, or was changed at one of these times."""
    until = float(point.payload[_CHANGED].integer_value) if _CHANGED in point.payload else 0.0
    fields = [
        q.FieldCondition(key=_CHANGED, range=q.Range(lte=until)),
        *(q.FieldCondition(key=_CHANGED, match=q.Match(integer=each)) for each in torn),
    ]
    unmarked = q.Condition(is_empty=q.IsEmptyCondition(key=_CHANGED))
    return q.Filter(should=[*(q.Condition(field=each) for each in fields), unmarked])


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _point_id(key: str) -> Any:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return q.PointId(num=int.from_bytes(digest, "big") >> 1)


def _plain(point: Any) -> dict[str, Any]:
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in point.payload.items()}

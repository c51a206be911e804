"""A layer that nothing was written to yet: its collection has a name, and is made when its first entry comes.

On a cluster of which a node is away a collection takes seconds; so a new memory is a record, and no collection.
Whichever service writes first makes it. A note that it was made is written before the first entry, so that one that is
lost is told from one that never was.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from typing_extensions import override

from router_service.arrays import Entries
from router_service.backends.base import (
    Compression,
    Report,
    as_stored,
    say_nothing,
)
from router_service.backends.qdrant_server.collection import ServerCollection
from router_service.backends.qdrant_server.connection import Connection
from router_service.backends.qdrant_server.failures import Failure, Meaning, error_of
from router_service.backends.qdrant_server.wire import q
from router_service.errors import CollectionClosed

T = TypeVar("T")

# How long the nodes that are asked may take to learn of a collection that was made.
_LEARNS_S, _LOOK_S = 2.0, 0.05


class Making(Protocol):
    """What makes collections, and knows of those that were made. Raises StorageError."""

    def make(self, collection: str, alias: str, spec: Any) -> None:
        """On return it takes entries. Raises CollectionClosed when it is no memory's, or the memory is replaced now."""
        ...

    def was_made(self, collection: str, timeout_s: float) -> bool:
        """Whether it may have had entries."""
        ...

    def is_current(self, collection: str, alias: str, timeout_s: float) -> bool:
        """Whether it is that of a layer of the memory that an alias is made of."""
        ...


class UnwrittenCollection(ServerCollection):
    """Answers as an empty one until it is there; from then on it is as any other."""

    def __init__(
        self, making: Making, connection: Connection, name: str, alias: str, *rest: Any
    ) -> None:
        """`rest`: as of ServerCollection."""
        as_empty: Any = _AsEmpty(connection, self)
        super().__init__(as_empty, name, alias, *rest)
        self._making, self._made, self._first = making, False, threading.Lock()

    @override
    def upsert(self, entries: Entries, *, fsync: bool = False) -> None:
        self._require_open()
        if not self._made:
            as_stored(entries.keys, self._spec.metric, "keys")
            self.make()
        try:
            super().upsert(entries, fsync=fsync)
        except CollectionClosed:
            self._made = False
            raise

    def make(self) -> None:
        """On return it is there, if need be without entries. Raises StorageError."""
        with self._first:
            if not self._made:
                self._making.make(self.name, self.alias, self._spec)
                self._made = True

    @override
    def optimize(
        self, compression: Compression | None = None, report: Report = say_nothing
    ) -> None:
        """Without entries only another compression makes it: that stays."""
        info = self.info()
        if info.entries or compression not in (None, info.compression):
            self.make()
            super().optimize(compression, report)

    def or_empty(self, ask: Callable[[float], T], empty: Callable[[], T], timeout_s: float) -> T:
        """What `ask` returns, given the seconds left, or `empty` while the collection was never made.

        Raises CollectionClosed when it is no memory's any more, is lost, or the nodes asked do not learn of it in time;
        BackendUnavailable when `timeout_s` ends before one knows which.
        """
        began = time.monotonic()

        def left() -> float:
            if (left_s := began + timeout_s - time.monotonic()) > 0:
                return left_s
            late = Failure(Meaning.LATE, "DEADLINE_EXCEEDED", f"{self.name!r} is not there yet")
            raise error_of(late, self._options, timeout_s)

        while True:
            try:
                return ask(left())
            except CollectionClosed:
                if self.closed or not self._making.is_current(self.name, self.alias, left()):
                    raise
                if not self._making.was_made(self.name, left()):
                    return empty()
                if time.monotonic() >= began + _LEARNS_S:
                    raise
            time.sleep(min(_LOOK_S, left()))


class _AsEmpty:
    """A connection on which an unwritten collection is read as an empty one."""

    def __init__(self, connection: Connection, collection: UnwrittenCollection) -> None:
        self._connection, self._collection = connection, collection
        self.options, self.version = connection.options, connection.version
        self.begin = connection.begin

    def call(self, service: str, method: str, request: Any, timeout_s: float) -> Any:
        """See Connection."""
        own, alias = self._collection.name, self._collection.alias

        def ask(left_s: float) -> Any:
            reply = self._connection.call(service, method, request, left_s)
            if method == "ListCollectionAliases" and not reply.aliases:
                raise CollectionClosed(f"collection {own!r}, which was {alias!r},")
            return reply

        empty = _EMPTY.get((service, method))
        if empty is None:
            return ask(timeout_s)
        return self._collection.or_empty(ask, lambda: empty(request, alias), timeout_s)

    def together(
        self, service: str, method: str, requests: Sequence[Any], timeout_s: float
    ) -> list[Any]:
        """See Connection."""
        empty, alias = _EMPTY[service, method], self._collection.alias
        return self._collection.or_empty(
            lambda left_s: self._connection.together(service, method, requests, left_s),
            lambda: [empty(request, alias) for request in requests],
            timeout_s,
        )


_EMPTY: dict[tuple[str, str], Callable[[Any, str], Any]] = {
    ("points", "Get"): lambda *_: q.GetResponse(),
    ("points", "Scroll"): lambda *_: q.ScrollResponse(),
    ("points", "Count"): lambda *_: q.CountResponse(),
    ("points", "QueryBatch"): lambda request, _: q.QueryBatchResponse(
        result=[q.BatchResult() for _ in request.query_points]
    ),
    ("collections", "Get"): lambda *_: q.GetCollectionInfoResponse(),
    # The name leads to it, for it is to be made under that name.
    ("collections", "ListCollectionAliases"): lambda _, alias: q.ListAliasesResponse(
        aliases=[q.AliasDescription(alias_name=alias)]
    ),
}

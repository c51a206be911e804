"""A layer that nothing was written to yet: its collection has a name, and is made when its first entry comes.

On a cluster of which a node is away a collection takes seconds; so a new memory is a record, and no collection.
Whichever service writes first makes it. A note that it was made is written before the first entry, so that one that is
lost is told from one that never was.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from typing_extensions import override

from router_service.arrays import F32, Entries, ExampleRef, Neighbours
from router_service.backends.base import (
    Compression,
    Report,
    SearchOptions,
    as_stored,
    say_nothing,
)
from router_service.backends.qdrant_server.collection import ServerCollection
from router_service.backends.qdrant_server.connection import Connection
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

    def was_made(self, collection: str) -> bool:
        """Whether it may have had entries."""
        ...

    def is_current(self, collection: str, alias: str) -> bool:
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
    def search(
        self, queries: F32, k: int, options: SearchOptions, exclude: Sequence[ExampleRef] = ()
    ) -> Neighbours:
        ask, version = super().search, self.versions.now
        nothing = replace(
            Neighbours.empty(len(queries), k, self._spec.value_width), version=version
        )
        return self.or_empty(lambda: ask(queries, k, options, exclude), lambda: nothing)

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

    def or_empty(self, ask: Callable[[], T], empty: Callable[[], T]) -> T:
        """What `ask` returns, or `empty` while the collection was never made.

        Raises CollectionClosed when it is no memory's any more, is lost, or the nodes asked do not learn of it in time.
        """
        until = time.monotonic() + min(_LEARNS_S, self._options.timeout_s)
        while True:
            try:
                return ask()
            except CollectionClosed:
                if self.closed or not self._making.is_current(self.name, self.alias):
                    raise
                if not self._making.was_made(self.name):
                    return empty()
                if time.monotonic() >= until:
                    raise
            time.sleep(_LOOK_S)


class _AsEmpty:
    """A connection on which an unwritten collection is read as an empty one."""

    def __init__(self, connection: Connection, collection: UnwrittenCollection) -> None:
        self._connection, self._collection = connection, collection
        self.options, self.version = connection.options, connection.version
        self.begin, self.together = connection.begin, connection.together

    def call(self, service: str, method: str, request: Any, timeout_s: float) -> Any:
        """See Connection."""

        def ask() -> Any:
            reply = self._connection.call(service, method, request, timeout_s)
            if method == "ListCollectionAliases" and not reply.aliases:
                raise CollectionClosed(
                    f"collection {self._collection.name!r}, which was {self._collection.alias!r},"
                )
            return reply

        empty = _EMPTY.get((service, method))
        if empty is None:
            return ask()
        return self._collection.or_empty(ask, partial(empty, request, self._collection.alias))


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

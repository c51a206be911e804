"""Aliases that change places: what collections are called when a memory takes the place of another."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from router_service.backends.base import CollectionSpec, require_name
from router_service.backends.qdrant_server import messages
from router_service.backends.qdrant_server.collection import ServerCollection
from router_service.backends.qdrant_server.connection import (
    ADMIN_TIMEOUT_S,
    WRITE_TIMEOUT_S,
    Connection,
)
from router_service.backends.qdrant_server.wire import q
from router_service.errors import CorruptMemory, ForeignCollection, StorageError

# What a name led to before has this alias beside that of the name, so that it is found after a crash.
_REPLACED = "~~replaced"


def replaced(alias: str) -> str:
    """The alias of the collection that an alias led to before it was moved."""
    return f"{alias}{_REPLACED}"


def moved(moves: Mapping[str, str], aliases: Mapping[str, str]) -> list[Any]:
    """Actions of one UpdateAliases: each alias leads to where another one leads, which goes.

    The last action makes an alias that was not there. `aliases`: all there are, with what they lead to. Nothing for a
    move whose other alias is not there.
    """
    actions = []
    for alias, other in moves.items():
        if other in aliases:
            actions += [delete(alias), delete(other), _create(alias, aliases[other])]
            if alias in aliases:
                actions.append(_create(replaced(alias), aliases[alias]))
    return actions


def delete(alias: str) -> Any:
    """The action that removes an alias, if it is there."""
    return q.AliasOperations(delete_alias=q.DeleteAlias(alias_name=alias))


def _create(alias: str, collection: str) -> Any:
    create = q.CreateAlias(collection_name=collection, alias_name=alias)
    return q.AliasOperations(create_alias=create)


# As in the embedded backend.
_HNSW_LINKS = 24
_HNSW_BUILD_EF = 128
_GENERATION = "~~"


class ServerBackend:
    """See Backend. Safe to call from several threads; several services may use one server."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._options = connection.options
        self._open: dict[str, ServerCollection] = {}
        self._lock = threading.Lock()

    @property
    def version(self) -> str:
        """Of the server, e.g. 1.20.0."""
        return self.connection.version

    def create(self, name: str, spec: CollectionSpec) -> ServerCollection:
        """See Backend.create."""
        alias = self._alias(name)
        if self._collection_behind(alias) is not None:
            raise StorageError(f"the server already holds a collection {alias!r}")
        collection = self._create_unnamed(name, spec)
        self.publish({name: collection})
        self.connection.wait_for(alias)
        return self._opened(name, alias, spec)

    def _create_unnamed(self, name: str, spec: CollectionSpec) -> str:
        """A new collection that is not yet what `name` leads to; see publish(). Returns its own name."""
        collection, options = self.fresh_name(name), self._options
        request = q.CreateCollection(
            collection_name=collection,
            vectors_config=messages.vector_params(spec, options.on_disk),
            hnsw_config=q.HnswConfigDiff(m=_HNSW_LINKS, ef_construct=_HNSW_BUILD_EF),
            shard_number=options.shard_number,
            replication_factor=options.replication_factor,
            write_consistency_factor=options.write_consistency_factor,
        )
        self._call("collections", "Create", request, repeat=False)
        self.connection.wait_for(collection)
        self.index_fields(collection)
        return collection

    def fresh_name(self, name: str) -> str:
        """What a new collection for `name` is to be called."""
        moment = f"{time.time_ns() // 1_000_000:x}{secrets.token_hex(2)}"
        return f"{self._alias(name)}{_GENERATION}{moment}"

    def index_fields(self, collection: str) -> None:
        """Sees to it that entries are found by source and example."""
        for field in ("source", "example"):
            index = q.CreateFieldIndexCollection(
                collection_name=collection,
                wait=True,
                field_name=field,
                field_type=q.FieldType.FieldTypeKeyword,
                field_index_params=_keyword_index(self._options.on_disk),
            )
            self._call("points", "CreateFieldIndex", index)

    def behind(self, names: Iterable[str]) -> dict[str, str]:
        """What names lead to at the moment; those that lead nowhere are left out."""
        aliases = self._aliases()
        return {name: aliases[alias] for name in names if (alias := self._alias(name)) in aliases}

    def unled(self, collections: Iterable[str]) -> list[str]:
        """Those of these collections that are there, and that no alias of the server leads to."""
        led = set(self._aliases().values())
        reply = self._call("collections", "List", q.ListCollectionsRequest())
        there = {each.name for each in reply.collections}
        return [each for each in collections if each in there - led]

    def publish(self, collections: dict[str, str]) -> list[str]:
        """Lets names lead to collections from one call to the next; returns those that they led to, to be dropped."""
        aliases = self._aliases()
        actions, replaced = [], []
        for name, collection in collections.items():
            alias = self._alias(name)
            if (before := aliases.get(alias)) is not None:
                delete = q.AliasOperations(delete_alias=q.DeleteAlias(alias_name=alias))
                actions.append(delete)
                replaced.append(before)
            create = q.CreateAlias(collection_name=collection, alias_name=alias)
            actions.append(q.AliasOperations(create_alias=create))
        self._call("collections", "UpdateAliases", q.ChangeAliases(actions=actions))
        return replaced

    @contextmanager
    def held(self, collections: Mapping[str, str]) -> Iterator[None]:
        """Open collections of these names ask the collections given, whatever their names lead to from now on.

        For good, unless the inside raises: see opened_anew().
        """
        with self._lock:
            held = {name: self._open[name] for name in collections if name in self._open}
        for name, each in held.items():
            each.ask(collections[name])
        try:
            yield
        except BaseException:
            for name, each in held.items():
                each.ask(self._alias(name))
            raise

    def opened_anew(self, name: str, spec: CollectionSpec) -> ServerCollection:
        """What a name leads to now, beside what was opened before and is held."""
        return self._opened(name, self._alias(name), spec)

    @contextmanager
    def swapping(self, names: Mapping[str, str]) -> Iterator[None]:
        """See Renaming.swapping; one call moves every alias."""
        moves = {self._alias(name): self._alias(other) for name, other in names.items()}
        for name in names:
            self.drop_replaced(name)
        aliases = self._aliases()
        both = [*names, *names.values()]
        with self.held({name: aliases[a] for name in both if (a := self._alias(name)) in aliases}):
            if actions := moved(moves, aliases):
                self._call("collections", "UpdateAliases", q.ChangeAliases(actions=actions))
                self.connection.wait_for(actions[-1].create_alias.alias_name)
            yield
        self._follow(names)

    def _follow(self, names: Mapping[str, str]) -> None:
        """Open collections of the other names have the names; what had them stays where it is until it is closed."""
        with self._lock:
            for name, other in names.items():
                if self._open_now(other) is not None:
                    self._open[name] = self._open.pop(other)
                if (each := self._open_now(name)) is not None:
                    each.ask(self._alias(name))

    def drop_replaced(self, name: str) -> None:
        """See Renaming.drop_replaced."""
        aliases = self._aliases()
        collection = aliases.pop(replaced(self._alias(name)), None)
        if collection is not None and collection not in aliases.values():
            self.drop_unnamed(collection)

    def drop_unnamed(self, collection: str) -> None:
        """Removes a collection that no name leads to. No error when it is not there."""
        self._call("collections", "Delete", q.DeleteCollection(collection_name=collection))

    def open(self, name: str, spec: CollectionSpec) -> ServerCollection:
        """See Backend.open. Raises ForeignCollection on another dimension or distance."""
        alias = self._alias(name)
        with self._lock:
            self._require_closed(name, f"collection {name!r} is already open")
        if self._collection_behind(alias) is None:
            for leftover in self._of_that_name(alias):
                self.require_spec(leftover, spec)
            raise CorruptMemory(
                f"the server at {self._options.url} has no collection {alias!r}; restore the memory from a snapshot, "
                "or delete it"
            )
        self.require_spec(alias, spec)
        return self._opened(name, alias, spec)

    def drop(self, name: str) -> None:
        """See Backend.drop."""
        alias = self._alias(name)
        with self._lock:
            self._require_closed(name, f"collection {name!r} is open; close it before dropping it")
            self._open.pop(name, None)
        # Collections first: one that was another memory's is found by the alias only.
        aliases = self._aliases()
        own = {aliases.pop(each) for each in (alias, replaced(alias)) if each in aliases}
        for collection in sorted({*own, *self._generations(alias)} - set(aliases.values())):
            self.drop_unnamed(collection)
        if self._collection_behind(alias) is not None:
            actions = [delete(alias)]
            self._call("collections", "UpdateAliases", q.ChangeAliases(actions=actions))

    def close(self) -> None:
        """See Backend.close."""
        with self._lock:
            for collection in self._open.values():
                collection.close()
        self.connection.close()

    def _opened(self, name: str, alias: str, spec: CollectionSpec) -> ServerCollection:
        collection = ServerCollection(self.connection, alias, spec)
        with self._lock:
            self._open[name] = collection
        return collection

    def _open_now(self, name: str) -> ServerCollection | None:
        found = self._open.get(name)
        return found if found is not None and not found.closed else None

    def _require_closed(self, name: str, problem: str) -> None:
        if name in self._open and not self._open[name].closed:
            raise StorageError(problem)

    def require_spec(self, collection: str, spec: CollectionSpec) -> None:
        """Raises ForeignCollection on another dimension or distance."""
        request = q.GetCollectionInfoRequest(collection_name=collection)
        params = self._call("collections", "Get", request).result.config.params
        vectors = params.vectors_config.params
        found = vectors.size, messages.METRICS.get(vectors.distance)
        if found != (spec.dimension, spec.metric):
            distance = q.Distance.Name(vectors.distance)
            raise ForeignCollection(
                f"collection {collection!r} of the server at {self._options.url} has dimension {vectors.size} and "
                f"distance {distance}, expected {spec.dimension} and {spec.metric.value}: another program's, or "
                "another model's; choose another --qdrant-prefix (ROUTER_SERVICE_QDRANT_PREFIX), or remove it"
            )

    def _alias(self, name: str) -> str:
        require_name(name)
        return f"{self._options.prefix}~{name.replace('/', '~')}"

    def _aliases(self) -> dict[str, str]:
        """Alias -> collection, of the whole server."""
        reply = self._call("collections", "ListAliases", q.ListAliasesRequest())
        return {each.alias_name: each.collection_name for each in reply.aliases}

    def _collection_behind(self, alias: str) -> str | None:
        return self._aliases().get(alias)

    def _generations(self, alias: str) -> list[str]:
        """Every collection made for an alias, whether it leads there or not."""
        return [each for each in self._of_that_name(alias) if each != alias]

    def _of_that_name(self, alias: str) -> list[str]:
        """Those, and a collection in the alias's own place, which is another program's."""
        reply = self._call("collections", "List", q.ListCollectionsRequest())
        names = [each.name for each in reply.collections]
        return sorted(n for n in names if n == alias or n.startswith(f"{alias}{_GENERATION}"))

    def _call(self, service: str, method: str, request: Any, *, repeat: bool = True) -> Any:
        quick = method in ("Get", "List", "ListAliases")
        timeout_s = WRITE_TIMEOUT_S if quick else ADMIN_TIMEOUT_S
        return self.connection.call(service, method, request, timeout_s, repeat=repeat)


def _keyword_index(on_disk: bool | None) -> Any:
    """For exclusions and for forgetting: links of its own in the graph would cost time, RAM 95 bytes per entry."""
    keyword = q.KeywordIndexParams(enable_hnsw=False, on_disk=on_disk)
    return q.PayloadIndexParams(keyword_index_params=keyword)

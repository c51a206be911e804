"""A Qdrant server as a backend: a collection per layer behind an alias, and aliases that change in a swap.

Open collections ask by a collection's own name, so that an answer is of one memory whatever becomes of aliases. The
alias is the name by which it is found, and says whether it is still written to.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from typing_extensions import override

from router_service.backends.base import Backend, CollectionSpec, Pinning, Renaming, require_name
from router_service.backends.qdrant_server import messages
from router_service.backends.qdrant_server.collection import ServerCollection
from router_service.backends.qdrant_server.connection import (
    ADMIN_TIMEOUT_S,
    WRITE_TIMEOUT_S,
    Connection,
)
from router_service.backends.qdrant_server.consensus import agree
from router_service.backends.qdrant_server.records import Records
from router_service.backends.qdrant_server.unfinished_writes import UnfinishedWrites
from router_service.backends.qdrant_server.unwritten import UnwrittenCollection
from router_service.backends.qdrant_server.wire import REPLACED, q
from router_service.errors import (
    CollectionClosed,
    CollectionExists,
    CorruptMemory,
    ForeignCollection,
    StorageError,
)


def replaced(alias: str) -> str:
    """The alias of the collection that an alias led to before it was moved."""
    return f"{alias}{REPLACED}"


def moved(
    moves: Mapping[str, str],
    own: Mapping[str, str],
    aliases: Mapping[str, str],
    collections: Collection[str],
) -> list[Any]:
    """Actions of one UpdateAliases: each alias leads to the collection that another one leads to, which goes.

    `own`: by alias, what each is to lead to; where it is not there, which is not yet made, the alias goes. What an
    alias led to before has its replaced(). `aliases`, `collections`: all there are. Nothing where that is done already.
    """
    actions = []
    for alias, other in moves.items():
        target, before = own.get(alias, aliases.get(other)), aliases.get(alias)
        if target is None:
            continue
        # What is applied a second time, late, must not leave an alias out: so it is not deleted before it is made.
        if before != target:
            made = target in collections
            actions += [_create(alias, target) if made else delete(alias)]
            actions += [] if before is None else [_create(replaced(alias), before)]
        if other in aliases:
            actions.append(delete(other))
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
_FIELDS = ("source", "example")
# In the own name of a collection that is made when its first entry comes.
_LATER = "later-"
# Layers, each of which a cluster takes a while for.
_AT_ONCE = 64


class ServerBackend(Backend, Renaming, Pinning):
    """Safe to call from several threads; several services may use one server."""

    def __init__(self, connection: Connection, directory: Path | None = None) -> None:
        """`directory`: where it is noted which writes are unfinished; None: in RAM only."""
        self.connection = connection
        self._options = connection.options
        self._open: dict[str, ServerCollection] = {}
        self._lock = threading.Lock()
        self._unfinished = UnfinishedWrites(connection, directory, self._changed)
        # A record for each planned collection that was made; the catalogue of memories makes their collection.
        self.made = Records(connection, f"{connection.options.prefix}~layers")
        # Whether the memory of that name has a collection; and, if asked, is not about to be replaced.
        self.owned: Callable[[str, str, bool, float], bool] = lambda *_: True
        # Whether any memory has that collection, or is about to get it.
        self.named: Callable[[str], bool] = lambda collection: False
        # By name, the collections that the memory of that name has, or is about to get.
        self.due: Callable[[str], Mapping[str, str]] = lambda memory: {}

    @property
    def version(self) -> str:
        """Of the server, e.g. 1.20.0."""
        return self.connection.version

    @override
    def create(self, name: str, spec: CollectionSpec) -> ServerCollection:
        alias = self._alias(name)
        if alias in self._aliases():
            raise CollectionExists(
                f"the Qdrant server already holds a collection {alias!r}, another service may be making the memory: "
                "try again, or choose another name"
            )
        collection = self.fresh_name(name)
        self.create_unnamed(collection, spec)
        self.publish({name: collection})
        self.connection.wait_for(alias)
        return self._opened(name, spec, collection)

    def create_unnamed(self, collection: str, spec: CollectionSpec) -> None:
        """A new collection of that own name, see fresh_name(), to which no name leads yet; see publish()."""
        self._create(collection, spec)
        self.index_fields(collection)

    def _create(self, collection: str, spec: CollectionSpec) -> None:
        options = self._options
        request = q.CreateCollection(
            collection_name=collection,
            vectors_config=messages.vector_params(spec, options.on_disk),
            hnsw_config=q.HnswConfigDiff(m=_HNSW_LINKS, ef_construct=_HNSW_BUILD_EF),
            shard_number=options.shard_number,
            replication_factor=options.replication_factor,
            write_consistency_factor=options.write_consistency_factor,
        )
        # Who else uses this name means the same: one that is there was made by a try before, or by another service.
        with suppress(CollectionExists):
            agree(
                self.connection,
                "collections",
                "Create",
                request,
                lambda: self.connection.exists(collection),
            )
        self.connection.wait_for(collection)

    def fresh_name(self, name: str) -> str:
        """What a new collection for `name` is to be called."""
        moment = f"{time.time_ns() // 1_000_000:x}{secrets.token_hex(2)}"
        return f"{self._alias(name)}{_GENERATION}{moment}"

    @override
    def planned(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(
            self.fresh_name(name).replace(_GENERATION, f"{_GENERATION}{_LATER}") for name in names
        )

    def make(self, collection: str, alias: str, spec: CollectionSpec) -> None:
        """See Making. What a kill leaves of it the next call goes on with."""
        made, led = self.was_made(collection), self._aliases().get(alias) == collection
        if made and led:
            return
        try:
            self._make(collection, alias, spec, made=made, led=led)
        except CollectionClosed:
            self._give_back(collection, alias, made=made)
            raise
        if not made:
            self.made.write(collection, {"collection": collection})

    def _make(
        self, collection: str, alias: str, spec: CollectionSpec, *, made: bool, led: bool
    ) -> None:
        self._require_settled(collection, alias)
        if not made:
            self._create(collection, spec)
        steps = [] if made else [partial(self._index_field, collection, each) for each in _FIELDS]
        if not led:
            steps.append(partial(self._change_aliases, [_create(alias, collection)]))
        self.together(steps)
        self.connection.wait_for(alias)
        # Who begins to replace the memory after this finds the alias.
        self._require_settled(collection, alias)

    def _give_back(self, collection: str, alias: str, *, made: bool) -> None:
        """Undoes make() when the memory has got other collections meanwhile: its alias leads to the one it has."""
        due = self.due(self._memory_of(alias))
        own = next((own for name, own in due.items() if self._alias(name) == alias), None)
        if own == collection:
            return
        if self._aliases().get(alias) == collection:
            there = own is not None and self.connection.exists(own)
            self._change_aliases([_create(alias, own) if own and there else delete(alias)])
        if not made and not self.was_made(collection) and not self.named(collection):
            for each in self.unled([collection]):
                self.drop_unnamed(each)

    def was_made(self, collection: str, timeout_s: float = WRITE_TIMEOUT_S) -> bool:
        """See Making."""
        return self.made.read(collection, timeout_s) is not None

    def is_current(self, collection: str, alias: str, timeout_s: float) -> bool:
        """See Making."""
        return self.owned(self._memory_of(alias), collection, False, timeout_s)

    def _require_settled(self, collection: str, alias: str) -> None:
        if not self.owned(self._memory_of(alias), collection, True, WRITE_TIMEOUT_S):
            raise CollectionClosed(f"collection {collection!r}, which was {alias!r},")

    def _memory_of(self, alias: str) -> str:
        return alias.removeprefix(f"{self._options.prefix}~").split("~")[0]

    def index_fields(self, collection: str) -> None:
        """Sees to it that entries are found by source and example."""
        self.together([partial(self._index_field, collection, field) for field in _FIELDS])

    def _index_field(self, collection: str, field: str) -> None:
        index = q.CreateFieldIndexCollection(
            collection_name=collection,
            wait=True,
            field_name=field,
            field_type=q.FieldType.FieldTypeKeyword,
            field_index_params=_keyword_index(self._options.on_disk),
        )
        info = q.GetCollectionInfoRequest(collection_name=collection)
        agree(
            self.connection,
            "points",
            "CreateFieldIndex",
            index,
            lambda: field in self._call("collections", "Get", info).result.payload_schema,
        )

    def together(self, steps: Sequence[Callable[[], None]]) -> None:
        """Takes steps side by side, for a cluster makes each wait. Raises the first error after all have ended."""
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="collections") as pool:
            taken = [pool.submit(step) for step in steps]
        for each in taken:
            each.result()

    @override
    def behind(self, names: Iterable[str]) -> dict[str, str]:
        aliases = self._aliases()
        return {name: aliases[alias] for name in names if (alias := self._alias(name)) in aliases}

    def unled(self, collections: Iterable[str]) -> list[str]:
        """Those of these collections that are there, and that no alias of the server leads to."""
        led = set(self._aliases().values())
        there = self._collections() - led
        return [each for each in collections if each in there]

    def publish(self, collections: dict[str, str]) -> list[str]:
        """Lets names lead to collections from one call to the next; returns those that they led to, to be dropped."""
        aliases = self._aliases()
        leads = {self._alias(name): collection for name, collection in collections.items()}
        self._change_aliases([_create(alias, own) for alias, own in leads.items()])
        return [before for alias in leads if (before := aliases.get(alias)) is not None]

    @override
    def rename(self, names: Mapping[str, str], own: Sequence[str] = ()) -> None:
        """One call moves every alias."""
        moves = {self._alias(name): self._alias(other) for name, other in names.items()}
        targets = dict(zip(moves, own, strict=True)) if own else {}
        actions = moved(moves, targets, self._aliases(), self._collections())
        if actions:
            left = [each for each in names if replaced(self._alias(each)) in self._aliases()]
            self.drop_replaced(left)  # of a swap before this one
            self._change_aliases(actions)
            made = [each.create_alias for each in actions if each.HasField("create_alias")]
            if made:
                self.connection.wait_for(made[-1].alias_name)
        with self._lock:
            for name, other in names.items():
                if (each := self._open.pop(other, None)) is not None:
                    each.alias = self._alias(name)
                    self._open[name] = each

    @override
    def drop_replaced(self, names: Iterable[str]) -> None:
        aliases = self._aliases()
        found = [aliases.pop(replaced(self._alias(name)), None) for name in names]
        gone = {each for each in found if each is not None} - set(aliases.values())
        self.together([partial(self.drop_unnamed, each) for each in sorted(gone)])

    def drop_unnamed(self, collection: str) -> None:
        """Removes a collection that no name leads to. No error when it is not there."""
        request = q.DeleteCollection(collection_name=collection)
        agree(
            self.connection,
            "collections",
            "Delete",
            request,
            lambda: not self.connection.exists(collection),
        )
        if _is_planned(collection):
            self.made.remove(collection)

    def forget_lost(self, collections: Iterable[str]) -> None:
        """Of those that no memory has any more, removes the notes that they were made, where they are not there."""
        planned = list(filter(_is_planned, collections))
        there = self._collections() if planned else set()
        for each in planned:
            if each not in there:
                self.made.remove(each)

    @override
    def open(self, name: str, spec: CollectionSpec) -> ServerCollection:
        """Raises ForeignCollection on another dimension or distance."""
        alias = self._alias(name)
        with self._lock:
            self._require_closed(name, f"collection {name!r} is already open")
        if (led := self.behind([name]).get(name)) is None:
            raise self._missing(name, spec, alias)
        return self.open_behind(name, spec, led)

    @override
    def open_behind(self, name: str, spec: CollectionSpec, collection: str) -> ServerCollection:
        """Raises ForeignCollection on another dimension or distance."""
        try:
            self.require_spec(collection, spec)
        except CollectionClosed:
            if not _is_planned(collection) or self.was_made(collection):
                raise self._missing(name, spec, collection) from None
        return self._opened(name, spec, collection)

    def _missing(self, name: str, spec: CollectionSpec, collection: str) -> CorruptMemory:
        """Raises ForeignCollection when what is called as the name is may be another program's."""
        for leftover in self._of_that_name(self._alias(name)):
            with suppress(CollectionClosed):  # gone meanwhile
                self.require_spec(leftover, spec)
        return CorruptMemory(
            f"the server at {self._options.url} has no collection {collection!r}; restore the memory from a snapshot, "
            "or delete it"
        )

    @override
    def drop(self, name: str) -> None:
        alias = self._alias(name)
        with self._lock:
            self._require_closed(name, f"collection {name!r} is open; close it before dropping it")
            self._open.pop(name, None)
        # Collections first: one that was another memory's is found by the alias only.
        aliases = self._aliases()
        own = {aliases.pop(each) for each in (alias, replaced(alias)) if each in aliases}
        for collection in sorted({*own, *self._of_that_name(alias)} - {alias, *aliases.values()}):
            self.drop_unnamed(collection)
        if alias in self._aliases():
            self._change_aliases([delete(alias)])

    @override
    def close(self) -> None:
        with self._lock:
            for collection in self._open.values():
                collection.close()
        self._unfinished.stop()
        self.connection.close()
        self._unfinished.close()

    def _changed(self, collection: str) -> None:
        """What lookups see of a collection has become another state."""
        with self._lock:
            opened = list(self._open.values())
        for each in opened:
            if each.name == collection:
                each.versions.advance()

    def unopened(self, name: str, spec: CollectionSpec, collection: str) -> ServerCollection:
        """The collection of that own name, to which `name` is to lead; close() leaves it alone."""
        return ServerCollection(
            self.connection, collection, self._alias(name), spec, self._unfinished
        )

    def _opened(self, name: str, spec: CollectionSpec, collection: str) -> ServerCollection:
        rest = self.connection, collection, self._alias(name), spec, self._unfinished
        planned = _is_planned(collection)
        opened = UnwrittenCollection(self, *rest) if planned else ServerCollection(*rest)
        with self._lock:
            self._open[name] = opened
        return opened

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

    def _change_aliases(self, actions: Sequence[Any]) -> None:
        wanted: dict[str, str | None] = {}
        for action in actions:
            if action.HasField("create_alias"):
                wanted[action.create_alias.alias_name] = action.create_alias.collection_name
            else:
                wanted[action.delete_alias.alias_name] = None

        def done() -> bool:
            aliases = self._aliases()
            return all(aliases.get(alias) == own for alias, own in wanted.items())

        request = q.ChangeAliases(actions=actions)
        agree(self.connection, "collections", "UpdateAliases", request, done)

    def uncopied(self) -> list[str]:
        """Collections of this prefix that a cluster of several nodes keeps fewer copies of than it is to, or one."""
        if not self.connection.nodes.several:
            return []
        wanted, prefix = max(2, self._options.replication_factor or 2), f"{self._options.prefix}~"
        found: list[str] = []

        def look(name: str) -> None:
            with suppress(CollectionClosed):  # gone meanwhile
                request = q.GetCollectionInfoRequest(collection_name=name)
                params = self._call("collections", "Get", request).result.config.params
                if params.replication_factor < wanted:
                    found.append(name)

        own = [each for each in self._collections() if each.startswith(prefix)]
        self.together([partial(look, each) for each in own])
        return sorted(found)

    def _collections(self) -> set[str]:
        """Of the whole server."""
        reply = self._call("collections", "List", q.ListCollectionsRequest())
        return {each.name for each in reply.collections}

    def _of_that_name(self, alias: str) -> list[str]:
        """Every collection made for an alias, and one that is called as the alias is: another program's."""
        own = f"{alias}{_GENERATION}"
        return sorted(name for name in self._collections() if name == alias or name.startswith(own))

    def _call(self, service: str, method: str, request: Any) -> Any:
        quick = method in ("Get", "List", "ListAliases")
        timeout_s = WRITE_TIMEOUT_S if quick else ADMIN_TIMEOUT_S
        return self.connection.call(service, method, request, timeout_s)


def _is_planned(collection: str) -> bool:
    """Whether a collection is made when its first entry comes."""
    return f"{_GENERATION}{_LATER}" in collection


def _keyword_index(on_disk: bool | None) -> Any:
    """For exclusions and for forgetting: links of its own in the graph would cost time, RAM 95 bytes per entry."""
    keyword = q.KeywordIndexParams(enable_hnsw=False, on_disk=on_disk)
    return q.PayloadIndexParams(keyword_index_params=keyword)

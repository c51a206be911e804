"""Reads over all shards of a collection: which replicas are asked, and how their answers become one."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

import qdrant_edge as qe

from router_service.backends.qdrant_server.wire import q as pb
from tests.qdrant_standin.cluster import resolve
from tests.qdrant_standin.cluster.errors import (
    is_transient,
    refused,
    service_error,
    shown,
    silent,
)
from tests.qdrant_standin.cluster.members import Members
from tests.qdrant_standin.cluster.network import Link, Session
from tests.qdrant_standin.cluster.state import Replica, ReplicaSet, ShardedCollection
from tests.qdrant_standin.errors import ApiError, unimplemented

_ASCENDING = (pb.Euclid, pb.Manhattan)
_Read = Callable[[Replica], Any]


class Reader:
    """Reads of one call at one node."""

    def __init__(
        self,
        members: Members,
        session: Session,
        collection: ShardedCollection,
        consistency: pb.ReadConsistency,
    ) -> None:
        self._members, self._session, self._collection = members, session, collection
        self._consistency = consistency

    def of_shards(self, read: _Read, merge: Callable[[list[Any], bool], Any]) -> list[Any]:
        """The answer of each shard; `merge` makes one of those of several replicas."""
        return self._members.network.side_by_side(
            lambda replicas: self._resolved(replicas, read, merge), self._collection.shards
        )

    def infos(self) -> list[pb.CollectionInfo]:
        """What each shard says of itself, of one replica whatever the consistency."""
        return self._members.network.side_by_side(
            lambda replicas: self._gather(replicas, lambda each: each.collection.info(), 1)[0],
            self._collection.shards,
        )

    def _resolved(self, replicas: ReplicaSet, read: _Read, merge: Any) -> Any:
        me = self._session.node.id
        wanted, majority = resolve.required(self._consistency, len(replicas.states))
        active = sum(map(replicas.readable, replicas.states))
        initializing = sum(map(replicas.initializing, replicas.states))
        if active + initializing < wanted:
            raise service_error(
                f"The replica set for shard {replicas.shard} on peer {me} "
                "does not have enough active replicas"
            )
        if active < wanted:
            wanted = max(wanted - initializing, active)
        answers = self._gather(replicas, read, wanted)
        return answers[0] if len(answers) == 1 else merge(answers, majority) if answers else None

    def _gather(self, replicas: ReplicaSet, read: _Read, wanted: int) -> list[Any]:
        """So many answers: the own replica first, else two others at once, and a further one for each failure."""
        me = self._session.node.id
        others = [peer for peer in replicas.states if peer != me and replicas.readable(peer)]
        random.shuffle(others)
        own = [me] if replicas.readable(me) else []
        left = deque([*own, *others])
        asked: dict[int, float] = {}
        answers: list[Any] = []
        errors: list[ApiError] = []

        def ask(count: int) -> None:
            for _ in range(min(count, len(left))):
                asked[left.popleft()] = time.monotonic() + self._members.answer_s

        ask(wanted + self._fan_out(bool(own)))
        while asked and len(answers) + len(asked) >= wanted:
            seen = self._members.network.version
            for peer in list(asked):
                error = self._try(replicas, peer, asked[peer], read, answers)
                if error is None:
                    continue
                del asked[peer]
                if isinstance(error, ApiError):
                    errors.append(error)
                    ask(1)
                elif len(answers) >= wanted:
                    return answers
            if asked and not any(self._open(peer) for peer in asked):
                self._session.wait_for_change(seen, min(asked.values()))
        if len(answers) >= wanted:
            return answers
        lines = "".join(f"\n  {shown(error)}" for error in errors)
        colon = ":" if errors else ""
        raise service_error(
            f"{len(errors)} of {len(errors) + len(answers)} read operations failed{colon}{lines}"
        )

    def _fan_out(self, own: bool) -> int:
        params = self._collection.config.params
        if params.HasField("read_fan_out_factor"):
            return params.read_fan_out_factor
        return 0 if own else 1

    def _open(self, peer: int) -> bool:
        return self._members.link(self._session, peer) is Link.OPEN

    def _try(
        self, replicas: ReplicaSet, peer: int, until: float, read: _Read, answers: list[Any]
    ) -> ApiError | bool | None:
        """True when it answered, None while it does not, else its error. Raises one that is not its fault."""
        self._session.check()
        match self._members.link(self._session, peer):
            case Link.REFUSED:
                return refused()
            case Link.SILENT:
                return silent() if time.monotonic() >= until else None
        try:
            state = self._members.states[peer]
            answers.append(read(state.replica(self._collection.name, replicas.shard)))
        except ApiError as error:
            if not is_transient(error):
                raise
            return error
        return True


class FannedShard:
    """All shards of a collection as if they were one of the engine's."""

    def __init__(self, reader: Reader, collection: ShardedCollection) -> None:
        self._reader, self._collection = reader, collection

    def retrieve(self, ids: Sequence[Any], payload: Any, vectors: Any) -> list[Any]:
        """In the order of `ids`."""
        found = {record.id: record for record in self._records("retrieve", ids, payload, vectors)}
        return [found[point] for point in dict.fromkeys(ids) if point in found]

    def scroll(self, page: Any) -> tuple[list[Any], Any]:
        """A page in the order of ids, and where the next one begins."""
        if page.order_by is not None:
            raise unimplemented("order_by on a cluster")
        more = qe.ScrollRequest(
            page.offset, page.limit + 1, page.filter, page.with_payload, page.with_vector
        )
        answers = self._reader.of_shards(
            lambda replica: replica.collection.call(lambda shard: shard.scroll(more))[0],
            lambda several, majority: resolve.points(several, majority, resolve.record),
        )
        found = sorted(_together(answers), key=_by_id)
        following = found[page.limit].id if len(found) > page.limit else None
        return found[: page.limit], following

    def _records(self, call: str, *arguments: Any) -> list[Any]:
        answers = self._reader.of_shards(
            lambda replica: replica.collection.call(lambda shard: getattr(shard, call)(*arguments)),
            lambda several, majority: resolve.points(several, majority, resolve.record),
        )
        return _together(answers)

    def count(self, wanted: Any) -> int:
        """Of all shards."""
        answers = self._reader.of_shards(
            lambda replica: replica.collection.call(lambda shard: shard.count(wanted)),
            resolve.counts,
        )
        return sum(each or 0 for each in answers)

    def query(self, wanted: Any) -> list[Any]:
        """The best of all shards."""
        return self.query_batch(qe.QueryBatchRequest([wanted]))[0]

    def query_batch(self, batch: Any) -> list[list[Any]]:
        """The best of all shards, for each query."""
        wanted = batch.queries
        everything = qe.QueryBatchRequest([_from_the_first(query) for query in wanted])
        answers = self._reader.of_shards(
            lambda replica: replica.collection.call(lambda shard: shard.query_batch(everything)),
            _agreed,
        )
        return [
            self._best(query, each)
            for query, each in zip(wanted, _turned(answers, len(wanted)), strict=True)
        ]

    def _best(self, query: Any, answers: list[list[Any]]) -> list[Any]:
        found = _together(answers)
        if query.query is None:
            found.sort(key=_by_id)
        else:
            found.sort(key=lambda point: (self._sign * point.score, _by_id(point)))
        return found[query.offset or 0 :][: query.limit]

    @property
    def _sign(self) -> int:
        signs = {
            1 if params.distance in _ASCENDING else -1
            for params in self._collection.vectors.values()
        }
        if len(signs) != 1:
            raise unimplemented("vectors with distances of two directions on a cluster")
        return signs.pop()


def _from_the_first(query: Any) -> Any:
    """What a shard is asked for, where an offset counts in all shards together."""
    return qe.QueryRequest(
        query.limit + (query.offset or 0),
        query=query.query,
        prefetches=query.prefetches or None,
        with_vector=query.with_vector,
        with_payload=query.with_payload,
        filter=query.filter,
        score_threshold=query.score_threshold,
        params=query.params,
    )


def _agreed(answers: Sequence[Any], majority: bool) -> list[list[Any]]:
    """Of the batches of several replicas."""
    return [resolve.points(each, majority, resolve.scored) for each in zip(*answers, strict=True)]


def _turned(answers: list[Any], queries: int) -> list[list[list[Any]]]:
    """Answers by shard and query, by query and shard."""
    return [[each[number] for each in answers if each is not None] for number in range(queries)]


def _together(answers: Sequence[Any]) -> list[Any]:
    return [point for each in answers if each is not None for point in each]


def _by_id(point: Any) -> tuple[bool, Any]:
    """Numbers come before UUIDs."""
    is_uuid = isinstance(point.id, UUID)
    return is_uuid, point.id.int if is_uuid else point.id

"""What one node knows and holds: collections cut into shards, the states of all replicas, and its own replicas."""

from __future__ import annotations

import itertools
import threading
import time
import zlib
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import qdrant_edge as qe

from router_service.backends.qdrant_server.wire import q as pb
from tests.qdrant_standin.checks import vector_params
from tests.qdrant_standin.cluster.errors import PRECONDITION, ShardError, missing_there
from tests.qdrant_standin.collection import Collection
from tests.qdrant_standin.configs import changed
from tests.qdrant_standin.errors import ApiError, bad_input
from tests.qdrant_standin.store import Optimizers, Store

UPDATABLE = (pb.Active, pb.Partial, pb.Initializing)
RECOVERING = (pb.Partial, pb.Recovery, pb.PartialSnapshot)
_PAGE = 1000
_tags = itertools.count()


def next_tag() -> int:
    """The number of an operation; the same one twice at a replica is applied once."""
    return next(_tags)


class Replica:
    """One copy of a shard. While it is copied elsewhere, what it applies is passed on as well."""

    def __init__(self, collection: Collection, optimizers: Optimizers) -> None:
        self.collection, self._optimizers = collection, optimizers
        self.lock = threading.RLock()
        self._forward: Replica | None = None
        self._receiving = False
        self._seen: deque[int] = deque(maxlen=1000)

    def apply(self, tag: int, operation: Any) -> None:
        """Writes, unless the source of a transfer has written it here already, or will."""
        with self.lock:
            if not self._receiving and tag not in self._seen:
                self._take(tag, operation)

    def _take(self, tag: int, operation: Any) -> None:
        self.collection.update(operation)
        self._seen.append(tag)
        self._optimizers.request(self.collection, pending=self.collection.outgrown())
        if self._forward is not None:
            with self._forward.lock:
                self._forward._take(tag, operation)

    def copy_to(self, other: Replica) -> None:
        """Makes the other one equal, and keeps it so until end_copy()."""
        with self.lock, other.lock:
            other._receiving = True
            other._seen.clear()
            here, there = self.contents(), other.contents()
            if gone := [point for point in there if point not in here]:
                other.collection.update(qe.UpdateOperation.delete_points(gone))
            points = [_point(record) for record in here.values()]
            for page in (points[n : n + _PAGE] for n in range(0, len(points), _PAGE)):
                other.collection.update(qe.UpdateOperation.upsert_points(page, None, None))
            self._forward = other

    def end_copy(self, other: Replica) -> None:
        """Both are written to by themselves from now on."""
        with self.lock, other.lock:
            self._forward, other._receiving = None, False

    def contents(self) -> dict[Any, Any]:
        """Its points by id."""
        found: dict[Any, Any] = {}
        following: Any = None
        while True:
            page = qe.ScrollRequest(following, _PAGE, None, True, True)
            records, following = self.collection.call(lambda shard, page=page: shard.scroll(page))
            found |= {record.id: record for record in records}
            if following is None:
                return found


def _point(record: Any) -> Any:
    vector = record.vector if isinstance(record.vector, dict) else {"": record.vector}
    return qe.Point(record.id, vector, record.payload or None)


@dataclass
class Disabled:
    """A replica that a node does not use until all agree on its state; it reports it again after a while."""

    from_state: Any
    reported: float = 0.0
    pause_s: float = 0.0


@dataclass
class ReplicaSet:
    """The replicas of a shard as one node knows them, and its own if it has one."""

    shard: int
    states: dict[int, Any]
    local: Replica | None
    disabled: dict[int, Disabled] = field(default_factory=dict)
    ordering: threading.RLock = field(default_factory=threading.RLock)

    def readable(self, peer: int) -> bool:
        """Whether reads may ask it."""
        return self.states.get(peer) == pb.Active and peer not in self.disabled

    def updatable(self, peer: int) -> bool:
        """Whether writes are sent to it."""
        return self.states.get(peer) in UPDATABLE and peer not in self.disabled

    def initializing(self, peer: int) -> bool:
        """Whether it is being made."""
        return self.states.get(peer) == pb.Initializing and peer not in self.disabled

    def active(self) -> list[int]:
        """Peers whose replica all agree to be whole."""
        return [peer for peer, state in self.states.items() if state == pb.Active]

    def disable(self, peer: int, from_state: Any) -> None:
        """Uses it no more, unless it is the last one."""
        others = [each for each in self.active() if each != peer]
        if peer not in self.disabled and all(each in self.disabled for each in others):
            return
        self.disabled.setdefault(peer, Disabled(from_state)).from_state = from_state

    def settle(self, peer: int, state: Any) -> None:
        """Takes a state that all agree on."""
        self.states = {**self.states, peer: state}
        if all(each in self.disabled for each in self.active()):
            self.disabled.clear()
        else:
            self.disabled.pop(peer, None)


class ShardedCollection:
    """A collection as one node knows it."""

    def __init__(self, name: str, config: pb.CollectionConfig, shards: list[ReplicaSet]) -> None:
        self.name, self.config, self.shards = name, config, shards
        self.created = time.time()

    @property
    def vectors(self) -> dict[str, pb.VectorParams]:
        """The vectors of the points by name; the unnamed one is ""."""
        return vector_params(self.config.params.vectors_config)

    def shard_of(self, point: Any) -> int:
        """Where a point is."""
        return zlib.crc32(str(point).encode()) % len(self.shards)

    def local(self) -> list[Replica]:
        """The replicas that this node holds."""
        return [each.local for each in self.shards if each.local is not None]

    def close(self) -> None:
        """Releases the files."""
        for replica in self.local():
            replica.collection.close()

    def delete(self) -> None:
        """Removes them."""
        for replica in self.local():
            replica.collection.delete()


class PeerState(Store):
    """Of one node. Its methods that change something are called by consensus only."""

    def __init__(self, directory: Path, peer_id: int) -> None:
        super().__init__(directory)
        self.peer_id = peer_id

    def sharded(self) -> list[ShardedCollection]:
        """All collections."""
        with self._lock:
            return list(self._collections.values())  # type: ignore[arg-type]

    def find(self, name: str) -> ShardedCollection:
        """A collection by its name or an alias. Raises ApiError (NOT_FOUND)."""
        return self.get(name)  # type: ignore[return-value]

    def replica(self, name: str, shard: int) -> Replica:
        """For another node that asks for it. Raises ShardError."""
        try:
            found = self.find(name).shards[shard].local
        except ApiError as error:
            raise missing_there(error) from error
        if found is None:
            raise ShardError(PRECONDITION, f"Local shard {shard} not found")
        return found

    def update_local(self, name: str, shard: int, tag: int, operation: Any) -> None:
        """A write that another node sends. Raises ShardError when the replica takes none in its state."""
        replica = self.replica(name, shard)
        if self.find(name).shards[shard].states.get(self.peer_id) not in UPDATABLE:
            raise ShardError(PRECONDITION, f"No target shard {shard} found for update")
        replica.apply(tag, operation)

    def create_sharded(
        self, name: str, config: pb.CollectionConfig, distribution: list[list[int]]
    ) -> bool:
        """A new collection; replicas are Initializing until their nodes say that they are there."""
        with self._lock:
            self._check_new(name)
            shards = []
            for shard, peers in enumerate(distribution):
                local = None
                if self.peer_id in peers:
                    local = Replica(Collection.create(self._root, name, config), self.optimizers)
                shards.append(ReplicaSet(shard, dict.fromkeys(peers, pb.Initializing), local))
            self._collections[name] = ShardedCollection(name, config, shards)  # type: ignore[assignment]
        return True

    def configure(self, request: pb.UpdateCollection) -> bool:
        """Changes the configuration of a collection; indexing follows in the background."""
        collection = self.find(request.collection_name)
        collection.config = changed(collection.config, request)
        for replica in collection.local():
            replica.collection.configure(collection.config)
            self.optimizers.request(replica.collection, pending=True)
        return True

    def apply_fields(self, name: str, operation: Any) -> bool:
        """Makes or drops an index of a field in what this node holds, whatever state it is in."""
        for replica in self.find(name).local():
            replica.collection.update(operation)
        return True

    def set_state(self, name: str, shard: int, peer: int, state: Any, from_state: Any) -> bool:
        """Raises ApiError when the replica is in another state, or is the last active one."""
        replicas = self.find(name).shards[shard]
        current = replicas.states.get(peer)
        if from_state is not None and current != from_state:
            there, wanted = (_name(each) for each in (current, from_state))
            raise bad_input(
                f"Replica {peer} of shard {shard} has state Some({there}), but expected Some({wanted})"
            )
        if replicas.active() == [peer] and state != pb.Active:
            raise bad_input(f"Cannot deactivate the last active replica {peer} of shard {shard}")
        replicas.settle(peer, state)
        return True


def _name(state: Any) -> str:
    return str(pb.ReplicaState.Name(state))

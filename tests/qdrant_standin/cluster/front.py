"""A node as its clients meet it: what the services of a single server ask their store, asked of the cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from router_service.backends.qdrant_server.wire import q as pb
from tests.qdrant_standin.cluster.consensus import META_OPERATION_S
from tests.qdrant_standin.cluster.members import Members
from tests.qdrant_standin.cluster.network import Node, Session
from tests.qdrant_standin.cluster.reads import FannedShard, Reader
from tests.qdrant_standin.cluster.state import PeerState, ShardedCollection
from tests.qdrant_standin.cluster.writes import Writer
from tests.qdrant_standin.errors import unimplemented
from tests.qdrant_standin.writes import Write

_Answer = TypeVar("_Answer")
_WORST_FIRST = (pb.Red, pb.Yellow, pb.Grey, pb.Green)


class ClusteredCollection:
    """A collection for one call at one node."""

    def __init__(self, members: Members, session: Session, found: ShardedCollection) -> None:
        self._members, self._session, self._found = members, session, found
        self._consistency, self._ordering, self._waits = pb.ReadConsistency(factor=1), pb.Weak, True

    def bound(self, request: Any) -> ClusteredCollection:
        """With the consistency and the ordering of a request."""
        fields = request.DESCRIPTOR.fields_by_name
        if "read_consistency" in fields and request.HasField("read_consistency"):
            self._consistency = request.read_consistency
        if "ordering" in fields and request.HasField("ordering"):
            self._ordering = request.ordering.type
        if "wait" in fields:
            self._waits = request.wait
        return self

    @property
    def name(self) -> str:
        """Not an alias of it."""
        return self._found.name

    @property
    def config(self) -> pb.CollectionConfig:
        """As this node knows it."""
        return self._found.config

    @property
    def vectors(self) -> dict[str, pb.VectorParams]:
        """The vectors of the points by name; the unnamed one is ""."""
        return self._found.vectors

    def call(self, use: Callable[[Any], _Answer]) -> _Answer:
        """What all shards answer together. Raises ApiError."""
        return use(FannedShard(self._reader(), self._found))

    def write(self, write: Write) -> int:
        """Raises ApiError."""
        writer = Writer(self._members, self._session, self._ordering, waits=self._waits)
        writer.write(self._found, write)
        return 0

    def info(self) -> pb.CollectionInfo:
        """What Collections.Get answers."""
        infos = self._reader().infos()
        message = pb.CollectionInfo()
        message.CopyFrom(infos[0])
        message.config.CopyFrom(self.config)
        message.status = min((each.status for each in infos), key=_WORST_FIRST.index)
        for field in ("segments_count", "points_count", "indexed_vectors_count"):
            setattr(message, field, sum(getattr(each, field) for each in infos))
        for name, index in message.payload_schema.items():
            index.points = sum(each.payload_schema[name].points for each in infos)
        return message

    def _reader(self) -> Reader:
        return Reader(self._members, self._session, self._found, self._consistency)

    def still(self) -> AbstractContextManager[Path]:
        """Refused."""
        raise unimplemented("snapshots on a cluster")

    def replace(self, shard: Path) -> None:
        """Refused."""
        raise unimplemented("snapshots on a cluster")


class PeerFront:
    """The store of a node's services. Raises ApiError."""

    def __init__(self, members: Members, node: Node, state: PeerState) -> None:
        self._members, self._node, self._state = members, node, state
        self.directory, self.optimizers = state.directory, state.optimizers
        self.peers = len(members.nodes)

    def close(self) -> None:
        """Nothing: the state is the cluster's, and outlives this."""

    def _session(self) -> Session:
        session = Session(self._members.network, self._node)
        session.check()
        return session

    def names(self) -> list[str]:
        """See Store."""
        self._session()
        return self._state.names()

    def aliases(self, collection: str | None = None) -> list[tuple[str, str]]:
        """See Store."""
        self._session()
        return self._state.aliases(collection)

    def get(self, name: str) -> ClusteredCollection:
        """See Store."""
        return ClusteredCollection(self._members, self._session(), self._state.find(name))

    def create(
        self, name: str, config: pb.CollectionConfig, timeout_s: float | None = None
    ) -> None:
        """Waits for all replicas, and then for all nodes; that they do not come is no error."""
        session = self._session()
        distribution = self._distribution(config)
        self._agree(
            session, timeout_s, lambda state: state.create_sharded(name, config, distribution)
        )
        wait_s = META_OPERATION_S if timeout_s is None else timeout_s
        found = self._state.find(name)
        session.wait_for(
            lambda: all(len(each.active()) == len(each.states) for each in found.shards),
            self._members.network.seconds(wait_s),
        )
        self._sync(session, 0.0 if timeout_s is not None and not _whole(found) else wait_s)

    def _distribution(self, config: pb.CollectionConfig) -> list[list[int]]:
        """The peers of each shard: as many shards on each, whether it is up or not."""
        peers, first = sorted(self._members.nodes), len(self._state.names())
        copies = min(config.params.replication_factor, len(peers))
        return [
            [peers[(first + shard + copy) % len(peers)] for copy in range(copies)]
            for shard in range(config.params.shard_number)
        ]

    def update(self, request: pb.UpdateCollection) -> None:
        """See Store."""
        timeout_s = float(request.timeout) if request.HasField("timeout") else None
        self._agree(self._session(), timeout_s, lambda state: state.configure(request))

    def delete(self, name: str, timeout_s: float | None = None) -> bool:
        """See Store."""
        return self._agree(self._session(), timeout_s, lambda state: state.delete(name))

    def change_aliases(
        self, actions: list[pb.AliasOperations], timeout_s: float | None = None
    ) -> None:
        """See Store."""
        session = self._session()
        self._agree(session, timeout_s, lambda state: state.change_aliases(actions))
        if any(action.WhichOneof("action") != "delete_alias" for action in actions):
            self._sync(session, META_OPERATION_S if timeout_s is None else timeout_s)

    def change_fields(self, request: Any, operation: Any) -> None:
        """All nodes change what they hold; the call goes on to write it to the shards as well."""
        name = self._state.find(request.collection_name).name
        timeout_s = float(request.timeout) if request.HasField("timeout") else None
        self._agree(self._session(), timeout_s, lambda state: state.apply_fields(name, operation))

    def written(self, collection: Any) -> None:
        """Nothing: replicas see to it themselves."""

    def _agree(
        self, session: Session, timeout_s: float | None, apply: Callable[[PeerState], Any]
    ) -> Any:
        wait_s = META_OPERATION_S if timeout_s is None else timeout_s
        states = self._members.states
        return self._members.consensus.propose(session, lambda node: apply(states[node.id]), wait_s)

    def _sync(self, session: Session, timeout_s: float) -> None:
        length = self._members.consensus.applied[self._node.id]
        self._members.consensus.wait_for_all(session, length, timeout_s)

    def cluster_info(self, name: str) -> pb.CollectionClusterInfoResponse:
        """What this node holds, and what it knows of others."""
        self._session()
        found, me = self._state.find(name), self._node.id
        return pb.CollectionClusterInfoResponse(
            peer_id=me,
            shard_count=len(found.shards),
            local_shards=[
                pb.LocalShardInfo(
                    shard_id=each.shard,
                    points_count=each.local.collection.info().points_count,
                    state=each.states[me],
                )
                for each in found.shards
                if each.local is not None
            ],
            remote_shards=list(_remotes(found, me)),
        )

    def cluster_status(self) -> dict[str, Any]:
        """What GET /cluster answers."""
        self._session()
        consensus, leader = self._members.consensus, self._members.consensus.leader
        reached = self._members.network.has_majority(self._node)
        return {
            "status": "enabled",
            "peer_id": self._node.id,
            "peers": {str(peer): {"uri": node.uri} for peer, node in self._members.nodes.items()},
            "raft_info": {
                "term": consensus.term,
                "commit": consensus.applied[self._node.id],
                "pending_operations": 0,
                "leader": leader.id if leader and reached else None,
                "role": "Leader" if leader is self._node else "Follower",
                "is_voter": True,
            },
            "consensus_thread_status": {"consensus_thread_status": "working"},
            "message_send_failures": {},
        }


def _whole(found: ShardedCollection) -> bool:
    return all(len(each.active()) == len(each.states) for each in found.shards)


def _remotes(found: ShardedCollection, me: int) -> Iterable[pb.RemoteShardInfo]:
    for each in found.shards:
        for peer, state in each.states.items():
            if peer != me:
                yield pb.RemoteShardInfo(shard_id=each.shard, peer_id=peer, state=state)

"""Writes to all replicas of the shards that they touch, and what becomes of replicas that fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

from router_service.backends.qdrant_server.wire import q as pb
from tests.qdrant_standin.cluster.errors import (
    NOT_FOUND,
    PRECONDITION,
    ShardError,
    is_transient,
    of_some_shards,
    refused,
    service_error,
    shown,
    silent,
)
from tests.qdrant_standin.cluster.members import Members
from tests.qdrant_standin.cluster.network import Link, Session
from tests.qdrant_standin.cluster.state import (
    RECOVERING,
    PeerState,
    ReplicaSet,
    ShardedCollection,
    next_tag,
)
from tests.qdrant_standin.errors import ApiError
from tests.qdrant_standin.writes import Write

_DEACTIVATION_S = 30.0
_Outcomes = dict[int, ApiError | None]


class Writer:
    """Writes of one call at one node."""

    def __init__(self, members: Members, session: Session, ordering: Any, *, waits: bool) -> None:
        self._members, self._session = members, session
        self._ordering, self._waits = ordering, waits

    def write(self, collection: ShardedCollection, write: Write) -> None:
        """Raises the first error; what some shards have applied stays applied."""
        parts = write.by_shard(collection.shard_of, len(collection.shards))

        def one(part: tuple[int, Any]) -> ApiError | None:
            try:
                self._update(collection, collection.shards[part[0]], part[1])
            except ApiError as error:
                return error
            return None

        outcomes = self._members.network.side_by_side(one, parts.items())
        self._session.check()
        errors = [error for error in outcomes if error is not None]
        if not errors:
            return
        if len(errors) < len(outcomes):
            raise of_some_shards(len(errors), len(outcomes), errors[0])
        raise errors[0]

    def _update(self, collection: ShardedCollection, replicas: ReplicaSet, operation: Any) -> None:
        name = pb.WriteOrderingType.Name(self._ordering)
        leader = self._leader(replicas)
        if leader is None:
            raise service_error(
                f"Cannot update shard {collection.name}:{replicas.shard} with {name} ordering "
                "because no leader could be selected"
            )
        if leader == self._session.node.id:
            self.update(collection.name, replicas, operation)
            return
        error = self._tell(
            [leader], lambda state: self._forwarded(state, collection, replicas, operation)
        )[leader]
        if error is None:
            return
        if is_transient(error):
            self._disable(replicas, leader)
            text = f"Failed to apply update with {name} ordering via leader peer {leader}: "
            raise service_error(text + shown(error))
        raise error

    def _leader(self, replicas: ReplicaSet) -> int | None:
        match self._ordering:
            case pb.Weak:
                return self._session.node.id
            case pb.Medium:
                alive = [peer for peer in replicas.active() if peer not in replicas.disabled]
                return max(alive, default=None)
        return max(replicas.states)

    def _forwarded(
        self, state: PeerState, collection: ShardedCollection, replicas: ReplicaSet, operation: Any
    ) -> None:
        """What the leader does."""
        state.replica(collection.name, replicas.shard)
        session = Session(self._members.network, self._members.nodes[state.peer_id])
        leader = Writer(self._members, session, self._ordering, waits=self._waits)
        there = state.find(collection.name).shards[replicas.shard]
        leader.update(collection.name, there, operation)

    def update(self, name: str, replicas: ReplicaSet, operation: Any) -> None:
        """One shard, from the node that is to do it."""
        with nullcontext() if self._ordering == pb.Weak else replicas.ordering:
            self._apply(name, replicas, operation)

    def _apply(self, name: str, replicas: ReplicaSet, operation: Any) -> None:
        me, shard, tag = self._session.node.id, replicas.shard, next_tag()
        targets = [peer for peer in replicas.states if replicas.updatable(peer)]
        if not targets:
            raise service_error(
                f"The replica set for shard {shard} on peer {me} has no active replica"
            )
        outcomes = self._tell(
            sorted(targets, key=lambda peer: peer != me),
            lambda state: state.update_local(name, shard, tag, operation),
        )
        failed = {peer: error for peer, error in outcomes.items() if error is not None}
        why = next((f"Failed peer: {p}, error: {shown(e)}" for p, e in failed.items()), "")
        config = self._members.states[me].find(name).config
        needed = min(config.params.write_consistency_factor, len(replicas.states))
        succeeded = [peer for peer in outcomes if peer not in failed]
        if failed and len(succeeded) < needed:
            raise next(iter(failed.values()))
        if failed:
            self._deactivate(replicas, failed, why)
        if not any(
            peer in replicas.active() and peer not in replicas.disabled for peer in succeeded
        ):
            raise service_error(
                "Failed to apply operation to at least one `Active` replica. "
                f"Consistency of this update is not guaranteed. Please retry. {why}"
            )

    def _deactivate(self, replicas: ReplicaSet, failed: dict[int, ApiError], why: str) -> None:
        if not self._waits:  # nothing is known to be complete: only failures that pass count
            failed = {peer: error for peer, error in failed.items() if is_transient(error)}
        must_wait = False
        for peer, error in failed.items():
            state = replicas.states.get(peer)
            kind = error.kind if isinstance(error, ShardError) else None
            if state == pb.Dead or (state in RECOVERING and kind in (PRECONDITION, NOT_FOUND)):
                continue
            must_wait = must_wait or is_transient(error) or state == pb.Initializing
            self._disable(replicas, peer)
        if not (self._waits and must_wait):
            return
        wait_s = self._members.network.seconds(_DEACTIVATION_S)
        if not self._session.wait_for(lambda: not set(replicas.active()) & set(failed), wait_s):
            raise service_error(
                f"Some replica of shard {replicas.shard} failed to apply operation and deactivation "
                f"timed out after {_DEACTIVATION_S:g}s. Consistency of this update is not "
                f"guaranteed. Please retry. {why}"
            )

    def _disable(self, replicas: ReplicaSet, peer: int) -> None:
        state = replicas.states.get(peer)
        replicas.disable(peer, None if state in RECOVERING else state)
        self._members.network.notify()

    def _tell(self, peers: Iterable[int], call: Callable[[PeerState], None]) -> _Outcomes:
        """What becomes of a call at each of these peers; those that hang are waited for."""
        until = time.monotonic() + self._members.answer_s
        left, outcomes = list(peers), _Outcomes()
        while left:
            seen = self._members.network.version
            for peer in list(left):
                self._session.check()
                match self._members.link(self._session, peer):
                    case Link.REFUSED:
                        outcomes[peer] = refused()
                    case Link.SILENT if time.monotonic() >= until:
                        outcomes[peer] = silent()
                    case Link.SILENT:
                        continue
                    case _:
                        outcomes[peer] = self._call(peer, call)
                left.remove(peer)
            if left:
                self._session.wait_for_change(seen, until)
        return outcomes

    def _call(self, peer: int, call: Callable[[PeerState], None]) -> ApiError | None:
        try:
            call(self._members.states[peer])
        except ApiError as error:
            return error
        return None

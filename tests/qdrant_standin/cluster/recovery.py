"""What nodes do by themselves: report what fails, say that replicas are there, and get back what they missed."""

from __future__ import annotations

import threading
import time
from typing import Any

from router_service.backends.qdrant_server.wire import q as pb
from tests.qdrant_standin.cluster.consensus import Entry
from tests.qdrant_standin.cluster.members import Members
from tests.qdrant_standin.cluster.network import Link, Node
from tests.qdrant_standin.cluster.state import ReplicaSet, ShardedCollection
from tests.qdrant_standin.errors import ApiError

_TICK_S = 1.0
_REPORT_AGAIN_S = (1.0, 10.0)
_Key = tuple[str, int, int]  # collection, shard, peer


class Recovery:
    """A thread that does it for all nodes, and one for each transfer of a shard."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._offered: dict[tuple[_Key, Any, int], Entry] = {}
        self._transfers: dict[_Key, threading.Thread] = {}
        self._allowed = threading.Event()
        self._allowed.set()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="recovery")

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def close(self) -> None:
        """Ends when the transfers that run have ended."""
        self._closed = True
        self._allowed.set()
        self._members.network.notify()
        self._thread.join()
        for transfer in list(self._transfers.values()):
            transfer.join()

    def pause(self) -> None:
        """Replicas stay as they are, Partial once a transfer has begun, until resume()."""
        self._allowed.clear()

    def resume(self) -> None:
        """Transfers go on."""
        self._allowed.set()

    @property
    def running(self) -> bool:
        """Whether a shard is being transferred."""
        return bool(self._transfers)

    def _run(self) -> None:
        network = self._members.network
        while not self._closed:
            seen = network.version
            for node in network.nodes:
                if self._members.consensus.leads(node):
                    self._look(node)
            with network.changed:
                network.changed.wait_for(
                    lambda seen=seen: self._closed or network.version != seen,
                    network.seconds(_TICK_S),
                )

    def _look(self, node: Node) -> None:
        for collection in self._members.states[node.id].sharded():
            for replicas in collection.shards:
                state = replicas.states.get(node.id)
                if state == pb.Initializing:
                    key = (collection.name, replicas.shard, node.id)
                    self._offer(key, pb.Active, pb.Initializing, node.id)
                elif state == pb.Dead:
                    self._recover(collection, replicas, node)
                self._report(collection, replicas, node)

    def _report(self, collection: ShardedCollection, replicas: ReplicaSet, node: Node) -> None:
        for peer, disabled in list(replicas.disabled.items()):
            if time.monotonic() < disabled.reported + disabled.pause_s:
                continue
            first, most = map(self._members.network.seconds, _REPORT_AGAIN_S)
            disabled.reported = time.monotonic()
            disabled.pause_s = min(most, 2 * disabled.pause_s) or first
            key = (collection.name, replicas.shard, peer)
            self._offer(key, pb.Dead, disabled.from_state, node.id)

    def _offer(self, key: _Key, state: Any, from_state: Any, proposer: int) -> None:
        """Proposes a state, unless the proposer has done so and has not yet heard what became of it."""
        pending = self._offered.get((key, state, proposer))
        if pending is None or proposer in pending.outcomes:
            self._offered[key, state, proposer] = self._propose(key, state, from_state)

    def _propose(self, key: _Key, state: Any, from_state: Any) -> Entry:
        states = self._members.states
        return self._members.consensus.append(
            lambda node: states[node.id].set_state(*key, state, from_state)
        )

    def _recover(self, collection: ShardedCollection, replicas: ReplicaSet, node: Node) -> None:
        key = (collection.name, replicas.shard, node.id)
        sources = [self._members.nodes[peer] for peer in replicas.active()]
        reached = [s for s in sources if self._members.network.link(node, s) is Link.OPEN]
        if key in self._transfers or not reached or self._closed:
            return
        self._transfers[key] = threading.Thread(
            target=self._transfer, args=(key, reached[0], node), name=f"transfer-{key}"
        )
        self._transfers[key].start()

    def _transfer(self, key: _Key, source: Node, target: Node) -> None:
        try:
            if self._agreed(self._propose(key, pb.Partial, pb.Dead), source, target):
                self._allowed.wait()
                self._copy(key, source, target)
        finally:
            del self._transfers[key]
            self._members.network.notify()

    def _copy(self, key: _Key, source: Node, target: Node) -> None:
        name, shard, _ = key
        states = self._members.states
        try:
            here, there = (states[node.id].replica(name, shard) for node in (source, target))
        except ApiError:
            return  # the collection has been deleted
        try:
            done = self._members.network.link(source, target) is Link.OPEN
            if done:
                here.copy_to(there)
                done = self._agreed(self._propose(key, pb.Active, pb.Partial), source, target)
        except ApiError:
            done = False  # deleted meanwhile
        finally:
            here.end_copy(there)
        if not done:
            self._propose(key, pb.Dead, pb.Partial)

    def _agreed(self, entry: Entry, source: Node, target: Node) -> bool:
        """Whether all nodes took it, while both nodes of the transfer were there."""
        network, consensus = self._members.network, self._members.consensus

        def broken() -> bool:
            return network.link(source, target) is not Link.OPEN or not network.works(source)

        with network.changed:
            network.changed.wait_for(
                lambda: self._closed or broken() or consensus.applied_by_all(entry)
            )
        outcome = entry.outcomes.get(source.id)
        return not (broken() or self._closed or outcome is None or isinstance(outcome, ApiError))

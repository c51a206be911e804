"""Several stand-ins that are one cluster, in one process, each behind a proxy that can break its connections."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from router_service.backends.qdrant_server.wire import q as pb
from tests.qdrant_standin.cluster.consensus import Consensus
from tests.qdrant_standin.cluster.front import PeerFront
from tests.qdrant_standin.cluster.members import Members
from tests.qdrant_standin.cluster.network import Network, Node
from tests.qdrant_standin.cluster.recovery import Recovery
from tests.qdrant_standin.cluster.state import PeerState
from tests.qdrant_standin.faults import Faults
from tests.qdrant_standin.server import QdrantStandIn
from tests.qdrant_standin.tcp_faults import TcpFaults

WHOLE_S = 60.0
_GRACE_S = 5.0


class Host(Protocol):
    """Where a node's clients find it: another network namespace, for instance."""

    address: str

    def listen(self, address: tuple[str, int]) -> socket.socket:
        """A socket there."""
        ...


class _ThisHost:
    """Reached by this machine alone."""

    address = "127.0.0.1"

    def listen(self, address: tuple[str, int]) -> socket.socket:
        return socket.create_server(address)


class Peer:
    """One node, from outside. Its ports stay the same whatever happens to it; `server` is behind them."""

    def __init__(self, members: Members, node: Node, server: QdrantStandIn, host: Host) -> None:
        self._members, self._node, self.server, self._host = members, node, server, host
        self._proxies: tuple[TcpFaults, ...] = ()

    @property
    def peer_id(self) -> int:
        """As CollectionClusterInfo has it."""
        return self._node.id

    @property
    def faults(self) -> Faults:
        """What its own clients meet."""
        return self.server.faults

    @property
    def port(self) -> int:
        """Of gRPC."""
        return self._proxies[0].port

    @property
    def url(self) -> str:
        """What clients are given."""
        return self._proxies[0].url

    @property
    def rest_url(self) -> str:
        """The REST side, on the port before the other."""
        return self._proxies[1].url

    def serve(self, stack: ExitStack) -> None:
        """Listens until the stack is closed."""
        stack.enter_context(self.server)
        grpc_port = _free_pair()
        targets = {grpc_port: self.server.port, grpc_port - 1: self.server.rest_port}
        proxies = []
        for port, target in targets.items():
            proxy = TcpFaults(target, host=self._host.address, port=port, listen=self._host.listen)
            proxies.append(stack.enter_context(proxy))
        self._proxies = tuple(proxies)

    def kill(self) -> None:
        """As by SIGKILL: connections are reset, its port refuses, what it was at is not finished."""
        self._members.network.change(self._node, running=False, hung=False)
        for proxy in self._proxies:
            proxy.refuse()
            proxy.reset()

    def stop(self) -> None:
        """As by SIGTERM: takes nothing new, ends what it is at, and says goodbye to its clients."""
        for proxy in self._proxies:
            proxy.refuse()
        self.server.stop(_GRACE_S)
        self._members.network.change(self._node, running=False)
        for proxy in self._proxies:
            proxy.reset()

    def start(self, *, behind: bool = False) -> None:
        """Serves again after kill() or stop(), and knows what was agreed on meanwhile; `behind`: does not yet."""
        self._members.network.change(self._node, running=True)
        if not self.server.running:
            self.server.start()
        self._heal(behind)

    def hang(self) -> None:
        """As by SIGSTOP: connections are taken, and nothing is answered."""
        for proxy in self._proxies:
            proxy.black_hole()
        self._members.network.change(self._node, hung=True)

    def resume(self, *, behind: bool = False) -> None:
        """Goes on where it was, knowing what was agreed on meanwhile; `behind`: learns it while it serves."""
        self._members.network.change(self._node, hung=False)
        self._heal(behind)

    def _heal(self, behind: bool) -> None:
        if not behind:
            self._wait_until_caught_up()
        for proxy in self._proxies:
            proxy.heal()

    def _wait_until_caught_up(self) -> None:
        network, consensus = self._members.network, self._members.consensus
        with network.changed:
            network.changed.wait_for(
                lambda: consensus.caught_up(self._node) or not network.has_majority(self._node),
                WHOLE_S,
            )

    def cut_off(self) -> None:
        """Other nodes do not reach it, and it does not reach them; clients do."""
        self._members.network.change(self._node, cut=True)

    def join(self) -> None:
        """Is one of them again."""
        self._members.network.change(self._node, cut=False)

    @contextmanager
    def lagging(self) -> Iterator[None]:
        """Inside, it learns nothing new of what the others agree on, and counts as one of them."""
        consensus = self._members.consensus
        consensus.held.add(self._node.id)
        try:
            yield
        finally:
            consensus.held.discard(self._node.id)
            self._members.network.notify()

    def states(self, collection: str) -> dict[int, dict[int, str]]:
        """What it knows: states by shard and peer id."""
        found = self._members.states[self._node.id].find(collection)
        name = pb.ReplicaState.Name
        return {
            each.shard: {peer: name(state) for peer, state in each.states.items()}
            for each in found.shards
        }

    def local_counts(self, collection: str) -> dict[int, int]:
        """How many points it holds, by shard."""
        return {shard: len(found) for shard, found in self.contents(collection).items()}

    def contents(self, collection: str) -> dict[int, dict[Any, str]]:
        """What it holds: payload and vector by shard and id."""
        found = self._members.states[self._node.id].find(collection)
        return {
            each.shard: {
                point: repr((record.payload or {}, record.vector))
                for point, record in each.local.contents().items()
            }
            for each in found.shards
            if each.local is not None
        }


class QdrantCluster:
    """Serves from __enter__ to __exit__. `time_scale`: what takes a real server 10 s takes this so many times that.

    hosts: of the peers' clients, one each; all on this machine when not given.
    """

    def __init__(
        self,
        directory: Path,
        peers: int = 3,
        *,
        api_key: str | None = None,
        version: str = "1.20.0",
        indexing_threshold_kb: int = QdrantStandIn.indexing_threshold_kb,
        consensus_delay_s: float = 0.002,
        time_scale: float = 0.1,
        hosts: Sequence[Host] = (),
    ) -> None:
        first = secrets.randbelow(1 << 50) + 1
        nodes = [Node(first + n, f"http://qdrant-{n}:6335/") for n in range(peers)]
        self._network = Network(nodes, time_scale)
        self._consensus = Consensus(self._network, consensus_delay_s)
        self._members = Members(self._network, self._consensus)
        self.recovery = Recovery(self._members)
        self._directory, self._running = directory, ExitStack()
        self.peers = [
            Peer(self._members, node, self._server(node, api_key, version), host)
            for node, host in zip(nodes, hosts or [_ThisHost()] * peers, strict=True)
        ]
        for peer in self.peers:
            peer.server.indexing_threshold_kb = indexing_threshold_kb

    def _server(self, node: Node, api_key: str | None, version: str) -> QdrantStandIn:
        return QdrantStandIn(
            self._directory / str(node.id),
            api_key=api_key,
            version=version,
            make_store=lambda _: PeerFront(self._members, node, self._members.states[node.id]),
        )

    def __enter__(self) -> QdrantCluster:
        with ExitStack() as stack:
            stack.callback(self._network.close)
            for node in self._network.nodes:
                state = PeerState(self._directory / str(node.id), node.id)
                self._members.states[node.id] = state
                stack.callback(state.close)
            stack.callback(self._consensus.close)
            stack.callback(self.recovery.close)
            self._consensus.start()
            self.recovery.start()
            for peer in self.peers:
                peer.serve(stack)
            stack.callback(self._let_go)
            self._running = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def _let_go(self) -> None:
        """Calls that wait for a node end before the servers do."""
        for peer in self.peers:
            peer.faults.lift()
        for node in self._network.nodes:
            self._network.change(node, running=False, hung=False)

    @property
    def urls(self) -> list[str]:
        """Of all peers."""
        return [peer.url for peer in self.peers]

    def blind(self, pattern: str) -> None:
        """See Faults.blind, on every peer."""
        for peer in self.peers:
            peer.faults.blind(pattern)

    def is_whole(self) -> bool:
        """Whether all nodes are there, know the same, and every replica is active and in use."""
        return (
            self._network.whole
            and all(map(self._consensus.caught_up, self._network.nodes))
            and not self.recovery.running
            and all(
                state == pb.Active
                for each in self._replica_sets()
                for state in each.states.values()
            )
            and not any(each.disabled for each in self._replica_sets())
        )

    def _replica_sets(self) -> Iterator[Any]:
        for state in self._members.states.values():
            for collection in state.sharded():
                yield from collection.shards

    def wait_whole(self, timeout_s: float = WHOLE_S) -> None:
        """Returns when it is whole. Raises AssertionError when it does not become so."""
        with self._network.changed:
            found = self._network.changed.wait_for(self.is_whole, timeout_s)
        assert found, f"the cluster has not become whole in {timeout_s} s"

    def collections(self) -> list[str]:
        """Names of all that the first peer knows."""
        return self._members.states[self.peers[0].peer_id].names()

    def replicas_differ(self, collection: str) -> list[str]:
        """A line for each point that replicas of a shard do not all have alike; none when they are equal."""
        lines = []
        held = {peer.peer_id: peer.contents(collection) for peer in self.peers}
        shards = sorted({shard for each in held.values() for shard in each})
        for shard in shards:
            copies = {peer: each[shard] for peer, each in held.items() if shard in each}
            for point in sorted({p for copy in copies.values() for p in copy}, key=str):
                if len({copy.get(point) for copy in copies.values()}) > 1:
                    have = [peer for peer, copy in copies.items() if point in copy]
                    lines.append(f"shard {shard}: point {point} differs; peers {have} have it")
        return lines


# Ports below those that the system gives to whoever asks for any: a node that is down gets its own again, however many
# clusters and clients come meanwhile.
_PORTS = range(10_000, 32_000)


def _free_pair() -> int:
    """A free port after a free port, taken again at once by their proxies."""
    while True:
        port = secrets.choice(_PORTS)
        try:
            with (
                socket.create_server(("127.0.0.1", port)),
                socket.create_server(("127.0.0.1", port - 1)),
            ):
                return port
        except OSError:
            continue

"""What the parts of a cluster share: its nodes, what each of them knows and holds, and their log."""

from __future__ import annotations

from tests.qdrant_standin.cluster.consensus import Consensus
from tests.qdrant_standin.cluster.network import Link, Network, Node, Session
from tests.qdrant_standin.cluster.state import PeerState

# After so long a node takes another one for gone that does not answer.
_ANSWER_S = 5.0


class Members:
    """The nodes by their ids."""

    def __init__(self, network: Network, consensus: Consensus) -> None:
        self.network, self.consensus = network, consensus
        self.nodes: dict[int, Node] = {node.id: node for node in network.nodes}
        self.states: dict[int, PeerState] = {}

    @property
    def answer_s(self) -> float:
        """How long a node waits for another."""
        return self.network.seconds(_ANSWER_S)

    def link(self, session: Session, peer: int) -> Link:
        """What the node of a session sees of another."""
        return self.network.link(session.node, self.nodes[peer])

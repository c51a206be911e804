"""A Qdrant 1.x server on the wire for tests: the real messages and, through Qdrant Edge, the real engine.

It differs from a real server in what follows. Every collection is one shard in one process, whatever its shard_number;
QdrantCluster cuts it into shards and replicas. Writes without `wait` are applied before they are acknowledged.
Indexing stops the whole process while it runs. Strict mode is recorded and not enforced. Of REST there are the version,
the state of the cluster and the snapshots of collections.
Sparse vectors, multi vectors, shard keys, and queries other than nearest (with prefetches) are UNIMPLEMENTED.
"""

from tests.qdrant_standin.cluster import Peer, QdrantCluster
from tests.qdrant_standin.faults import Fault, Faults
from tests.qdrant_standin.process import ClusterProcess, StandInProcess
from tests.qdrant_standin.server import QdrantStandIn
from tests.qdrant_standin.tcp_faults import TcpFaults

__all__ = [
    "ClusterProcess",
    "Fault",
    "Faults",
    "Peer",
    "QdrantCluster",
    "QdrantStandIn",
    "StandInProcess",
    "TcpFaults",
]

"""Several stand-ins as one cluster: shards, replicas, consensus, and what becomes of them when nodes are lost.

    with QdrantCluster(directory) as cluster:
        ServerOptions(url=cluster.peers[0].url, ...)
        cluster.peers[1].kill()  # or hang(), cut_off(); and start(), resume(), join()
        cluster.wait_whole()
        assert not cluster.replicas_differ(collection)

It differs from a real cluster in what follows. Nodes elect no leader by votes: the first that reaches most leads.
Points are placed by another hash. Shards come back by a copy of all of their points. Snapshots are UNIMPLEMENTED.
"""

from tests.qdrant_standin.cluster.cluster import Peer, QdrantCluster

__all__ = ["Peer", "QdrantCluster"]

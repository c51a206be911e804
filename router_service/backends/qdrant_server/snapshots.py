"""Qdrant's own snapshots of collections, which version 0.1.0 of this service left on servers: removed."""

from __future__ import annotations

from router_service.backends.qdrant_server.connection import ADMIN_TIMEOUT_S, Connection
from router_service.backends.qdrant_server.wire import q
from router_service.errors import CollectionClosed, StorageError


def remove_snapshot(connection: Connection, collection: str, name: str) -> None:
    """No error when there is none of that name. Raises StorageError.

    Qdrant keeps the files when a collection goes, and shows them while there is one of that name: an empty one is made
    for the moment.
    """
    made = _make_empty(connection, collection)
    try:
        request = q.DeleteSnapshotRequest(collection_name=collection, snapshot_name=name)
        connection.call("snapshots", "Delete", request, ADMIN_TIMEOUT_S)
    except CollectionClosed:  # what is not found
        return
    finally:
        if made:
            drop = q.DeleteCollection(collection_name=collection)
            connection.call("collections", "Delete", drop, ADMIN_TIMEOUT_S)


def _make_empty(connection: Connection, collection: str) -> bool:
    """Whether there was none of that name."""
    if connection.exists(collection):
        return False
    nothing = q.VectorParams(size=1, distance=q.Distance.Euclid)
    request = q.CreateCollection(
        collection_name=collection,
        vectors_config=q.VectorsConfig(params=nothing),
        shard_number=1,
    )
    try:
        connection.call("collections", "Create", request, ADMIN_TIMEOUT_S, repeat=False)
    except StorageError:
        if not connection.exists(collection):  # another service may have been first
            raise
        return False
    return True

"""qdrant.Snapshots: those of collections."""

from __future__ import annotations

import time
from typing import Any

from router_service.backends.qdrant_server.wire import q as pb
from tests.qdrant_standin import checks
from tests.qdrant_standin.snapshots import Snapshots


class SnapshotsService(pb.SnapshotsServicer):
    """Handlers; refusals are ApiErrors."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    def Create(self, request: pb.CreateSnapshotRequest, context: Any) -> Any:  # noqa: N802
        started = time.perf_counter()
        checks.collection_name(request.collection_name)
        found = self._snapshots.create(request.collection_name)
        return pb.CreateSnapshotResponse(snapshot_description=found, time=_since(started))

    def List(self, request: pb.ListSnapshotsRequest, context: Any) -> Any:  # noqa: N802
        started = time.perf_counter()
        checks.collection_name(request.collection_name)
        found = self._snapshots.list(request.collection_name)
        return pb.ListSnapshotsResponse(snapshot_descriptions=found, time=_since(started))

    def Delete(self, request: pb.DeleteSnapshotRequest, context: Any) -> Any:  # noqa: N802
        started = time.perf_counter()
        checks.collection_name(request.collection_name)
        self._snapshots.delete(request.collection_name, request.snapshot_name)
        return pb.DeleteSnapshotResponse(time=_since(started))


def _since(started: float) -> float:
    return time.perf_counter() - started

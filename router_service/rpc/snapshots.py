"""The handlers of snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
from knnmoe.v1 import snapshots_pb2 as pb
from knnmoe.v1 import snapshots_pb2_grpc

from router_service.errors import InvalidField
from router_service.operations import Operations
from router_service.rpc import codec
from router_service.rpc.operations import encoded
from router_service.snapshots.base import SnapshotInfo, SnapshotRef
from router_service.snapshots.local import LocalSnapshotStore


class SnapshotService(snapshots_pb2_grpc.SnapshotServiceServicer):
    """Create, list, verify, restore, pack, delete."""

    def __init__(self, snapshots: LocalSnapshotStore, operations: Operations) -> None:
        self._snapshots, self._operations = snapshots, operations

    def CreateSnapshot(  # noqa: N802
        self, request: pb.CreateSnapshotRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.CreateSnapshotResponse]:
        """Copies a memory."""
        steps = self._operations.run(
            "snapshot-create",
            request.memory,
            lambda report: self._snapshots.create(request.memory, request.name, report),
            exclusive=False,
        )
        return encoded(steps, pb.CreateSnapshotResponse, _snapshot)

    def ListSnapshots(  # noqa: N802
        self, request: pb.ListSnapshotsRequest, context: grpc.ServicerContext
    ) -> pb.ListSnapshotsResponse:
        """The service's own, oldest first."""
        found = self._snapshots.list(request.memory)
        return pb.ListSnapshotsResponse(snapshots=map(_encode, found))

    def VerifySnapshot(  # noqa: N802
        self, request: pb.VerifySnapshotRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.VerifySnapshotResponse]:
        """Reads all of one."""
        ref = _decode_ref(request.snapshot)
        steps = self._operations.run(
            "snapshot-verify",
            ref.memory,
            lambda report: self._snapshots.verify(ref, report),
            exclusive=False,
        )
        return encoded(steps, pb.VerifySnapshotResponse, _snapshot)

    def RestoreSnapshot(  # noqa: N802
        self, request: pb.RestoreSnapshotRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.RestoreSnapshotResponse]:
        """Serves a copy of one."""
        ref, name, replace = _decode_ref(request.snapshot), request.as_memory, request.replace
        steps = self._operations.run(
            "snapshot-restore",
            name,
            lambda report: self._snapshots.restore(ref, name, replace, report),
        )
        return encoded(
            steps,
            pb.RestoreSnapshotResponse,
            lambda made: {"memory": codec.encode_memory(made.memory), "remark": made.remark},
        )

    def PackSnapshot(  # noqa: N802
        self, request: pb.PackSnapshotRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.PackSnapshotResponse]:
        """Writes one to a file."""
        steps = self._operations.run(
            "snapshot-pack",
            request.memory,
            lambda report: self._snapshots.pack(request.memory, request.name, request.path, report),
            exclusive=False,
        )
        return encoded(
            steps,
            pb.PackSnapshotResponse,
            lambda made: _snapshot(made.snapshot) | {"archive": str(made.archive)},
        )

    def DeleteSnapshot(  # noqa: N802
        self, request: pb.DeleteSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.DeleteSnapshotResponse:
        """Removes one."""
        removed = self._snapshots.delete(request.memory, request.name)
        return pb.DeleteSnapshotResponse(snapshot=_encode(removed))


def _decode_ref(message: pb.SnapshotRef) -> SnapshotRef:
    if not message.name and not message.path:
        raise InvalidField("snapshot", "nothing", "the name of a snapshot, or a path")
    return SnapshotRef(message.memory, message.name, message.path)


def _snapshot(info: SnapshotInfo) -> dict[str, Any]:
    return {"snapshot": _encode(info)}


def _encode(info: SnapshotInfo) -> pb.SnapshotDescription:
    return codec.filled(pb.SnapshotDescription, info, path=str(info.path), remark="")

"""The handlers of what leaves a memory."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
from knnmoe.v1 import retention_pb2 as pb
from knnmoe.v1 import retention_pb2_grpc

from router_service import checks
from router_service.arrays import U64
from router_service.deletion import EntryFilter, delete_entries
from router_service.errors import InvalidField
from router_service.maintenance.pruning_job import prune
from router_service.memory_store import MemoryStore
from router_service.operations import Operations
from router_service.rpc import codec
from router_service.rpc.operations import encoded
from router_service.rpc.prune_codec import decode_filter, decode_plan, encode_pruning


class RetentionService(retention_pb2_grpc.RetentionServiceServicer):
    """Delete, prune."""

    def __init__(self, store: MemoryStore, operations: Operations) -> None:
        self._store, self._operations = store, operations

    def Delete(self, request: pb.DeleteRequest, context: grpc.ServicerContext) -> pb.DeleteResponse:  # noqa: N802
        """Removes entries by id or by where they came from."""
        memory = self._store.get(request.memory)
        layers = memory.chosen_layers([request.layer] if request.HasField("layer") else [])
        what, fsync = _named_entries(request), codec.decode_fsync(request.durability)
        gone = delete_entries(memory, layers, what, fsync=fsync, dry_run=request.dry_run)
        return pb.DeleteResponse(
            layers=[
                pb.LayerDeletion(layer=one.layer, deleted=one.deleted, entries=one.entries)
                for one in gone
            ],
            deleted=sum(one.deleted for one in gone),
        )

    def Prune(  # noqa: N802
        self, request: pb.PruneRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.PruneResponse]:
        """Removes what a plan drops."""
        memory, dry_run = self._store.get(request.memory), request.dry_run
        layers, plan = memory.chosen_layers(request.layers), decode_plan(request.plan)
        steps = self._operations.run(
            "prune-dry-run" if dry_run else "prune",
            request.memory,
            lambda report: prune(memory, layers, plan, dry_run=dry_run, report=report),
            exclusive=not dry_run,
        )
        return encoded(steps, pb.PruneResponse, lambda done: {"layer": encode_pruning(done)})


def _named_entries(request: pb.DeleteRequest) -> U64 | EntryFilter:
    if request.WhichOneof("what") == "filter":
        return decode_filter("filter", request.filter)
    if request.WhichOneof("what") == "ids":
        ids = codec.decode_ids("ids", request.ids)
        checks.require_ids("ids", ids)
        return ids
    raise InvalidField("what", "nothing", "ids or a filter: what to delete")

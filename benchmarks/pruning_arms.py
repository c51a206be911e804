"""Which policies benchmarks.pruning compares, at which sizes, and the calls that prune a copy of the memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from knnmoe.channels import open_channel
from knnmoe.v1 import memory_admin_pb2 as admin
from knnmoe.v1 import retention_pb2 as pb
from knnmoe.v1 import snapshots_pb2 as snapshots
from knnmoe.v1.memory_admin_pb2_grpc import MemoryAdminServiceStub
from knnmoe.v1.retention_pb2_grpc import RetentionServiceStub
from knnmoe.v1.snapshots_pb2_grpc import SnapshotServiceStub

TIMEOUT_S = 1800.0
_SNAPSHOT = "full"
RANDOM = "random"
# Names as in `router-admin prune`; what comes before a "then" has a threshold, what comes last ranks.
POLICIES: Mapping[str, Mapping[str, Any]] = {
    RANDOM: {"by": pb.PRUNE_RANKING_RANDOM, "seed": 0},
    "random, again": {"by": pb.PRUNE_RANKING_RANDOM, "seed": 1},
    "age": {"by": pb.PRUNE_RANKING_AGE},
    "use": {"by": pb.PRUNE_RANKING_USE},
    "gain": {"by": pb.PRUNE_RANKING_GAIN},
    "strength": {"by": pb.PRUNE_RANKING_STRENGTH},
    "disagreement": {"by": pb.PRUNE_RANKING_DISAGREEMENT},
    "coverage": {"by": pb.PRUNE_RANKING_COVERAGE},
    "near-duplicates, then disagreement": {
        "near_duplicate_similarity": 0.9,
        "by": pb.PRUNE_RANKING_DISAGREEMENT,
    },
    "disagreement below 0, then strength": {
        "agreement_below": 0.0,
        "by": pb.PRUNE_RANKING_STRENGTH,
    },
}
CURVE = (RANDOM, "disagreement", "strength")
SHARES = (0.5, 0.25, 0.75)


@dataclass(frozen=True, slots=True)
class Arm:
    """One pruned memory; `recalibrate`: score it a second time with a gamma of its own."""

    policy: str
    share: float
    recalibrate: bool = False

    @property
    def by_use(self) -> bool:
        """Whether it asks for hit counts."""
        return self.plan().by == pb.PRUNE_RANKING_USE

    def plan(self) -> pb.PrunePlan:
        """What the service is asked for."""
        return pb.PrunePlan(max_share=self.share, **POLICIES[self.policy])


def arms(policies: Iterable[str] = tuple(POLICIES), shares: Iterable[float] = SHARES) -> list[Arm]:
    """Every policy at half; those of the curve at the other sizes too."""
    chosen = list(policies)
    return [
        Arm(policy, share, policy in CURVE and share <= 0.5)
        for share in shares
        for policy in chosen
        if share == 0.5 or policy in CURVE
    ]


@dataclass(frozen=True, slots=True)
class Size:
    """Of a memory, all layers."""

    entries: int
    disk_bytes: int


class Pruner:
    """Prunes one fresh copy of a memory after the other, all made of one snapshot of it.

    Copies start without hit counts: what scoring one of them retrieved is not known to the next.
    """

    def __init__(self, target: str, full: str, copy: str) -> None:
        self._full, self._copy = full, copy
        self._channel = open_channel(target)
        self._snapshots = SnapshotServiceStub(self._channel)
        self._retention = RetentionServiceStub(self._channel)
        self._admin = MemoryAdminServiceStub(self._channel)

    def __enter__(self) -> Pruner:
        request = snapshots.CreateSnapshotRequest(memory=self._full, name=_SNAPSHOT)
        drain(self._snapshots.CreateSnapshot(request, timeout=TIMEOUT_S))
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    @contextmanager
    def copied(self) -> Iterator[None]:
        """Within it, the copy is served."""
        ref = snapshots.SnapshotRef(memory=self._full, name=_SNAPSHOT)
        request = snapshots.RestoreSnapshotRequest(snapshot=ref, as_memory=self._copy)
        drain(self._snapshots.RestoreSnapshot(request, timeout=TIMEOUT_S))
        try:
            yield
        finally:
            request_gone = admin.DeleteMemoryRequest(memory=self._copy)
            self._admin.DeleteMemory(request_gone, timeout=TIMEOUT_S)

    def prune(self, arm: Arm) -> None:
        """Prunes the copy and indexes what is left."""
        request = pb.PruneRequest(memory=self._copy, plan=arm.plan())
        drain(self._retention.Prune(request, timeout=TIMEOUT_S))
        drain(self._admin.Optimize(admin.OptimizeRequest(memory=self._copy), timeout=TIMEOUT_S))

    def size_of(self, memory: str) -> Size:
        """As the service counts it."""
        found = self._admin.Stats(admin.StatsRequest(memory=memory), timeout=TIMEOUT_S)
        layers = found.memories[0].layers
        return Size(sum(at.entries for at in layers), sum(at.disk_bytes for at in layers))


def drain(replies: Iterable[object]) -> None:
    """Waits for the end of an operation; raises RpcError when it fails."""
    for _ in replies:
        pass

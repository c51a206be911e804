"""Replicas filled here, without a sidecar: what a follower would have made of the same entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from knnmoe.client import ExampleRef
from knnmoe.v1.types_pb2 import (
    MEMORY_KIND_ASSIGNMENT,
    MEMORY_KIND_LOGIT_DELTA,
    MEMORY_KIND_LOGITS,
    SIMILARITY_RBF,
    SUPPORT_TOP_K,
    SUPPORT_UNION,
    MemorySettings,
)
from torch import Tensor

from benchmarks.clustered import Workload
from benchmarks.exact import Reading
from benchmarks.olmoe import NULL_WEIGHT, STEP_SIZE
from benchmarks.timing import Lane
from model_runner.architectures.families import Assignment
from model_runner.lookup_lock import LookupLock
from model_runner.replica.first_pass import CodedFirstPass
from model_runner.replica.layer import LayerReplica
from model_runner.replica.plans import Plan
from model_runner.replica.retriever import ReplicaRetriever

TOKENS_PER_EXAMPLE = 128
# Rows beyond the entries, as a follower reserves them.
HEADROOM = 8
# The first one trains a first pass, the second one has as many tokens as plans are measured on, the third one reads it.
LOOKUPS_TO_SETTLE = 3

KINDS = {
    "deltas": MEMORY_KIND_LOGIT_DELTA,
    "logits": MEMORY_KIND_LOGITS,
    "assignments": MEMORY_KIND_ASSIGNMENT,
}


@dataclass(slots=True)
class Filled:
    """A copy that nobody follows; see replica.retriever.Copy."""

    layers: dict[int, LayerReplica]
    settings: MemorySettings
    lock: LookupLock
    examples: dict[ExampleRef, int] = field(default_factory=dict)
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers of one memory that several retrievers read, each by settings of its own."""

    layers: dict[int, LayerReplica]
    lock: LookupLock
    num_experts: int

    @classmethod
    def of(
        cls,
        keys: Sequence[Tensor],
        values: Sequence[Tensor | Assignment],
        num_experts: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Layers:
        """Keys [n, d] and values by layer: logits or logit deltas f32 [n, N], or assignments [n, k]."""
        lock, layers = LookupLock(), {}
        for number, (rows, each) in enumerate(zip(keys, values, strict=True)):
            wide = (
                torch.cat([each.experts, each.weights], 1) if isinstance(each, Assignment) else each
            )
            layer = LayerReplica(
                rows.shape[1], wide.shape[1], dtype=dtype, device=device, lock=lock
            )
            layer.reserve(len(rows) + len(rows) // HEADROOM)
            ids = np.arange(1, len(rows) + 1, dtype=np.uint64)
            examples = np.arange(len(rows)) // TOKENS_PER_EXAMPLE
            layer.stage(ids, rows.to(dtype), None, wide.float(), examples, ids)
            layer.commit()
            layers[number] = layer
        return cls(layers, lock, num_experts)

    def read_by(self, settings: MemorySettings) -> ReplicaRetriever:
        """A retriever that raises when it cannot answer."""
        copy = Filled(self.layers, settings, self.lock)
        return ReplicaRetriever(copy, self.num_experts, on_error="raise")


def settings_of(
    neighbours: int,
    gammas: Sequence[float],
    *,
    values: str = "deltas",
    step_size: float = STEP_SIZE,
    null_weight: float = NULL_WEIGHT,
    union: bool = False,
    layers: Sequence[int] = (),
) -> MemorySettings:
    """RBF over stored vectors, every field that a replica reads set; `layers`: it speaks for these alone.

    values: one of KINDS.
    """
    return MemorySettings(
        kind=KINDS[values],
        similarity=SIMILARITY_RBF,
        neighbours=neighbours,
        gamma=gammas,
        step_size=[step_size],
        null_weight=null_weight,
        min_lambda=0.0,
        support=SUPPORT_UNION if union else SUPPORT_TOP_K,
        layers=layers,
    )


def settle(retriever: ReplicaRetriever, tokens: Sequence[Tensor]) -> dict[int, dict[int, Plan]]:
    """Looks up tokens [n, d] of each layer until its first pass is measured on them; the plans by layer and K."""
    plans = {}
    for number, layer in retriever.copy.layers.items():
        rows, experts = len(tokens[number]), retriever.num_experts
        own = Assignment(torch.zeros(rows, 1), torch.zeros(rows, 1, dtype=torch.int64))
        for _ in range(LOOKUPS_TO_SETTLE):
            retriever.lookup(number, tokens[number], torch.zeros(rows, experts), own)
            if isinstance(layer.first_pass, CodedFirstPass):
                layer.first_pass.wait()
                plans[number] = layer.first_pass.plans
    return plans


def replica_lane(layers: Layers, workload: Workload, k: int, reading: Reading) -> Lane:
    """From router inputs in f16 to the blended logits."""
    settings = settings_of(
        k, [reading.gamma], step_size=reading.step_size, null_weight=reading.null_weight
    )
    retriever = layers.read_by(settings)
    settle(retriever, [torch.from_numpy(workload.held_out)])
    inputs, logits = torch.from_numpy(workload.queries), torch.from_numpy(workload.logits)
    own = Assignment(torch.zeros(len(inputs), 1), torch.zeros(len(inputs), 1, dtype=torch.int64))

    def call(tokens: slice) -> None:
        mine = Assignment(own.weights[tokens], own.experts[tokens])
        retriever.lookup(0, inputs[tokens], logits[tokens], mine)

    return Lane("replica", "in-process", "f16", k, call)


def tensor_bytes(layer: LayerReplica) -> int:
    """Of everything that a layer keeps on its device, with its first pass."""
    kept = [each for each in vars(layer).values() if isinstance(each, Tensor)]
    coded = layer.first_pass.nbytes if isinstance(layer.first_pass, CodedFirstPass) else 0
    return coded + sum(each.numel() * each.element_size() for each in kept)

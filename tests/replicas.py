"""A memory of made-up entries, twice: as a replica, and as the service's own code over the oracle has it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from knnmoe.client import ExampleRef
from knnmoe.v1 import types_pb2 as pb
from torch import Tensor

from model_runner.architectures.families import Assignment
from model_runner.lookup_lock import LookupLock
from model_runner.replica.layer import LayerReplica
from model_runner.replica.retriever import ReplicaRetriever
from router_service.arrays import Assignment as ServiceAssignment
from router_service.arrays import Entries, Provenance
from router_service.arrays import ExampleRef as ServiceRef
from router_service.backends.base import CollectionSpec
from router_service.backends.exact import ExactCollection
from router_service.blending import Support
from router_service.memories.layer import LayerMemory, RouteAnswer, RouteQuery
from router_service.memories.settings import Kind, MemorySettings, Similarity


@dataclass
class Copy:
    """A replica that nobody follows."""

    layers: dict[int, LayerReplica] = field(default_factory=dict)
    settings: pb.MemorySettings = field(default_factory=pb.MemorySettings)
    examples: dict[ExampleRef, int] = field(default_factory=dict)
    complete: bool = True
    lock: LookupLock = field(default_factory=LookupLock)


def random_copy(
    settings: MemorySettings,
    layers: int,
    dimension: int,
    num_experts: int,
    top_k: int,
    entries: int,
) -> Copy:
    """Entries of made-up keys and values in every layer; the example of entry n is `examples[n % 5]`."""
    copy = Copy(settings=message(settings))
    copy.examples = {ExampleRef("text", str(number)): number for number in range(5)}
    dense = settings.kind.blends_logits
    generator = torch.Generator().manual_seed(0)
    ids = np.arange(entries, dtype=np.uint64)
    for number in range(layers):
        values = torch.rand(entries, num_experts if dense else 2 * top_k, generator=generator)
        if not dense:
            chosen = torch.rand(entries, num_experts, generator=generator).topk(top_k)
            values[:, :top_k] = chosen.indices
        layer = LayerReplica(dimension, values.shape[1], lock=copy.lock)
        keys = torch.randn(entries, dimension, generator=generator)
        layer.stage(ids, keys, None, values, ids.astype(np.int64) % 5, ids)
        layer.commit()
        copy.layers[number] = layer
    return copy


def message(settings: MemorySettings) -> pb.MemorySettings:
    """The settings on the wire."""
    kinds = {
        Kind.ASSIGNMENT: pb.MEMORY_KIND_ASSIGNMENT,
        Kind.LOGIT_DELTA: pb.MEMORY_KIND_LOGIT_DELTA,
        Kind.LOGITS: pb.MEMORY_KIND_LOGITS,
    }
    kernels = {Similarity.RBF: pb.SIMILARITY_RBF, Similarity.COSINE: pb.SIMILARITY_COSINE}
    supports = {Support.UNION: pb.SUPPORT_UNION, Support.TOP_K: pb.SUPPORT_TOP_K}
    return pb.MemorySettings(
        kind=kinds[settings.kind],
        similarity=kernels[settings.similarity],
        neighbours=settings.neighbours,
        gamma=settings.gamma,
        step_size=settings.step_size,
        null_weight=settings.null_weight,
        min_lambda=settings.min_lambda,
        support=supports[settings.support],
        layers=settings.layers,
    )


@dataclass
class TwinMemory:
    """One layer's entries under the same settings on both sides."""

    settings: MemorySettings
    dimension: int
    num_experts: int
    top_k: int
    entries: int
    examples: int = 5
    layer: int = 1
    seed: int = 0
    dtype: torch.dtype = torch.float32
    copy: Copy = field(init=False)
    service: LayerMemory = field(init=False)
    retriever: ReplicaRetriever = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.keys = rng.normal(size=(self.entries, self.dimension)).astype(np.float32)
        values = self._values(rng)
        ids = rng.permutation(10 * self.entries + 1)[: self.entries].astype(np.uint64)
        names = [str(number % self.examples) for number in range(self.entries)]
        spec = CollectionSpec(self.dimension, self.settings.similarity.metric, values.shape[1])
        collection = ExactCollection(spec)
        origins = [Provenance("text", name, n) for n, name in enumerate(names)]
        if self.entries:
            collection.upsert(Entries(ids, self.keys, values, origins))
        self.service = LayerMemory(self.layer, collection, self.num_experts, self.top_k)
        self.copy = Copy(settings=message(self.settings))
        self.copy.examples = {ExampleRef("text", str(n)): n for n in range(self.examples)}
        replica = LayerReplica(
            self.dimension, values.shape[1], dtype=self.dtype, lock=self.copy.lock
        )
        stored = torch.from_numpy(collection.scroll(None, self.entries).keys)
        order = np.argsort(ids)
        numbers = np.arange(self.entries)[order] % self.examples
        replica.stage(
            *(ids[order], stored.to(self.dtype), None, torch.from_numpy(values[order])),
            *(numbers.astype(np.int64), ids[order]),
        )
        replica.commit()
        self.copy.layers[self.layer] = replica
        self.retriever = ReplicaRetriever(self.copy, self.num_experts)

    def _values(self, rng: np.random.Generator) -> np.ndarray:
        if self.settings.kind.blends_logits:
            return rng.normal(size=(self.entries, self.num_experts)).astype(np.float32)
        shuffled = rng.permuted(np.tile(np.arange(self.num_experts), (self.entries, 1)), axis=1)
        weights = rng.dirichlet(np.ones(self.top_k), self.entries)
        return np.hstack([shuffled[:, : self.top_k], weights]).astype(np.float32)

    def tokens(self, count: int, seed: int = 1) -> tuple[Tensor, Tensor, Assignment]:
        """Router inputs near keys, some far; logits; their own assignment."""
        rng = np.random.default_rng(seed)
        near = self.keys[rng.integers(0, max(1, self.entries), count)] if self.entries else 0.0
        spread = rng.choice([0.01, 0.2, 3.0], (count, 1))
        inputs = near + spread * rng.normal(size=(count, self.dimension))
        logits = torch.from_numpy(rng.normal(size=(count, self.num_experts)).astype(np.float32))
        weights, experts = logits.softmax(-1).topk(self.top_k)
        return torch.from_numpy(inputs.astype(np.float32)), logits, Assignment(weights, experts)

    def routed(
        self, inputs: Tensor, logits: Tensor, own: Assignment, exclude: list[str] | None = None
    ) -> RouteAnswer:
        """What the service answers; exclude: an example per sequence."""
        each = len(inputs) // len(exclude) if exclude else 0
        refs = [ServiceRef("text", name) for name in exclude or () for _ in range(each)]
        routing = (
            logits.numpy()
            if self.settings.kind.blends_logits
            else ServiceAssignment(own.experts.int().numpy(), own.weights.numpy())
        )
        return self.service.route(RouteQuery(inputs.numpy(), routing, exclude=refs), self.settings)

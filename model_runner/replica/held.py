"""A copy of a memory that nobody follows: entries that this process made, or has read, searched beside the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from knnmoe.client import ExampleRef
from knnmoe.v1.types_pb2 import MemorySettings
from torch import Tensor

from model_runner.lookup_lock import LookupLock, drain_of
from model_runner.replica.layer import LayerReplica
from model_runner.replica.retriever import Copy, ReplicaRetriever
from model_runner.router_client import OnError
from model_runner.routing_policy import RetrievalPolicy


@dataclass(slots=True)
class HeldMemory:
    """A retriever.Copy. Every field of `settings` is set.

    Attributes:
        examples: the number of each example that an entry came from.

    """

    layers: dict[int, LayerReplica]
    settings: MemorySettings
    examples: dict[ExampleRef, int]
    lock: LookupLock
    complete: bool = field(default=True, init=False)

    @classmethod
    def of(
        cls,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        origins: Sequence[Sequence[ExampleRef]],
        settings: MemorySettings,
    ) -> HeldMemory:
        """Of each layer's keys [n, d], values [n, W], and the example of each entry [n]."""
        device = keys[0].device
        lock, examples = LookupLock(drain_of(device)), dict[ExampleRef, int]()
        layers = {}
        for number, (layer_keys, layer_values, refs) in enumerate(
            zip(keys, values, origins, strict=True)
        ):
            of_entries = [examples.setdefault(ref, len(examples)) for ref in refs]
            layer = LayerReplica(
                layer_keys.shape[1], layer_values.shape[1], device=device, lock=lock
            )
            ids = np.arange(len(layer_keys), dtype=np.uint64)
            layer.stage(
                *(ids, layer_keys.float(), None, layer_values.float()),
                *(np.array(of_entries, np.int64), ids),
            )
            layer.commit()
            layers[number] = layer
        return cls(layers, settings, examples, lock)

    def read_with(self, settings: MemorySettings) -> HeldMemory:
        """The same entries, read otherwise: with the fields that are set in `settings`, a list when it is not empty."""
        changed = MemorySettings()
        changed.CopyFrom(self.settings)
        for name, value in settings.ListFields():
            changed.ClearField(name.name)
            changed.MergeFrom(MemorySettings(**{name.name: value}))
        return replace(self, settings=changed)


def policy_of(memory: Copy, num_experts: int, first_pass: str = "exact") -> RetrievalPolicy:
    """Reads a copy of a memory; first_pass: as of ReplicaRetriever, by default every entry is looked at."""
    return RetrievalPolicy(
        ReplicaRetriever(memory, num_experts, on_error=OnError.RAISE, first_pass=first_pass)
    )

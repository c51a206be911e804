"""The copy of a memory that a follower fills: messages of the stream into the layers, and what they did back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from knnmoe import tensors
from knnmoe.client import ExampleRef
from knnmoe.client.replication import HeldEntries
from knnmoe.v1 import replication_pb2 as pb
from knnmoe.v1.routing_pb2 import MemoryDescription
from knnmoe.v1.types_pb2 import DTYPE_BF16, DTYPE_F16, DTYPE_F32, DTYPE_I8, Dtype, MemorySettings
from torch import Tensor

from model_runner.lookup_lock import LookupLock, drain_of
from model_runner.replica.budget import (
    Budget,
    KeyDtype,
    ReplicaFull,
    ReplicaSize,
    capacity_for,
    replica_size,
)
from model_runner.replica.layer import I64, LayerReplica
from model_runner.wire import decode_as_sent

# How keys are kept, and how they are sent.
DTYPES: dict[KeyDtype, tuple[torch.dtype, Dtype]] = {
    "f32": (torch.float32, DTYPE_F32),
    "f16": (torch.float16, DTYPE_F16),
    "bf16": (torch.bfloat16, DTYPE_BF16),
    "int8": (torch.int8, DTYPE_I8),
}
# Staged in one go: each row takes some Python, which a forward pass in another thread waits for.
ROWS_AT_ONCE = 128
# Examples that are kept however few of them entries came from.
FEW_EXAMPLES = 4096


class AskAgain(Exception):
    """The stream does not bring what the copy needs now: it is to be asked for anew, from what is held."""


class ReplicaCopy:
    """Layers of one memory on a device. For the follower's thread; lookups read the rest of it within `lock`.

    Attributes:
        layers: by number; those that the memory's settings speak for.
        settings: as of the last commit; every field is set.
        lock: shared by all layers, so that a change of several takes effect at once.
        examples: the number of each example that an entry came from; others are forgotten now and then, for where a
            memory learns and forgets they would grow without end.
        complete: whether it was all there once, since it was last empty.
        model_digest: of the model that the memory was made for.

    """

    def __init__(
        self, device: torch.device, keys: KeyDtype, budget: Budget, first_pass: str = "exact"
    ) -> None:
        """first_pass: of the lookups; it takes a part of the budget."""
        self.layers: dict[int, LayerReplica] = {}
        self.settings = MemorySettings()
        self.lock = LookupLock(drain_of(device))
        self.examples: dict[ExampleRef, int] = {}  # replaced as a whole when some are forgotten
        self._numbered, self._many_examples = 0, FEW_EXAMPLES
        self.complete = False
        self.model_digest = ""
        self._device, self._keys, self._budget = device, keys, budget
        self._first_pass = first_pass
        self._size: ReplicaSize | None = None
        self._kind = MemorySettings().kind
        self._next: MemorySettings | None = None

    @property
    def wire_dtype(self) -> Dtype:
        """In which keys are to be sent."""
        return DTYPES[self._keys][1]

    @property
    def layers_to_ask_for(self) -> list[int]:
        """Those that are held; none, which is all, before it is known which."""
        return sorted(self.layers)

    def held(self) -> dict[int, HeldEntries]:
        """Ids and digests of what is there, by layer."""
        return {number: layer.held() for number, layer in self.layers.items() if len(layer)}

    def number_of(self, example: ExampleRef) -> int:
        """Of an example, whether an entry came from it or not."""
        number = self.examples.get(example)
        if number is None:
            number = self.examples[example] = self._numbered
            self._numbered += 1
        return number

    def prepare(self, memory: MemoryDescription) -> None:
        """Makes room for a memory's entries. Raises ReplicaTooLarge when they do not fit."""
        size = replica_size(memory, self._keys, self._device, self._first_pass)
        if memory.settings.kind != self._kind:
            self._clear()
        missing = sorted(size.entries.keys() - self.layers.keys())
        if missing:
            self._budget.require(size)
        self._size, self._kind = size, memory.settings.kind
        for number in missing:
            layer = LayerReplica(
                *(size.hidden_size, size.value_width),
                dtype=DTYPES[self._keys][0],
                device=self._device,
                lock=self.lock,
            )
            layer.reserve(capacity_for(size.entries[number]))
            self.layers[number] = layer

    def begin(self, memory: MemoryDescription) -> None:
        """A stream begins. Raises ReplicaTooLarge; AskAgain when it was asked for other layers."""
        asked_for = set(self.layers) or {layer.layer for layer in memory.layers}
        held = set(self.held())
        self.prepare(memory)
        if asked_for != set(self.layers) or held != set(self.held()):
            raise AskAgain(f"memory {memory.name!r} has other layers now")
        self.model_digest = memory.model_digest
        self._next = memory.settings

    def stage(self, message: pb.ReplicateResponse) -> int:
        """Keeps a change until commit(); returns how many entries it brings.

        Raises AskAgain for what there is no room for yet, ReplicaFull where there never is, TensorError and BadInput
        for what contradicts itself.
        """
        kind = message.WhichOneof("message")
        if kind == "upserted":
            return self._stage_entries(message.upserted)
        if kind == "deleted":
            layer = self.layers[message.deleted.layer]
            layer.stage_deletion(tensors.to_array(message.deleted.ids))
        elif kind == "settings":
            self._next = message.settings
            if set(self._next.layers) - self.layers.keys():
                raise AskAgain("the memory speaks for more layers now")
        return 0

    def commit(self) -> None:
        """What was staged takes effect, all at once."""
        flips = [
            (layer, flip)
            for layer in self.layers.values()
            if (flip := layer.prepared()) is not None
        ]
        if flips or self._next is not None:
            with self.lock.committing():
                for layer, flip in flips:
                    layer.flip(flip)
                self.settings = self._next or self.settings
            for layer, flip in flips:
                layer.settle(flip)
            self._forget_examples()
        self._next, self.complete = None, True

    def cut(self) -> None:
        """The stream ended. What came since the last commit is forgotten; in a first copy it is kept, and held."""
        self._next = None
        for layer in self.layers.values():
            if self.complete:
                layer.discard()
            else:
                layer.commit()

    def take_hits(self, most_ids: int) -> Iterator[pb.LayerHits]:
        """What lookups did since it was last called, by layer; in parts of so many ids."""
        for number, layer in self.layers.items():
            ids, hits = layer.take_hits()
            lookups, tokens, abstained, lambda_sum = layer.take_counts()
            if not lookups and not len(ids):
                continue
            yield pb.LayerHits(
                layer=number,
                ids=tensors.to_tensor(ids[:most_ids]),
                hits=tensors.to_tensor(hits[:most_ids]),
                lookups=lookups,
                tokens=tokens,
                tokens_abstained=abstained,
                lambda_sum=lambda_sum,
            )
            for start in range(most_ids, len(ids), most_ids):
                part = slice(start, start + most_ids)
                more_ids, more_hits = tensors.to_tensor(ids[part]), tensors.to_tensor(hits[part])
                yield pb.LayerHits(layer=number, ids=more_ids, hits=more_hits)

    def _clear(self) -> None:
        with self.lock.committing():
            self.layers.clear()
            self.complete = False

    def _forget_examples(self) -> None:
        """Those that no entry came from, once they may be the most; nothing is staged."""
        if len(self.examples) <= self._many_examples:
            return
        used = set().union(*(layer.examples_in_use() for layer in self.layers.values()))
        items, kept = iter(self.examples.items()), dict[ExampleRef, int]()
        while part := list(islice(items, ROWS_AT_ONCE)):
            kept.update((example, number) for example, number in part if number in used)
            time.sleep(0)  # lets a forward pass go on
        self.examples, self._many_examples = kept, max(FEW_EXAMPLES, 2 * len(kept))

    def _stage_entries(self, message: pb.ReplicaEntries) -> int:
        ids, digests = tensors.to_array(message.ids), tensors.to_array(message.digests)
        keys, values, examples = decode_as_sent(message.keys), _values(message), self._of(message)
        scales = decode_as_sent(message.scales) if message.HasField("scales") else None
        layer = self._with_room(message.layer, len(ids))
        for start in range(0, len(ids), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            layer.stage(
                *(ids[part], keys[part], None if scales is None else scales[part]),
                *(values[part], examples[part], digests[part]),
            )
        return len(ids)

    def _of(self, message: pb.ReplicaEntries) -> I64:
        """Numbers [n] of the examples that entries came from."""
        numbers = [self.number_of(ExampleRef(e.source, e.example)) for e in message.examples]
        return np.array(numbers, np.int64)[tensors.to_array(message.example_numbers)]

    def _with_room(self, number: int, entries: int) -> LayerReplica:
        """A layer that so many more entries fit into, within the budget."""
        layer = self.layers[number]
        missing = entries - layer.free_rows
        if missing > 0 and self._size is not None:
            others = sum(other.capacity for other in self.layers.values()) - layer.capacity
            most = self._budget.bytes // self._size.row_bytes - others
            if layer.capacity + missing > most:
                if self.complete and self._size.bytes <= self._budget.bytes:
                    self._clear()
                    raise AskAgain("old and new entries do not fit side by side: it is copied anew")
                raise ReplicaFull(self._size, self._budget, number, layer.capacity + missing)
            layer.reserve(entries, most)
        return layer


def _values(message: pb.ReplicaEntries) -> Tensor:
    """f32 [n, W]: logits or deltas, or experts and then weights."""
    field = message.WhichOneof("values")
    if field in ("logits", "logit_deltas"):
        return decode_as_sent(getattr(message, field))
    experts = decode_as_sent(message.assignments.experts)
    weights = decode_as_sent(message.assignments.weights)
    return torch.cat([experts.float(), weights.float()], dim=1)

"""Entries on the wire: ids, provenance, and Upsert requests of a size that keeps no lookup waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from knnmoe import tensors
from knnmoe.entry_ids import entry_id
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1.types_pb2 import Provenance
from torch import Tensor

from model_runner.architectures.families import Assignment
from model_runner.texts import Window
from model_runner.wire import encode_assignment, encode_floats

# The one place where the runner cuts an upsert: entries per request, and bytes of their keys and values. Far below the
# message limit, because lookups of the same layer wait while a request is written.
ENTRIES_PER_REQUEST = 1024
REQUEST_BYTES = 1024 * 1024
# Added to keys and values for an entry's id and provenance.
_BYTES_BESIDE = 128


@dataclass(frozen=True, slots=True)
class Destination:
    """Where entries go: `model_digest` is the fingerprint's."""

    memory: str
    model_digest: str
    durability: pb.Durability = pb.DURABILITY_PROCESS


@dataclass(frozen=True, slots=True)
class LayerEntries:
    """n entries of one layer: ids u64 [n], keys [n, d], values an assignment [n, k] or logit deltas [n, N]."""

    layer: int
    ids: np.ndarray[tuple[int], np.dtype[np.uint64]]
    keys: Tensor
    values: Assignment | Tensor
    provenance: Sequence[Provenance]

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, rows: Tensor) -> LayerEntries:
        """The entries whose row numbers ([m] int64) are given."""
        at = rows.tolist()
        return LayerEntries(
            self.layer,
            self.ids[at],
            self.keys[rows],
            _value_rows(self.values, rows),
            [self.provenance[row] for row in at],
        )


def upsert_requests(entries: LayerEntries, to: Destination) -> Iterator[pb.UpsertRequest]:
    """Requests of at most ENTRIES_PER_REQUEST entries and about REQUEST_BYTES; one entry at least."""
    most = max(1, min(ENTRIES_PER_REQUEST, REQUEST_BYTES // _entry_bytes(entries)))
    for start in range(0, len(entries), most):
        rows = slice(start, start + most)
        message = pb.Entries(
            ids=tensors.to_tensor(entries.ids[rows]),
            keys=encode_floats(entries.keys[rows]),
            provenance=entries.provenance[rows],
        )
        values = _value_rows(entries.values, rows)
        if isinstance(values, Assignment):
            message.assignments.CopyFrom(encode_assignment(values))
        else:
            message.logit_deltas.CopyFrom(encode_floats(values))
        yield pb.UpsertRequest(
            memory=to.memory,
            layer=entries.layer,
            entries=message,
            durability=to.durability,
            model_digest=to.model_digest,
        )


def entry_ids(windows: Sequence[Window]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Ids [n] of the windows' entries, in the order of a batch's `predicts`."""
    return np.fromiter(
        (entry_id(w.ref.source, w.ref.example, position) for w, position in _places(windows)),
        dtype=np.uint64,
    )


def provenance_of(windows: Sequence[Window], gains: Tensor) -> list[Provenance]:
    """Provenance of the windows' entries, in the order of `entry_ids`; gains [n] in nats."""
    now = time.time_ns() // 1_000_000
    return [
        Provenance(
            source=window.ref.source,
            example=window.ref.example,
            position=position,
            token=window.token_ids[position - window.offset],
            gain=gain,
            created_unix_ms=now,
        )
        for (window, position), gain in zip(_places(windows), gains.tolist(), strict=True)
    ]


def _places(windows: Sequence[Window]) -> Iterator[tuple[Window, int]]:
    for window in windows:
        for token in range(window.first_target - 1, len(window.token_ids) - 1):
            yield window, window.offset + token


def _value_rows(values: Assignment | Tensor, rows: slice | Tensor) -> Assignment | Tensor:
    if isinstance(values, Assignment):
        return Assignment(values.weights[rows], values.experts[rows])
    return values[rows]


def _entry_bytes(entries: LayerEntries) -> int:
    parts: tuple[Tensor, ...] = (entries.keys,)
    if isinstance(entries.values, Assignment):
        parts += (entries.values.weights, entries.values.experts)
    else:
        parts += (entries.values,)
    return _BYTES_BESIDE + sum(part.shape[1] * part.element_size() for part in parts)

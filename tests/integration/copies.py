"""A copy of a memory as a client makes it of the messages of Replicate, and the same of what Export says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from knnmoe import tensors
from knnmoe.client import ReplicaStream, ReplicationClient
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import replication_pb2 as pb
from knnmoe.v1 import types_pb2 as types_pb

from tests.sidecar import (
    DENSE_VALUES,
    LAYERS,
    LOGIT_DELTA,
    Sidecar,
    exported,
    make_fingerprint,
    random_entries,
)

Row = tuple[bytes, bytes]


@dataclass
class Copy:
    """What a client makes of the messages: by layer and id the bytes of key and value."""

    rows: dict[int, dict[int, Row]] = field(
        default_factory=lambda: {layer: {} for layer in range(LAYERS)}
    )
    digests: dict[int, dict[int, int]] = field(
        default_factory=lambda: {layer: {} for layer in range(LAYERS)}
    )
    position: pb.ReplicaPosition | None = None
    start: pb.ReplicaStart | None = None
    settings: types_pb.MemorySettings | None = None
    upserted: int = 0
    deleted: int = 0

    def take(self, message: pb.ReplicateResponse) -> bool:
        """Whether it was a `synced`."""
        match message.WhichOneof("message"):
            case "start":
                self.start = message.start
                self.settings = message.start.memory.settings
            case "upserted":
                self._upsert(message.upserted)
            case "deleted":
                ids = tensors.to_array(message.deleted.ids).tolist()
                self.deleted += len(ids)
                for number in ids:
                    self.rows[message.deleted.layer].pop(number, None)
                    self.digests[message.deleted.layer].pop(number, None)
            case "settings":
                self.settings = message.settings
            case "synced":
                self.position = message.synced.position
                return True
        return False

    def _upsert(self, entries: pb.ReplicaEntries) -> None:
        rows = rows_of(entries)
        self.upserted += len(rows)
        self.rows[entries.layer].update(rows)
        digests = tensors.to_array(entries.digests).tolist()
        self.digests[entries.layer].update(zip(rows, digests, strict=True))

    def sync(self, stream: ReplicaStream, least: int = 0) -> None:
        """Takes messages until it is of a version."""
        for message in stream:
            if self.take(message) and self.position.version >= least:
                return
        raise AssertionError("the stream ended")

    def held(self) -> dict[int, tuple[tensors.Array, tensors.Array]]:
        found = {}
        for layer, digests in self.digests.items():
            ids = sorted(digests)
            found[layer] = (
                np.array(ids, np.uint64),
                np.array([digests[number] for number in ids], np.uint64),
            )
        return found


def rows_of(entries: pb.ReplicaEntries | admin_pb.Entries) -> dict[int, Row]:
    ids, keys = tensors.to_array(entries.ids), tensors.to_array(entries.keys)
    field = entries.WhichOneof("values")
    if field in DENSE_VALUES.values():
        values = tensors.to_array(getattr(entries, field))
    else:
        both = entries.assignments
        values = np.hstack([tensors.to_array(both.experts), tensors.to_array(both.weights)])
    pairs = zip(ids.tolist(), keys, values, strict=True)
    return {number: (key.tobytes(), value.tobytes()) for number, key, value in pairs}


def stored(sidecar: Sidecar, name: str) -> dict[int, dict[int, Row]]:
    """By layer, what Export says."""
    found: dict[int, dict[int, Row]] = {}
    for layer in range(LAYERS):
        found[layer] = {}
        for part in exported(sidecar, name, layer):
            found[layer].update(rows_of(part))
    return found


@contextmanager
def following(sidecar: Sidecar, name: str, **wanted: Any) -> Iterator[ReplicaStream]:
    with ReplicationClient(sidecar.target, name, make_fingerprint()) as client:
        stream = client.replicate(**wanted)
        try:
            yield stream
        finally:
            stream.cancel()


def fill(
    sidecar: Sidecar, name: str, rows: int = 60, kind: int = LOGIT_DELTA, **settings: Any
) -> None:
    sidecar.create(name, kind=kind, **settings)
    for layer in range(LAYERS):
        sidecar.upsert(name, layer, random_entries(kind, rows, seed=layer))

"""Entries: ids, provenance, Upsert requests of a size that keeps no lookup waiting; what a memory holds of a text."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from knnmoe import tensors
from knnmoe.client import AdminClient
from knnmoe.entry_ids import entry_id
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1 import retention_pb2
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
# Ids of one Delete request: half a megabyte.
_IDS_PER_REQUEST = 1 << 16


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
        (
            entry_id(w.ref.source, w.identity or w.ref.example, position)
            for w, position in _places(windows)
        ),
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


@dataclass(frozen=True, slots=True)
class KnownText:
    """What a memory holds of a text's source.

    Attributes:
        windows: the text's, under the names that the memory knows them by.
        by_tokens: how many of them have the ids of version 0.1, which do not say what text they are of; their tokens
            agree with those stored, which are all but each window's last.
        changed: ids of examples that the memory holds with other text.
        others: entries of the source's other texts in the last layer.
        is_there: whether the last layer has an entry of every token with a loss.

    """

    windows: list[Window]
    by_tokens: int = 0
    changed: tuple[str, ...] = ()
    others: int = 0
    is_there: bool = False


def known_text(client: AdminClient, memory: str, windows: Sequence[Window]) -> KnownText:
    """Compares windows of one source with the last layer of a memory, the one that is written last.

    Reads where that layer's entries come from, all of them: about a second for 100,000.
    """
    layer, text = client.describe(memory).layers[-1], list(windows)
    if not layer.entries:
        return KnownText(text)
    [source] = {window.ref.source for window in text}
    stored = dict(_entries_of(client, memory, layer.layer, source))
    ours = dict.fromkeys(entry_ids(text).tolist())
    others = defaultdict[str, dict[int, Provenance]](dict)
    for number, origin in stored.items():
        if number not in ours:
            others[origin.example][number] = origin
    examples = defaultdict[str, list[Window]](list)
    for window in text:
        examples[window.identity or window.ref.example].append(window)
    changed, earlier = list[str](), dict[str, str]()
    for identity, group in examples.items():
        one = group[0]
        same_name = others.get(one.name, {}) if one.name else {}
        if _are_of_earlier_version(same_name, one) and _agree(same_name, group):
            earlier[identity] = one.name
            del others[one.name]
        elif same_name and one.ref.example == one.name:
            changed.append(one.name)
    renamed = [_renamed(w, earlier.get(w.identity)) for w in text]
    return KnownText(
        renamed,
        sum(w.identity in earlier for w in text),
        tuple(changed),
        sum(map(len, others.values())),
        all(number in stored for number in entry_ids(renamed).tolist()),
    )


def forget_other_texts(
    client: AdminClient,
    memory: str,
    windows: Sequence[Window],
    durability: pb.Durability = pb.DURABILITY_PROCESS,
) -> int:
    """Deletes what a memory holds of these windows' source, but their own entries; returns how many went."""
    [source] = {window.ref.source for window in windows}
    ours, gone = set(entry_ids(windows).tolist()), 0
    for layer in client.describe(memory).layers:
        there = [number for number, _ in _entries_of(client, memory, layer.layer, source)]
        ids = np.array([number for number in there if number not in ours], np.uint64)
        for start in range(0, len(ids), _IDS_PER_REQUEST):
            request = retention_pb2.DeleteRequest(
                memory=memory,
                layer=layer.layer,
                ids=tensors.to_tensor(ids[start : start + _IDS_PER_REQUEST]),
                durability=durability,
            )
            gone += client.unary(client.retention.Delete, request, long=True).deleted
    return gone


def _entries_of(
    client: AdminClient, memory: str, layer: int, source: str
) -> Iterator[tuple[int, Provenance]]:
    """Id and provenance of each entry of a source."""
    request = pb.ExportRequest(memory=memory, layer=layer, without_keys=True)
    for reply in client.replies(client.admin.Export(request)):
        ids = tensors.to_array(reply.entries.ids).tolist()
        for number, origin in zip(ids, reply.entries.provenance, strict=True):
            if origin.source == source:
                yield number, origin


def _are_of_earlier_version(stored: dict[int, Provenance], window: Window) -> bool:
    """Whether ids are made of the example's name alone."""
    source, name = window.ref.source, window.name
    return bool(stored) and all(
        number == entry_id(source, name, origin.position) for number, origin in stored.items()
    )


def _agree(stored: dict[int, Provenance], windows: Sequence[Window]) -> bool:
    """Whether each entry is of the token at its position in the windows."""
    tokens = {
        window.offset + at: token for window in windows for at, token in enumerate(window.token_ids)
    }
    return all(tokens.get(origin.position) == origin.token for origin in stored.values())


def _renamed(window: Window, name: str | None) -> Window:
    """As version 0.1 named it, when it did."""
    if name is None:
        return window
    return replace(window, ref=replace(window.ref, example=name), identity="")


def _places(windows: Sequence[Window]) -> Iterator[tuple[Window, int]]:
    for window in windows:
        for target in window.target_at:
            yield window, window.offset + target - 1


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

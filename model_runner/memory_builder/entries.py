"""Entries: ids, provenance, Upsert requests of a size that keeps no lookup waiting; what a memory holds of a text."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from knnmoe import tensors
from knnmoe.client import AdminClient
from knnmoe.entry_ids import entry_id
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1 import retention_pb2
from knnmoe.v1.types_pb2 import Provenance
from torch import Tensor

from model_runner.architectures.families import Assignment
from model_runner.errors import BadInput
from model_runner.memory_builder.recipes import Values
from model_runner.progress import Progress
from model_runner.router_hooks import Logits
from model_runner.texts import Window, read_windows
from model_runner.token_texts import SNIPPET_BYTES, Snippet, TokenTexts
from model_runner.wire import encode_assignment, encode_floats

log = logging.getLogger(__name__)

# The one place where the runner cuts an upsert: entries per request, and bytes of their keys and values. Far below the
# message limit, because lookups of the same layer wait while a request is written.
ENTRIES_PER_REQUEST = 1024
REQUEST_BYTES = 1024 * 1024
# Added to keys and values for an entry's id and provenance.
_BYTES_BESIDE = 128 + SNIPPET_BYTES
# Ids of one Delete request: half a megabyte.
_IDS_PER_REQUEST = 1 << 16
# Before the name of a file whose entries change nothing.
GENERAL_SOURCE = "general:"


@dataclass(frozen=True, slots=True)
class Destination:
    """Where entries go: `model_digest` is the fingerprint's."""

    memory: str
    model_digest: str
    durability: pb.Durability = pb.DURABILITY_PROCESS


@dataclass(frozen=True, slots=True)
class LayerEntries:
    """n entries of one layer: ids u64 [n], keys [n, d], values as recipes make them."""

    layer: int
    ids: np.ndarray[tuple[int], np.dtype[np.uint64]]
    keys: Tensor
    values: Values
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
        elif isinstance(values, Logits):
            message.logits.CopyFrom(encode_floats(values.router_logits))
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
        (_id(window, position) for window, position in _places(windows)),
        dtype=np.uint64,
    )


def provenance_of(
    windows: Sequence[Window], gains: Tensor, tokenizer: Any = None
) -> list[Provenance]:
    """Provenance of the windows' entries, in the order of `entry_ids`; gains [n] in nats.

    tokenizer: decodes the words around each token, which are kept with it; None: no snippets.
    """
    now = time.time_ns() // 1_000_000
    snippets = _snippets(windows, tokenizer)
    return [
        Provenance(
            source=window.ref.source,
            example=window.ref.example,
            position=position,
            token=window.token_ids[position - window.offset],
            gain=gain,
            created_unix_ms=now,
            snippet=snippet.text,
            token_start=snippet.token_start,
            token_end=snippet.token_end,
        )
        for (window, position), gain, snippet in zip(
            _places(windows), gains.tolist(), snippets, strict=True
        )
    ]


def _snippets(windows: Sequence[Window], tokenizer: Any) -> Iterator[Snippet]:
    """Of each entry, in the order of `entry_ids`."""
    for window in windows:
        texts = None if tokenizer is None else TokenTexts.of(window.token_ids, tokenizer)
        for target in window.target_at:
            yield Snippet("", 0, 0) if texts is None else texts.snippet(target - 1)


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
    layer = client.describe(memory).layers[-1]
    if not layer.entries:
        return KnownText(list(windows))
    examples = _by_example(windows)
    there, others = set[int](), defaultdict[str, dict[int, Provenance]](dict)
    for number, origin in _entries_of(client, memory, layer.layer, windows[0].ref.source):
        there.add(number)
        if not _is_of(number, origin, examples):
            others[origin.example][number] = origin
    changed, earlier = list[str](), set[str]()
    for example, group in examples.items():
        name = group[0].name
        same_name = others.get(name, {})
        if _are_of_earlier_version(same_name, group):
            earlier.add(example)
            del others[name]
        elif same_name and example == name:
            changed.append(name)
    known = [_as_earlier_version(w) if w.ref.example in earlier else w for w in windows]
    return KnownText(
        known,
        sum(window.ref.example in earlier for window in windows),
        tuple(changed),
        sum(map(len, others.values())),
        there.issuperset(entry_ids(known).tolist()),
    )


def general_text(
    path: Path, tokenizer: Any, length: int, progress: Progress | None = None
) -> list[Window]:
    """Windows of a file as those of a source of its own, so that a reference of that name is another one."""
    return [
        replace(window, ref=replace(window.ref, source=f"{GENERAL_SOURCE}{window.ref.source}"))
        for window in read_windows(path, tokenizer, length, progress)
    ]


def windows_as_known(client: AdminClient, memory: str, windows: Sequence[Window]) -> list[Window]:
    """The windows under the names that the memory knows them by. Warns of other text of the same source.

    Raises BadInput when the memory holds an `id` of theirs with other text.
    """
    known, source = known_text(client, memory, windows), windows[0].ref.source
    if known.changed:
        raise BadInput(
            f"{source}: memory {memory!r} holds {len(known.changed)} of its examples with other text, e.g. `id` "
            f"{known.changed[0]!r}; if the text has changed, build or learn with --replace-source, "
            "if it is another text, rename the file"
        )
    if known.by_tokens:
        log.warning(
            "%s: %d windows are in memory %r from version 0.1, which kept no digest of their text: they are compared "
            "by their tokens, all but the last of each window; --replace-source writes them anew",
            *(source, known.by_tokens, memory),
        )
    if known.others and not known.is_there:
        log.warning(
            "memory %r holds %d entries per layer of other text that is named %s: this text is added; if it is a new "
            "version of that one, run this again with --replace-source",
            *(memory, known.others, source),
        )
    return known.windows


def forget_other_texts(
    client: AdminClient,
    memory: str,
    windows: Sequence[Window],
    durability: pb.Durability = pb.DURABILITY_PROCESS,
) -> int:
    """Deletes what a memory holds of the windows' source but not of their texts; returns how many entries went."""
    examples, gone = _by_example(windows), 0
    for layer in client.describe(memory).layers:
        there = _entries_of(client, memory, layer.layer, windows[0].ref.source)
        others = [number for number, origin in there if not _is_of(number, origin, examples)]
        for start in range(0, len(others), _IDS_PER_REQUEST):
            ids = np.array(others[start : start + _IDS_PER_REQUEST], np.uint64)
            request = retention_pb2.DeleteRequest(
                memory=memory,
                layer=layer.layer,
                ids=tensors.to_tensor(ids),
                durability=durability,
            )
            gone += client.unary(client.retention.Delete, request, long=True, repeat=True).deleted
    return gone


def _by_example(windows: Sequence[Window]) -> dict[str, list[Window]]:
    """Windows of one source by the name of their example."""
    found = defaultdict[str, list[Window]](list)
    for window in windows:
        found[window.ref.example].append(window)
    return found


def _is_of(number: int, origin: Provenance, examples: Mapping[str, Sequence[Window]]) -> bool:
    """Whether an entry is of one of these texts, in whatever windows they were cut."""
    group = examples.get(origin.example, ())[:1]
    return any(number == _id(window, origin.position) for window in group)


def _id(window: Window, position: int) -> int:
    return entry_id(window.ref.source, window.identity or window.ref.example, position)


def _entries_of(
    client: AdminClient, memory: str, layer: int, source: str
) -> Iterator[tuple[int, Provenance]]:
    """Id and provenance of each entry of a source."""
    found = origins_of(client, memory, layer)
    return ((number, origin) for number, origin in found if origin.source == source)


def origins_of(client: AdminClient, memory: str, layer: int) -> Iterator[tuple[int, Provenance]]:
    """Id and provenance of each entry of a layer."""
    request = pb.ExportRequest(memory=memory, layer=layer, without_keys=True)
    for reply in client.replies(client.admin.Export(request)):
        ids = tensors.to_array(reply.entries.ids).tolist()
        yield from zip(ids, reply.entries.provenance, strict=True)


def _are_of_earlier_version(stored: Mapping[int, Provenance], windows: Sequence[Window]) -> bool:
    """Whether these are entries of an example, with ids that are made of the row's name and not of its text."""
    source, name = windows[0].ref.source, windows[0].name
    tokens = {
        window.offset + at: token for window in windows for at, token in enumerate(window.token_ids)
    }
    return bool(stored) and all(
        number == entry_id(source, name, origin.position)
        and tokens.get(origin.position) == origin.token
        for number, origin in stored.items()
    )


def _as_earlier_version(window: Window) -> Window:
    return replace(window, ref=replace(window.ref, example=window.name), identity="")


def _places(windows: Sequence[Window]) -> Iterator[tuple[Window, int]]:
    for window in windows:
        for target in window.target_at:
            yield window, window.offset + target - 1


def _value_rows(values: Values, rows: slice | Tensor) -> Values:
    if isinstance(values, Assignment):
        return Assignment(values.weights[rows], values.experts[rows])
    if isinstance(values, Logits):
        return Logits(values.router_logits[rows])
    return values[rows]


def _entry_bytes(entries: LayerEntries) -> int:
    parts: tuple[Tensor, ...] = (entries.keys,)
    if isinstance(entries.values, Assignment):
        parts += (entries.values.weights, entries.values.experts)
    elif isinstance(entries.values, Logits):
        parts += (entries.values.router_logits,)
    else:
        parts += (entries.values,)
    return _BYTES_BESIDE + sum(part.shape[1] * part.element_size() for part in parts)

"""What readers and writers of the formats share: errors, batches of rows, and the fields of a row, checked one by one.

Errors in a field are ValueErrors that name it; the reader adds where it is in the file.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from knnmoe.entry_ids import entry_id
from typing_extensions import override

from router_service.arrays import F32, MAX_ENTRY_ID, U64, AnyArray, Entries, Provenance
from router_service.errors import shorten
from router_service.memories.settings import Kind
from router_service.transfer.endpoints import Batch, EntryShape, Sink, Source

# Written where an entry has a snippet.
SNIPPET_FIELDS = ("snippet", "token_start", "token_end")
PROVENANCE_FIELDS = (
    *("source", "example", "position", "token", "gain", "created_unix_ms"),
    *SNIPPET_FIELDS,
)
_LIMITS = {
    "position": (0, 2**32 - 1),
    "token": (-(2**31), 2**31 - 1),
    "created_unix_ms": (0, 2**64 - 1),
    "token_start": (0, 2**32 - 1),
    "token_end": (0, 2**32 - 1),
}


class FileError(Exception):
    """A file that cannot be used; says where and why."""

    def __init__(self, path: Path, place: str, problem: str) -> None:
        super().__init__(": ".join(part for part in (str(path), place, problem) if part))


class EntryReader(Source):
    """An opened file of entries, a source of them. `entries` is how many it holds, of every layer. Raises FileError.

    `layer` is that of rows which name none; of a format that always names it, only this layer is read.
    """

    def __init__(self, path: Path, shape: EntryShape, layer: int | None) -> None:
        self.path, self.entries = path, 0
        self._shape, self._layer = shape, layer

    @staticmethod
    def metadata_of(path: Path) -> dict[str, str]:
        """What a file says about itself beside its entries; nothing, unless the format has a place for it."""
        return {}

    @abstractmethod
    def read(self) -> Iterator[Batch]:
        """The entries in the order of the file, in small batches."""

    @abstractmethod
    def place(self, layer: int, row: int) -> str:
        """How to find an entry in the file: `line 7`."""

    @override
    def total(self, layers: Sequence[int] = ()) -> int:
        return self.entries

    @override
    def batches(self, layers: Sequence[int] = ()) -> Generator[Batch, None, None]:
        seen: dict[int, set[int]] = {}
        wanted = (batch for batch in self.read() if not layers or batch.layer in layers)
        for batch in regroup(wanted, self._shape.batch_entries):
            self._check_ids(batch, seen.setdefault(batch.layer, set()))
            yield batch

    @contextmanager
    def errors_at(self, place: str) -> Iterator[None]:
        """What is wrong with a field, as FileError."""
        try:
            yield
        except RecursionError:
            raise FileError(self.path, place, "nested too deeply") from None
        except ValueError as error:
            raise FileError(self.path, place, str(error)) from error

    def _check_ids(self, batch: Batch, seen: set[int]) -> None:
        for row, entry in zip(batch.rows, batch.entries.ids.tolist(), strict=True):
            if entry in seen:
                problem = f"id: {entry} is there twice in layer {batch.layer}"
                raise FileError(self.path, self.place(batch.layer, row), problem)
            seen.add(entry)


class EntryWriter(Sink):
    """A file of entries in the making, a sink that holds nothing and only takes. Raises FileError.

    `metadata` is left out where the format has no place for it.
    """

    def __init__(self, path: Path, shape: EntryShape, metadata: Mapping[str, str]) -> None:
        self._path, self._shape = path, shape

    @abstractmethod
    def append(self, layer: int, entries: Entries) -> None:
        """Writes entries of one layer. Layers come one after the other."""

    def finish(self) -> None:
        """Completes the file."""
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Gives the files back; without finish() what was written is worth nothing. Closing twice is allowed."""

    @override
    def write(self, batches: Iterable[Batch]) -> Iterator[int]:
        for batch in batches:
            self.append(batch.layer, batch.entries)
            yield len(batch)

    @override
    def pages(self, layer: int, *, with_keys: bool = True) -> Generator[Entries, None, None]:
        yield from ()

    @override
    def delete(self, layer: int, ids: U64) -> int:
        return 0


def by_layer(layers: Sequence[int], entries: Entries, rows: Sequence[int]) -> Iterator[Batch]:
    """Entries of mixed layers as one batch per layer, each in the order of the file."""
    numbers = np.asarray(layers)
    for layer in dict.fromkeys(layers):
        chosen = np.flatnonzero(numbers == layer)
        yield Batch(layer, entries.take(chosen), [rows[i] for i in chosen.tolist()])


def regroup(batches: Iterable[Batch], limit: int) -> Iterator[Batch]:
    """The same entries in batches of `limit` per layer, or less at the end: rows of several layers may be mixed."""
    waiting: dict[int, list[Batch]] = {}
    for batch in batches:
        parts = waiting.setdefault(batch.layer, [])
        parts.append(batch)
        if sum(map(len, parts)) >= limit:
            whole = _joined(waiting.pop(batch.layer))
            while len(whole) >= limit:
                yield whole.slice(0, limit)
                whole = whole.slice(limit, len(whole))
            if len(whole):
                waiting[batch.layer] = [whole]
    yield from map(_joined, waiting.values())


def _joined(parts: Sequence[Batch]) -> Batch:
    rows = [row for part in parts for row in part.rows]
    return Batch(parts[0].layer, Entries.concat([part.entries for part in parts]), rows)


def numbers_of(
    name: str, rows: AnyArray, shape: EntryShape, error: Callable[[int, int, str], FileError]
) -> F32:
    """A field's numbers [n, width] as f32. Raises the `error` of the first that cannot be used: row, column, why."""
    with np.errstate(over="ignore"):  # found below, as infinity
        numbers: F32 = rows.astype(np.float32)
    wrong, expected = ~np.isfinite(numbers), "a finite number of f32"
    if name == "experts":
        experts = shape.num_experts
        wrong = (numbers != np.floor(numbers)) | (numbers < 0) | (numbers >= experts)
        expected = f"a whole number from 0 to {experts - 1}"
    for row, column in np.argwhere(wrong):
        raise error(int(row), int(column), f"got {rows[row, column]}, expected {expected}")
    return numbers


def dense_field(kind: Kind) -> str:
    """The field of values that have a number for each expert: each kind its own, or one would be read as the other."""
    return "logits" if kind is Kind.LOGITS else "value"


def widths(shape: EntryShape) -> dict[str, tuple[int, str]]:
    """The lists of numbers of an entry: how long they are, and of what."""
    lists = {"key": (shape.hidden_size, "hidden_size")}
    if shape.kind.blends_logits:
        return lists | {dense_field(shape.kind): (shape.num_experts, "num_experts")}
    return lists | {"experts": (shape.top_k, "top_k"), "weights": (shape.top_k, "top_k")}


def columns_of(layer: int, entries: Entries, shape: EntryShape) -> dict[str, AnyArray | list[Any]]:
    """Entries of one layer as the fields of their rows, in the order in which files have them."""
    columns: dict[str, AnyArray | list[Any]] = {
        "id": entries.ids,
        "layer": np.full(len(entries), layer, np.uint32),
        "key": entries.keys,
    }
    if shape.kind.blends_logits:
        columns[dense_field(shape.kind)] = entries.values
    else:
        columns["experts"] = entries.values[:, : shape.top_k].astype(np.int32)
        columns["weights"] = entries.values[:, shape.top_k :]
    for name in PROVENANCE_FIELDS:
        columns[name] = [getattr(origin, name) for origin in entries.provenance]
    return columns


def check_names(row: Mapping[str, Any], shape: EntryShape) -> None:
    """Raises ValueError on a field that means nothing to a memory of this kind, or that is missing."""
    needed, kind = tuple(widths(shape)), shape.kind
    known = {"id", "layer", *needed, *PROVENANCE_FIELDS}
    unknown = next((name for name in row if name not in known), None)
    if unknown is not None:
        raise ValueError(
            f"{shorten(unknown)}: unknown field, expected one of {', '.join(sorted(known))} ({kind} memory)"
        )
    for name in needed:
        if row.get(name) is None:
            raise ValueError(f"{name}: missing ({kind} memory)")


def layer_of(row: Mapping[str, Any], default: int | None) -> int:
    """The row's layer, or the default."""
    if row.get("layer") is None:
        if default is None:
            raise ValueError(
                "layer: missing, expected a MoE layer counted from 0 (or pass --layer)"
            )
        return default
    return whole("layer", row["layer"], 0, 2**32 - 1)


def provenance_of(row: Mapping[str, Any]) -> Provenance:
    """Where the entry came from; fields that are missing keep their defaults."""
    given = {name: row[name] for name in PROVENANCE_FIELDS if row.get(name) is not None}
    for name in ("source", "example", "snippet"):
        text = given.get(name, "")
        # JSON can escape half a character, which UTF-8 cannot hold.
        if not isinstance(text, str) or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{name}: got {shorten(text)}, expected text")
    for name, (least, most) in _LIMITS.items():
        if name in given:
            whole(name, given[name], least, most)
    gain = given.get("gain", 0.0)
    if type(gain) not in (int, float) or not math.isfinite(gain):
        raise ValueError(f"gain: got {shorten(gain)}, expected a finite number")
    return Provenance(**given | {"gain": float(gain)})


def id_of(row: Mapping[str, Any], origin: Provenance) -> int:
    """The row's id, or the one that its source, example and position give it."""
    if row.get("id") is not None:
        return whole("id", row["id"], 0, MAX_ENTRY_ID)
    missing = [name for name in ("source", "example", "position") if row.get(name) is None]
    if missing:
        raise ValueError(
            f"id: missing, and without {', '.join(missing)} none can be made; give id, or source, example "
            "and position"
        )
    return entry_id(origin.source, origin.example, origin.position)


def whole(name: str, value: Any, least: int, most: int) -> int:
    """A whole number in [least, most]."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(
            f"{name}: got {shorten(value)}, expected a whole number from {least} to {most}"
        )
    return value

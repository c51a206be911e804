"""What readers and writers of the formats share: errors, batches of rows, and the fields of a row, checked one by one.

Errors in a field are ValueErrors that name it; the reader adds where it is in the file.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from knnmoe.entry_ids import entry_id

from router_service.arrays import F32, MAX_ENTRY_ID, AnyArray, Bool, Entries, Provenance
from router_service.errors import shorten
from router_service.memories.settings import Kind
from router_service.transfer.endpoints import Batch, EntryShape

PROVENANCE_FIELDS = ("source", "example", "position", "token", "gain", "created_unix_ms")
_F32_MAX = float(np.finfo(np.float32).max)


class FileError(Exception):
    """A file that cannot be used; says where and why."""

    def __init__(self, path: Path, place: str, problem: str) -> None:
        super().__init__(": ".join(part for part in (str(path), place, problem) if part))


class EntryReader(Protocol):
    """An opened file of entries. `path` is its name; `total` is how many entries it holds, of every layer."""

    path: Path
    total: int

    @abstractmethod
    def batches(self) -> Iterator[Batch]:
        """The entries in the order of the file, in small batches. Raises FileError."""

    @abstractmethod
    def place(self, layer: int, row: int) -> str:
        """How to find an entry in the file: `line 7`."""


class EntryWriter(Protocol):
    """A file of entries in the making. Raises FileError."""

    @abstractmethod
    def write(self, layer: int, entries: Entries) -> None:
        """Appends entries of one layer. Layers come one after the other."""

    def finish(self) -> None:
        """Completes the file."""
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Gives the files back; without finish() what was written is worth nothing. Closing twice is allowed."""


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


def first(broken: Bool) -> tuple[int, int] | None:
    """Row and column of the first that is true of [n, d]."""
    found = np.argwhere(broken)
    return (int(found[0][0]), int(found[0][1])) if len(found) else None


def not_experts(experts: F32, shape: EntryShape) -> Bool:
    """Which of [n, k] are no numbers of experts."""
    return (experts != np.floor(experts)) | (experts < 0) | (experts >= shape.num_experts)


def widths(shape: EntryShape) -> dict[str, tuple[int, str]]:
    """The lists of numbers of an entry: how long they are, and of what."""
    lists = {"key": (shape.hidden_size, "hidden_size")}
    if shape.kind is Kind.LOGIT_DELTA:
        return lists | {"value": (shape.num_experts, "num_experts")}
    return lists | {"experts": (shape.top_k, "top_k"), "weights": (shape.top_k, "top_k")}


def value_columns(values: AnyArray, shape: EntryShape) -> dict[str, AnyArray]:
    """Value rows [n, W] as the fields that hold them."""
    if shape.kind is Kind.LOGIT_DELTA:
        return {"value": values}
    half = shape.top_k
    return {"experts": values[:, :half].astype(np.int32), "weights": values[:, half:]}


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
    for name in ("source", "example"):
        if name in given:
            given[name] = text(name, given[name])
    limits = {
        "position": (0, 2**32 - 1),
        "token": (-(2**31), 2**31 - 1),
        "created_unix_ms": (0, 2**64 - 1),
    }
    for name, (least, most) in limits.items():
        if name in given:
            given[name] = whole(name, given[name], least, most)
    if "gain" in given:
        given["gain"] = number("gain", given["gain"])
    return Provenance(**given)


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


def value_of(row: Mapping[str, Any], shape: EntryShape) -> F32:
    """The value row [W]."""
    if shape.kind is Kind.LOGIT_DELTA:
        return vector("value", row["value"], shape.num_experts, "num_experts")
    if not isinstance(row["experts"], list) or len(row["experts"]) != shape.top_k:
        raise ValueError(f"experts: got {_size(row['experts'])}, expected {shape.top_k} (top_k)")
    experts = [
        whole(f"experts[{i}]", expert, 0, shape.num_experts - 1)
        for i, expert in enumerate(row["experts"])
    ]
    weights = vector("weights", row["weights"], shape.top_k, "top_k")
    return np.concatenate([np.asarray(experts, dtype=np.float32), weights])


def vector(name: str, value: Any, width: int, of: str) -> F32:
    """A list of `width` finite numbers as f32."""
    if not isinstance(value, list) or len(value) != width:
        raise ValueError(f"{name}: got {_size(value)}, expected {width} numbers ({of})")
    for index, item in enumerate(value):
        if type(item) is not float and type(item) is not int:
            raise ValueError(f"{name}[{index}]: got {shorten(item)}, expected a number")
        if not -_F32_MAX <= item <= _F32_MAX:
            raise ValueError(
                f"{name}[{index}]: got {shorten(item)}, expected a finite number of f32"
            )
    return np.asarray(value, dtype=np.float32)


def whole(name: str, value: Any, least: int, most: int) -> int:
    """A whole number in [least, most]."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(
            f"{name}: got {shorten(value)}, expected a whole number from {least} to {most}"
        )
    return value


def text(name: str, value: Any) -> str:
    """Text that UTF-8 can hold (JSON can escape half a character)."""
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{name}: got {shorten(value)}, expected text")
    return value


def number(name: str, value: Any) -> float:
    """A finite number."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name}: got {shorten(value)}, expected a finite number")
    return float(value)


def _size(value: Any) -> str:
    return f"{len(value)}" if isinstance(value, list) else shorten(value, 40)

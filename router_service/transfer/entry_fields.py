"""What readers and writers of the formats share: errors, batches of rows, and the fields of a row, checked one by one.

Errors in a field are ValueErrors that name it; the reader adds where it is in the file.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
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

PROVENANCE_FIELDS = ("source", "example", "position", "token", "gain", "created_unix_ms")
_F32_MAX = float(np.finfo(np.float32).max)


class FileError(Exception):
    """A file that cannot be used; says where and why."""

    def __init__(self, path: Path, place: str, problem: str) -> None:
        super().__init__(": ".join(part for part in (str(path), place, problem) if part))


class EntryReader(Source):
    """An opened file of entries, a source of them. `entries` is how many it holds, of every layer. Raises FileError."""

    def __init__(self, path: Path, shape: EntryShape) -> None:
        self.path, self.entries = path, 0
        self._shape = shape

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
    """A file of entries in the making, a sink that holds nothing and only takes. Raises FileError."""

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


def first_wrong(name: str, numbers: F32, shape: EntryShape) -> tuple[int, int, str] | None:
    """Row and column of the first of a field's numbers [n, width] that cannot be used, and what was expected."""
    wrong, expected = ~np.isfinite(numbers), "a finite number of f32"
    if name == "experts":
        experts = shape.num_experts
        wrong = (numbers != np.floor(numbers)) | (numbers < 0) | (numbers >= experts)
        expected = f"a whole number from 0 to {experts - 1}"
    found = np.argwhere(wrong)
    return (int(found[0][0]), int(found[0][1]), expected) if len(found) else None


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

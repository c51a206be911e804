"""Entries as Qdrant stores them, embedded or not: flat payloads, value rows as base64 of little-endian f32 bytes."""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from router_service.arrays import F32, Entries, Provenance
from router_service.errors import CorruptMemory

Payload = dict[str, Any]

VALUE = "value"
# Embedded only: the generation of files that an entry was written in; those of the current one are not indexed yet.
GENERATION = "generation"

_ATTRIBUTE_OF_FIELD = {
    "source": "source",
    "example": "example",
    "position": "position",
    "token": "token",
    "gain": "gain",
    "created": "created_unix_ms",
    "snippet": "snippet",
    "token_start": "token_start",
    "token_end": "token_end",
}
_DEFAULTS = Provenance()


class Record(NamedTuple):
    """An entry as the engine reads it."""

    id: int
    payload: Payload
    key: Sequence[float] | F32 | None


def payload_of(value: F32, provenance: Provenance) -> Payload:
    """Payload of an entry with value row [W]; provenance fields that have their default value are left out."""
    fields = {
        field: stored
        for field, name in _ATTRIBUTE_OF_FIELD.items()
        if (stored := getattr(provenance, name)) != getattr(_DEFAULTS, name)
    }
    return {VALUE: b64encode(value.astype("<f4").tobytes()).decode("ascii"), **fields}


def payloads_of(entries: Entries, generation: int) -> list[Payload]:
    """One payload per entry, marked with a generation of files."""
    rows = zip(entries.values, entries.provenance, strict=True)
    return [payload_of(row, origin) | {GENERATION: generation} for row, origin in rows]


def provenance_of(payload: Payload) -> Provenance:
    """The provenance that payloads_of stored."""
    stored = _ATTRIBUTE_OF_FIELD.items()
    return Provenance(**{name: payload[field] for field, name in stored if field in payload})


def value_rows(payloads: Iterable[Payload], value_width: int) -> F32:
    """Value rows [n, W] of payloads. Raises CorruptMemory when one is missing or of another width."""
    try:
        rows = [b64decode(payload[VALUE], validate=True) for payload in payloads]
    except (KeyError, TypeError, binascii.Error) as error:
        raise CorruptMemory(f"an entry has no readable value: {error!r}") from error
    wrong = [len(row) for row in rows if len(row) != 4 * value_width]
    if wrong:
        raise CorruptMemory(f"an entry has a value of {wrong[0]} bytes, expected {4 * value_width}")
    return np.frombuffer(b"".join(rows), "<f4").reshape(-1, value_width).astype(np.float32)


def entries_of(records: Sequence[Record], dimension: int, value_width: int) -> Entries:
    """Entries of records; `dimension` 0 when their keys were not read. Raises CorruptMemory when one has no key."""
    keys = [record.key for record in records] if dimension else []
    if keyless := [
        each.id
        for each, key in zip(records, keys, strict=False)
        if key is None or len(key) != dimension
    ]:
        raise CorruptMemory(
            f"entry {keyless[0]} has no readable key of {dimension} numbers; restore the memory from a snapshot, on "
            "storage whose file system is ext4 or xfs"
        )
    return Entries(
        np.fromiter((record.id for record in records), np.uint64, len(records)),
        np.array(keys, np.float32).reshape(len(records), dimension),
        value_rows((record.payload for record in records), value_width),
        [provenance_of(record.payload) for record in records],
    )

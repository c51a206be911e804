"""The sum of a layer is that of the form which docs/formats.md writes down, and nothing of an entry is left out."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from router_service.arrays import Entries
from router_service.transfer.copying import EntrySum, checksum, digests
from tests.unit.router_service.transfer.layer_models import entries_of

ENTRIES = entries_of({3: 0, 5: 1, 2**63 - 1: 0})


def written_down(entries: Entries) -> bytes:
    """The form, taken literally."""
    text = b""
    for row, origin in enumerate(entries.provenance):
        text += struct.pack("<Q", int(entries.ids[row]))
        text += struct.pack("<4f", *entries.keys[row]) + struct.pack("<3f", *entries.values[row])
        text += struct.pack("<qqf", origin.position, origin.token, origin.gain)
        text += struct.pack("<Q", origin.created_unix_ms)
        for part in (origin.source.encode(), origin.example.encode()):
            text += struct.pack("<I", len(part)) + part
    return text


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_sum_is_that_of_the_form(size: int) -> None:
    pages = [ENTRIES.slice(start, start + size) for start in range(0, 3, size)]
    heard: list[int] = []
    expected = hashlib.sha256(written_down(ENTRIES)).hexdigest()
    assert checksum(pages, heard.append) == EntrySum(3, expected)
    assert sum(heard) == 3


def test_of_nothing() -> None:
    assert checksum([], lambda _: None) == EntrySum(0, hashlib.sha256().hexdigest())


def _spoil_key(entries: Entries) -> Entries:
    keys = entries.keys.copy()
    keys[1, 3] = np.nextafter(keys[1, 3], np.float32(9))
    return replace(entries, keys=keys)


def _spoil_value(entries: Entries) -> Entries:
    values = entries.values.copy()
    values[1, 0] = -values[1, 0]
    return replace(entries, values=values)


def _spoil_origin(**fields: object) -> Callable[[Entries], Entries]:
    def change(entries: Entries) -> Entries:
        origins = list(entries.provenance)
        origins[1] = replace(origins[1], **fields)  # type: ignore[arg-type]
        return replace(entries, provenance=origins)

    return change


@pytest.mark.parametrize(
    "spoil",
    [
        _spoil_key,
        _spoil_value,
        _spoil_origin(source="tex", example="té5"),
        _spoil_origin(example="x"),
        _spoil_origin(position=9),
        _spoil_origin(token=-1),
        _spoil_origin(gain=0.25),
        _spoil_origin(created_unix_ms=2**40),
    ],
)
def test_any_change_shows(spoil: Callable[[Entries], Entries]) -> None:
    changed = spoil(ENTRIES)
    same = (digests(changed) == digests(ENTRIES)).all(axis=1)
    assert same.tolist() == [True, False, True]
    assert checksum([changed], lambda _: None) != checksum([ENTRIES], lambda _: None)

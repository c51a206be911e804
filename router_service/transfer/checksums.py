"""What two entries must agree in, as bytes, and sums over them. The form is written down in docs/formats.md.

Little-endian, one after the other: id u64; key f32 [d]; value f32 [W]; position i64, token i64, gain f32,
created_unix_ms u64; source and example, each as the number of its UTF-8 bytes (u32) and these bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from router_service.arrays import U64, Entries, Provenance

_NUMBERS = np.dtype(
    [("position", "<i8"), ("token", "<i8"), ("gain", "<f4"), ("created_unix_ms", "<u8")]
)
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class EntrySum:
    """How many entries a layer holds, and the sha256 (hex) over their bytes in the order of ids."""

    entries: int
    sha256: str


def entry_bytes(entries: Entries) -> Iterator[bytes]:
    """The bytes of each entry."""
    columns = (
        entries.ids.astype("<u8"),
        entries.keys.astype("<f4", order="C"),
        entries.values.astype("<f4", order="C"),
        np.array([_numbers(origin) for origin in entries.provenance], _NUMBERS),
    )
    count = len(entries)
    numbers = np.hstack([column.view(np.uint8).reshape(count, -1) for column in columns])
    for row, origin in zip(numbers, entries.provenance, strict=True):
        yield row.tobytes() + _text(origin.source) + _text(origin.example)


def digests(entries: Entries) -> U64:
    """BLAKE2b of the bytes of each entry, [n, 2]: equal where the entries are."""
    hashed = (
        hashlib.blake2b(each, digest_size=_DIGEST_BYTES).digest() for each in entry_bytes(entries)
    )
    return np.frombuffer(b"".join(hashed), np.uint64).reshape(len(entries), 2)


def checksum(pages: Iterable[Entries], advance: Callable[[int], None]) -> EntrySum:
    """Of pages in the order of ids; `advance` hears of the entries of each."""
    count, total = 0, hashlib.sha256()
    for page in pages:
        for each in entry_bytes(page):
            total.update(each)
        count += len(page)
        advance(len(page))
    return EntrySum(count, total.hexdigest())


def _numbers(origin: Provenance) -> tuple[int, int, float, int]:
    return origin.position, origin.token, origin.gain, origin.created_unix_ms


def _text(text: str) -> bytes:
    encoded = text.encode()
    return len(encoded).to_bytes(4, "little") + encoded

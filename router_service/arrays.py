"""The data that passes between the layers of the service: entries, neighbours, assignments.

Shapes: T tokens, K neighbours, d = hidden size, N experts, k = top-k, W = width of a value row. A value row is what a
neighbour contributes: N logits or logit deltas, or k expert ids followed by k weights (ids are exact in f32).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from router_service.errors import InvalidTensor

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]
Bool = NDArray[np.bool_]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Rows = NDArray[np.intp]
_Scalar = TypeVar("_Scalar", bound=np.generic)
AnyArray = NDArray[Any]

# Id of a slot that holds no neighbour. Entry ids stay below 2^63.
NO_ID = np.uint64(2**64 - 1)
MAX_ENTRY_ID = 2**63 - 1


@dataclass(frozen=True, slots=True)
class ExampleRef:
    """An example (document, prompt) within a source."""

    source: str
    example: str


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an entry came from; `gain` in nats, `created_unix_ms` in milliseconds since the epoch.

    `snippet`: the words around the entry's token, the characters [token_start, token_end) of it; empty when not kept.
    """

    source: str = ""
    example: str = ""
    position: int = 0
    token: int = -1
    gain: float = 0.0
    created_unix_ms: int = 0
    snippet: str = ""
    token_start: int = 0
    token_end: int = 0


@dataclass(frozen=True, slots=True)
class Entries:
    """n entries of one layer, column by column."""

    ids: U64  # [n]
    keys: F32  # [n, d]; [n, 0] when they were left out on purpose
    values: F32  # [n, W]
    provenance: Sequence[Provenance]  # n of them

    def __len__(self) -> int:
        return len(self.ids)

    def slice(self, start: int, stop: int) -> Entries:
        """Rows [start, stop)."""
        rows = np.s_[start:stop]
        return Entries(self.ids[rows], self.keys[rows], self.values[rows], self.provenance[rows])

    def take(self, rows: Rows) -> Entries:
        """The entries of these rows, in their order."""
        provenance = [self.provenance[row] for row in rows]
        return Entries(self.ids[rows], self.keys[rows], self.values[rows], provenance)

    @staticmethod
    def concat(pages: Sequence[Entries], dimension: int = 0, value_width: int = 0) -> Entries:
        """All entries of pages, one after the other; the widths are those of no entries at all."""
        pages = [page for page in pages if len(page)]
        if pages:
            dimension, value_width = pages[0].keys.shape[1], pages[0].values.shape[1]
        keys, values = np.empty((0, dimension), np.float32), np.empty((0, value_width), np.float32)
        return Entries(
            np.concatenate([np.empty(0, np.uint64), *(page.ids for page in pages)]),
            np.concatenate([keys, *(page.keys for page in pages)]),
            np.concatenate([values, *(page.values for page in pages)]),
            [each for page in pages for each in page.provenance],
        )


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The K nearest entries of T tokens, nearest first; a slot without one: NO_ID, distance inf, value 0."""

    ids: U64  # [T, K]
    distances: F32  # [T, K]: squared Euclidean, or 1 - cosine
    values: F32  # [T, K, W]
    version: int = 0  # of the memory when they were its nearest; see backends.base.Versions

    @classmethod
    def empty(cls, tokens: int, k: int, value_width: int = 0) -> Neighbours:
        """No neighbour in any slot."""
        return cls(
            np.full((tokens, k), NO_ID, dtype=np.uint64),
            np.full((tokens, k), np.inf, dtype=np.float32),
            np.zeros((tokens, k, value_width), dtype=np.float32),
        )


@dataclass(frozen=True, slots=True)
class Assignment:
    """Sparse expert assignment of T tokens."""

    experts: I32  # [T, k]
    weights: F32  # [T, k]


@dataclass(frozen=True, slots=True, eq=False)
class HitCounts:
    """How often entries were retrieved; an id that is not here was never retrieved."""

    ids: U64  # [m] ascending, each once
    hits: I64  # [m]

    @classmethod
    def of(cls, hits: Mapping[int, int]) -> HitCounts:
        """Counts of an id -> hits mapping."""
        ids = np.fromiter(hits.keys(), np.uint64, len(hits))
        counts = np.fromiter(hits.values(), np.int64, len(hits))
        order = np.argsort(ids)
        return cls(ids[order], counts[order])

    def of_entries(self, ids: U64) -> F64:
        """Hits [n] of entries [n]."""
        rows, known = rows_of(self.ids, ids)
        return _gathered(self.hits, rows, known).astype(np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class OwnAssignments:
    """The frozen router's own assignments at the keys of entries, as value rows of an assignment memory."""

    ids: U64  # [m] ascending, each once
    values: F32  # [m, 2k]: k expert ids, then k weights

    def of_entries(self, ids: U64) -> tuple[F32, Bool]:
        """Value rows [n, 2k] of entries [n] and which of them are known; 0 where not."""
        rows, known = rows_of(self.ids, ids)
        return _gathered(self.values, rows, known), known


def rows_of(table: U64, ids: U64) -> tuple[Rows, Bool]:
    """Where `ids` [...] are in an ascending `table` [m], and whether they are: (rows, known); row 0 when unknown."""
    if not len(table):
        return np.zeros(ids.shape, np.intp), np.zeros(ids.shape, np.bool_)
    rows = np.minimum(np.searchsorted(table, ids), len(table) - 1)
    known = table[rows] == ids
    return np.where(known, rows, 0), known


def require_ascending(field: str, ids: U64, rows: int) -> None:
    """Raises InvalidTensor unless there is one id per row, ascending, each once."""
    if ids.shape != (rows,) or (len(ids) > 1 and not (ids[:-1] < ids[1:]).all()):
        raise InvalidTensor(field, f"shape {list(ids.shape)}", f"{rows} ids, ascending, each once")


def mixed_ids(ids: U64, seed: int) -> U64:
    """A random-looking number per entry [n] that depends on nothing but its id and the seed (SplitMix64)."""
    salt = _split_mix(np.array([seed % 2**64], np.uint64))
    return _split_mix(ids ^ salt)


def _split_mix(numbers: U64) -> U64:
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _gathered(column: NDArray[_Scalar], rows: Rows, known: Bool) -> NDArray[_Scalar]:
    """Rows of a column [m, ...]; 0 where not known."""
    if not len(column):
        return np.zeros((*rows.shape, *column.shape[1:]), column.dtype)
    taken = column[rows]
    taken[~known] = 0
    return taken


_NUMBERS = np.dtype(
    [("position", "<i8"), ("token", "<i8"), ("gain", "<f4"), ("created_unix_ms", "<u8")]
)


def entry_bytes(entries: Entries) -> Iterator[bytes]:
    """The bytes of each entry, little-endian, one after the other.

    id u64; key f32 [d]; value f32 [W]; position i64, token i64, gain f32, created_unix_ms u64; source and example, each
    as the number of its UTF-8 bytes (u32) and these bytes. Where a snippet is kept: the snippet likewise, token_start
    and token_end u32.
    """
    origins = [
        (origin.position, origin.token, origin.gain, origin.created_unix_ms)
        for origin in entries.provenance
    ]
    columns = (
        entries.ids.astype("<u8"),
        entries.keys.astype("<f4", order="C"),
        entries.values.astype("<f4", order="C"),
        np.array(origins, _NUMBERS),
    )
    count = len(entries)
    if not count:
        return
    numbers = np.hstack([column.view(np.uint8).reshape(count, -1) for column in columns])
    for row, origin in zip(numbers, entries.provenance, strict=True):
        names = _text(origin.source) + _text(origin.example)
        yield row.tobytes() + names + _snippet(origin)


def _snippet(origin: Provenance) -> bytes:
    """Nothing where none is kept: such entries have the digests that they had before there were snippets."""
    if not origin.snippet:
        return b""
    ends = (origin.token_start, origin.token_end)
    return _text(origin.snippet) + b"".join(end.to_bytes(4, "little") for end in ends)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return len(encoded).to_bytes(4, "little") + encoded


# Columns of the digests [n, 2] of entries, each BLAKE2b of 8 bytes: of the key, and of all else.
OF_KEY, OF_REST = 0, 1
_DIGEST_BYTES = 8


def key_digests(keys: F32) -> U64:
    """Digests [n] of keys [n, d]."""
    return _digests(np.ascontiguousarray(keys, "<f4"))


def rest_digests(entries: Entries) -> U64:
    """Digests [n] of all of the entries but their keys."""
    count = len(entries)
    return _digests(entry_bytes(replace(entries, keys=np.empty((count, 0), np.float32))))


def digests_of(entries: Entries) -> U64:
    """Both digests [n, 2] of entries."""
    return np.stack([key_digests(entries.keys), rest_digests(entries)], axis=1)


def combined_digests(digests: U64) -> U64:
    """One digest [n] of both [n, 2]: equal for equal entries, whatever backend has them."""
    return _split_mix(digests[:, OF_KEY] ^ _split_mix(digests[:, OF_REST]))


def _digests(rows: Iterable[bytes] | F32) -> U64:
    hashed = (hashlib.blake2b(row, digest_size=_DIGEST_BYTES).digest() for row in rows)
    return np.frombuffer(b"".join(hashed), "<u8").astype(np.uint64)

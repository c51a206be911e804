"""The data that passes between the layers of the service: entries, neighbours, assignments.

Shapes: T tokens, K neighbours, d = hidden size, N experts, k = top-k, W = width of a value row. A value row is what a
neighbour contributes: N logit deltas, or k expert ids followed by k weights (ids are exact in f32).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]
Bool = NDArray[np.bool_]
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
    """Where an entry came from; `gain` in nats, `created_unix_ms` in milliseconds since the epoch."""

    source: str = ""
    example: str = ""
    position: int = 0
    token: int = -1
    gain: float = 0.0
    created_unix_ms: int = 0


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

    @staticmethod
    def joined(pages: Sequence[Entries], dimension: int, value_width: int) -> Entries:
        """All entries of pages, one after the other; the widths are those of no pages."""
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

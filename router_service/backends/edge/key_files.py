"""Keys read from the files in which the engine keeps them: the engine itself hands them out as lists of numbers.

Where a file has the key of which entry is not asked: the digest of what was read says so, see ledger. So a key that is
half written, replaced, or of a format that another version of the engine may have, is not found, and is read the slow
way. 20,000 keys of 2,048 numbers take 1 s of one core instead of 3.6 (benchmarks/README.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from router_service.arrays import F32, U64, Bool, Rows
from router_service.backends.disk import storage_call

# Of the keys of a segment with an index, and of one that is written to: what comes before the first key.
_FILES = {"vector_storage/matrix.dat": 4, "vector_storage/vectors/chunk_*.mmap": 0}


def read_keys(shard: Path, dimension: int, rows: int) -> Iterator[F32]:
    """What may be keys, `rows` [m, d] at a time. Ends early when the files are replaced by others.

    Raises StorageError.
    """
    for pattern, start in _FILES.items():
        for path in _listed(shard, pattern):
            with storage_call(f"read {path}"):
                try:
                    file = path.open("rb", buffering=0)
                except FileNotFoundError:
                    return
            with file:
                file.seek(start)
                while len(block := _read(path, file, rows * dimension)) >= dimension:
                    whole = len(block) // dimension * dimension
                    keys = block[:whole].reshape(-1, dimension)
                    yield keys[keys.any(axis=1)]  # files are longer than what is in them


def _listed(shard: Path, pattern: str) -> list[Path]:
    with storage_call(f"list {shard}"):
        try:
            return sorted(shard.glob(f"segments/*/{pattern}"))
        except FileNotFoundError:  # a directory went while it was looked into
            return []


def _read(path: Path, file: IO[bytes], numbers: int) -> F32:
    with storage_call(f"read {path}"):
        return np.fromfile(file, "<f4", numbers)


class SoughtKeys:
    """Entries whose keys are to be found, each once."""

    def __init__(self, ids: U64, digests: U64) -> None:
        """`digests` [n] of the keys of `ids` [n]."""
        self._order = np.argsort(digests)
        self._digests, self._ids = digests[self._order], ids[self._order]
        self._found: Bool = np.zeros(len(ids), np.bool_)

    def take(self, digests: U64) -> tuple[U64, Rows]:
        """Ids [k] of entries that were still sought, and which of these digests [m] are those of their keys."""
        each, rows = np.unique(digests, return_index=True)
        first = np.searchsorted(self._digests, each, "left")
        counts = (
            np.searchsorted(self._digests, each, "right") - first
        )  # entries may have the same key
        before = np.cumsum(counts) - counts
        places = np.repeat(first - before, counts) + np.arange(counts.sum())
        new = ~self._found[places]
        self._found[places] = True
        return self._ids[places[new]], np.repeat(rows, counts)[new]

    @property
    def left(self) -> U64:
        """Ids [n] of entries that were not found, ascending."""
        return np.sort(self._ids[~self._found])

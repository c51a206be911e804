"""Search keys that are stored beside the keys: fewer dimensions, f16, or both. The keys themselves give the distances.

A search key is (key - centre) * scale, times a matrix when the dimension is reduced. Centre and scale are medians, so
that a few huge keys do not spoil the others; coordinates that would leave the range are cut off, which costs their
owners some recall and nobody an exact distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from router_service.arrays import F32, F64
from router_service.backends.base import Compression, Projection, Quantization
from router_service.backends.disk import storage_call, write_atomically

FILE = "search_keys.npz"
# PCA is fitted on that many keys at most.
SAMPLE = 8192
_SEED = 20260102
_LARGEST_F16 = 6e4
_LARGEST_F32 = 1e15  # its square times any dimension is finite
# Rows that many times longer than the median say nothing about the directions of the others.
_OUTLIER = 100.0


@dataclass(frozen=True, slots=True)
class SearchKeys:
    """How search keys [n, p] are made of keys [n, d]."""

    centre: F32  # [d]
    scale: float
    matrix: F32 | None  # [d, p]; None: p = d
    label: str  # of the compression they were made for
    fitted_entries: int

    @property
    def dimension(self) -> int:
        """Numbers per search key."""
        return len(self.centre) if self.matrix is None else self.matrix.shape[1]

    @property
    def half(self) -> bool:
        """Whether they are stored as f16."""
        return Compression.parse(self.label).quantization is Quantization.FLOAT16

    def of(self, keys: F32) -> F32:
        """Search keys f32 [n, p] of keys or queries [n, d]; finite, and within f16 where they are stored so."""
        with np.errstate(over="ignore"):
            rows = (keys - self.centre) * np.float32(self.scale)
        rows = np.clip(rows, -_LARGEST_F32, _LARGEST_F32, dtype=np.float32)
        if self.matrix is not None:
            rows = rows @ self.matrix
        return np.clip(rows, -_LARGEST_F16, _LARGEST_F16) if self.half else rows

    def serves(self, compression: Compression, entries: int) -> bool:
        """Whether they can stay for another index: same kind, and fitted when there were not far fewer entries."""
        kinds = {
            (each.search_dimension, each.projection, each.quantization is Quantization.FLOAT16)
            for each in (compression, Compression.parse(self.label))
        }
        return len(kinds) == 1 and entries <= 2 * self.fitted_entries

    def save(self, directory: Path) -> None:
        """Writes FILE into a shard's directory, durably. Raises StorageError."""
        arrays: dict[str, Any] = {
            "centre": self.centre,
            "scale": np.float64(self.scale),
            "label": np.array(self.label),
            "fitted_entries": np.int64(self.fitted_entries),
        }
        if self.matrix is not None:
            arrays["matrix"] = self.matrix
        write_atomically(directory / FILE, lambda file: np.savez(file, **arrays))

    @staticmethod
    def load(directory: Path) -> SearchKeys:
        """Those of a shard's directory. Raises CorruptMemory."""
        path = directory / FILE
        with (
            storage_call(f"read {path}", opening=True),
            path.open("rb") as file,
            np.load(file, allow_pickle=False) as saved,
        ):
            matrix = saved.get("matrix")
            label, entries = str(saved["label"]), int(saved["fitted_entries"])
            return SearchKeys(saved["centre"], float(saved["scale"]), matrix, label, entries)


def fitted(sample: F32, compression: Compression, entries: int) -> SearchKeys:
    """Search keys for `entries` keys of which `sample` [m, d] are some. The same sample gives the same."""
    dimension = sample.shape[1]
    centre = np.median(sample, axis=0) if len(sample) else np.zeros(dimension)
    rows = sample.astype(np.float64) - centre
    lengths = np.sqrt(np.mean(rows**2, axis=1))
    scale = _scale(lengths)
    matrix = None
    if compression.search_dimension:
        usual = rows[lengths * scale <= _OUTLIER] * scale
        matrix = _matrix(usual, dimension, compression)
    return SearchKeys(centre.astype(np.float32), scale, matrix, compression.label, entries)


def _scale(lengths: F64) -> float:
    """Brings the median of root mean squares to 1; 1 where that is no number an f32 can hold."""
    median = float(np.median(lengths)) if len(lengths) else 0.0
    return 1.0 / median if 1e-30 < median < 1e30 else 1.0


def _matrix(rows: F64, dimension: int, compression: Compression) -> F32:
    """Orthonormal columns [d, p]: the directions of most variance, or random ones."""
    wanted = compression.search_dimension
    if compression.projection is Projection.PCA:
        _, directions = np.linalg.eigh(rows.T @ rows)  # ascending
        found = directions[:, : -wanted - 1 : -1]
    else:
        draws = np.random.default_rng(_SEED).standard_normal((dimension, wanted))
        found = np.linalg.qr(draws)[0]
    return np.ascontiguousarray(found, np.float32)

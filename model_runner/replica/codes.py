"""Reduced keys of a layer, 4 bits a number, in FAISS's fast scan: what a first pass looks at instead of the keys.

Keys are reduced to their principal components and the length of what is left of them; then they are rotated, so that
all numbers weigh about the same, and each number is kept in 4 bits (the scan: André et al., "Cache locality is not
enough", VLDB 2015). The length is worth more than many components: without it 256 components of a random OLMoE's
router inputs had 0.84 of the 32 nearest among 256 candidates, with it 0.99 (2026-11-28).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_runner.replica.layer import I64
from model_runner.replica.search import faiss

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

# Numbers per reduced key.
WIDTHS = (64, 128, 256)
_LEVELS = 16


@dataclass(frozen=True, slots=True)
class Reduction:
    """Keys and queries of d numbers to r, which keep distances: components, rotated, and the length of what is left.

    Attributes:
        mean: f32 [d].
        projection: f32 [d, r], orthogonal rows of rank r - 1.
        offset: f32 [r], what the projection makes of minus the mean.
        rest: f32 [r], the direction of what is left, orthogonal to them.

    """

    mean: Tensor
    projection: Tensor
    offset: Tensor
    rest: Tensor

    @property
    def width(self) -> int:
        """Numbers per reduced key, r."""
        return self.projection.shape[1]

    def __call__(self, vectors: Tensor, agreement: float = 1.0) -> F32:
        """f32 [n, r] of vectors f32 [n, d]; of keys with agreement 1."""
        reduced = torch.addmm(self.offset, vectors, self.projection)
        if not agreement:
            return reduced.numpy()
        if len(vectors) == 1:
            return self._with_rest(vectors.numpy(), reduced.numpy(), agreement)
        centred = vectors - self.mean
        left = torch.linalg.vecdot(centred, centred) - torch.linalg.vecdot(reduced, reduced)
        left = left.clamp_min_(0).sqrt_().unsqueeze(1)
        return reduced.addcmul_(left, self.rest, value=agreement).numpy()

    def _with_rest(self, vector: F32, reduced: F32, agreement: float) -> F32:
        """`reduced` [1, r] of one vector [1, d] with what is left; by NumPy, in half the time of torch."""
        centred = vector[0] - self.mean.numpy()
        left = float(centred @ centred) - float(reduced[0] @ reduced[0])
        reduced += self.rest.numpy() * np.float32(agreement * max(left, 0.0) ** 0.5)
        return reduced


def reductions(sample: Tensor, generator: torch.Generator) -> list[Reduction]:
    """Of every width below d, from a sample of keys f32 [s, d]."""
    mean = sample.mean(0)
    widths = [width for width in WIDTHS if width < sample.shape[1]]
    components = _components(sample - mean, max(widths, default=1), generator)
    made = []
    for width in widths:
        turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        projection = components[:, : width - 1] @ turn[:-1]
        made.append(Reduction(mean, projection, -(mean @ projection), turn[-1]))
    return made


def _components(centred: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """The first principal components [d, number] of rows [s, d], the largest first; by subspace iteration."""
    more = min(number + 16, *centred.shape)
    basis = torch.randn(centred.shape[1], more, generator=generator)
    for _ in range(3):
        basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q
    _, _, turn = torch.linalg.svd(centred @ basis, full_matrices=False)
    return (basis @ turn.T)[:, :number]


def levels(reduced: F32) -> F32:
    """The 16 values [r, 16] by which each number of a reduced key is kept; by Lloyd's algorithm from quantiles."""
    columns = torch.from_numpy(np.ascontiguousarray(reduced[:2048].T))
    at = (torch.arange(_LEVELS) + 0.5) / _LEVELS
    values = torch.quantile(columns, at, dim=1).T.contiguous()
    for _ in range(10):
        nearest = torch.searchsorted((values[:, 1:] + values[:, :-1]) / 2, columns)
        sums = torch.zeros_like(values).scatter_add_(1, nearest, columns)
        counts = torch.zeros_like(values).scatter_add_(1, nearest, torch.ones_like(columns))
        values = torch.where(counts > 0, sums / counts.clamp_min(1), values)
    return values.numpy()


class Codes:
    """Reduced keys of a layer at one version, 4 bits a number, and FAISS's index of them. Never changed.

    Attributes:
        rows: int64 [n], the row of each code.
        codes: u8 [n, r / 2].
        version: of the layer.

    """

    def __init__(
        self, reduction: Reduction, values: F32, rows: I64, codes: U8 | None, version: int
    ) -> None:
        self.reduction, self.values, self.rows, self.version = reduction, values, rows, version
        self._flat = self._empty()
        self.codes = np.empty((0, reduction.width // 2), np.uint8) if codes is None else codes
        self._flat.add_sa_codes(self.codes)
        self.index = faiss().IndexPQFastScan(self._flat)
        self._flat = self._empty()  # the codes are in `codes` already

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Of RAM."""
        projection = self.reduction.projection.nbytes
        return 2 * self.codes.nbytes + self.rows.nbytes + projection + self.values.nbytes

    def encode(self, keys: Tensor) -> U8:
        """Codes u8 [n, r / 2] of keys f32 [n, d]."""
        return self._flat.sa_encode(self.reduction(keys))

    def candidates(self, queries: F32, count: int) -> I64:
        """Rows [T, <= count] of the codes that are nearest to reduced queries [T, r], the nearest first; -1: none."""
        _, places = self.index.search(queries, min(count, len(self.rows)))
        return np.where(places < 0, -1, self.rows[places])

    def _empty(self) -> Any:
        library, width = faiss(), self.reduction.width
        flat = library.IndexPQ(width, width, 4)
        library.copy_array_to_vector(np.ascontiguousarray(self.values).ravel(), flat.pq.centroids)
        flat.is_trained = True
        return flat

"""The K nearest rows of a layer of short keys, on a CPU: exact, though keys are scanned as bytes.

Of every row it is known how far its bytes may put a distance off (Cauchy-Schwarz: |qk - q'k'| <= |q| |k - k'| +
|q - q'| |k'|). Rows whose least possible distance is above the K-th smallest largest possible one cannot be among the
K nearest; the exact distances of the others are computed, some 130 of 7,600 for K = 32 (shipped model, 2026-11-29).
"""

from __future__ import annotations

import ctypes
import logging
import threading

import numpy as np
import torch
from torch import Tensor

from model_runner.replica import native
from model_runner.replica.budget import LONGEST_BYTES
from model_runner.replica.layer import INFINITY, LayerReplica

log = logging.getLogger(__name__)

# Of longer keys codes take less time than bytes.
SHORTEST, MOST_ROWS = 16, 1 << 16
_BYTE = 127
_SMALLEST = 1e-30
_AT_ONCE = 1 << 13  # rows that are encoded
# Where more than one of so many rows have to be looked at, for these tokens on average, a scan of the keys is as fast.
_MOST_LOOKED_AT, _REMEMBERED = 4, 1024


class BoundedScan:
    """Scans one layer; keys that changed are taken in by the next lookup. Any thread may ask.

    512 tokens, 7,600 keys of 128 numbers, K = 32: 2.7 to 3.5 ms, a scan of the keys 12; one token 0.02 (2026-11-29).
    """

    def __init__(self, layer: LayerReplica) -> None:
        self._layer = layer
        self._encoding = threading.Lock()
        self._bytes: _Bytes | None = None
        self._tokens = self._looked_at = (
            0  # of the last lookups, and rows of which exact distances were computed
        )

    @property
    def nbytes(self) -> int:
        """Bytes of RAM beside the layer's."""
        return 0 if self._bytes is None else self._bytes.nbytes

    def serves(self, tokens: int, k: int) -> bool:
        """Whether it answers, and takes less time than other ways; what is missing for it is compiled when asked."""
        layer = self._layer
        return (
            tokens > 0
            and SHORTEST <= layer.dimension <= LONGEST_BYTES
            and layer.rows <= MOST_ROWS
            and k <= native.MOST_NEIGHBOURS
            and layer.dtype == torch.float32
            and self._looked_at * _MOST_LOOKED_AT <= self._tokens * layer.rows
            and native.ready() is not None
        )

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As search.nearest; of a token that is not finite all slots are empty. Within the layer's lock."""
        kept, queries, tokens = self._up_to_date(), queries.contiguous(), len(queries)
        rows, distances = torch.empty(tokens, k, dtype=torch.int64), torch.empty(tokens, k)
        library = native.compiled()
        assert library is not None  # noqa: S101  # it serves
        looked_at = library.nearest(
            *(kept.address, queries.data_ptr(), tokens, k),
            *(rows.data_ptr(), distances.data_ptr()),
        )
        self._count(tokens, looked_at)
        return rows, distances

    def _count(self, tokens: int, looked_at: int) -> None:
        if self._tokens > _REMEMBERED:
            self._tokens, self._looked_at = self._tokens // 2, self._looked_at // 2
        # a first token that is far from every key must not decide
        self._tokens = max(self._tokens, _REMEMBERED // 8) + tokens
        self._looked_at += looked_at

    def _up_to_date(self) -> _Bytes:
        """The keys of the layer's version, which nothing changes while a lookup is inside."""
        with self._encoding:
            kept = self._bytes
            if kept is None or not kept.take_in(self._layer):
                kept = self._bytes = _Bytes(self._layer)
                self._tokens = self._looked_at = 0
            return kept


class _Bytes:
    """Keys of a layer at one version, less their mean, as bytes of a scale for each row; see native.cpp."""

    def __init__(self, layer: LayerReplica) -> None:
        self._keys, self.version = layer.keys, -1
        rows = -(-layer.capacity // native.BLOCK) * native.BLOCK
        self._quads = -(-layer.dimension // 8) * 2
        shown = layer.squared_norms[: layer.rows] < INFINITY
        self._mean = layer.keys[: layer.rows][shown].mean(0).nan_to_num(0.0)
        self._bytes = torch.zeros(rows // native.BLOCK, self._quads, native.BLOCK, 4).to(torch.int8)
        self._scales, self._errors = torch.zeros(rows), torch.zeros(rows)
        self._norms = torch.full((rows,), INFINITY)
        self._sums = torch.zeros(rows, dtype=torch.int32)
        tensors = (self._bytes, self._scales, self._norms, self._errors, self._sums)
        self.nbytes = sum(tensor.nbytes for tensor in tensors)
        self._there = native.Keys(
            *(tensor.data_ptr() for tensor in (*tensors, self._mean, self._keys)),
            *(0, layer.dimension, self._quads, 0.0),
        )
        self.address = ctypes.addressof(self._there)
        self.take_in(layer)

    def take_in(self, layer: LayerReplica) -> bool:
        """Follows the layer; False: it has other tensors, or most of it has changed."""
        if layer.version == self.version:
            return layer.keys is self._keys
        changed = np.flatnonzero(layer.row_versions[: layer.rows] > self.version)
        if layer.keys is not self._keys or (self.version >= 0 and len(changed) > layer.rows // 2):
            return False
        for some in torch.split(torch.from_numpy(changed), _AT_ONCE):
            self._norms[some] = INFINITY
            self._write(layer, some[layer.squared_norms[some] < INFINITY])
        self._there.blocks = -(-layer.rows // native.BLOCK)
        self.version = layer.version
        return True

    def _write(self, layer: LayerReplica, rows: Tensor) -> None:
        centred = layer.keys[rows] - self._mean
        scales = (centred.abs().amax(1) / _BYTE).clamp_min_(_SMALLEST)
        numbers = (centred / scales.unsqueeze(1)).round_()
        errors = torch.linalg.vector_norm(centred - numbers * scales.unsqueeze(1), dim=1)
        norms = centred.square().sum(1)
        self._scales[rows], self._errors[rows], self._norms[rows] = scales, errors, norms
        self._sums[rows] = (numbers.sum(1) * (_BYTE + 1)).int()
        padded = torch.nn.functional.pad(numbers, (0, 4 * self._quads - numbers.shape[1]))
        quads = padded.to(torch.int8).view(len(rows), self._quads, 4)
        self._bytes[rows // native.BLOCK, :, rows % native.BLOCK] = quads
        longest = float((norms.sqrt() + errors).max()) if len(rows) else 0.0
        self._there.longest = max(self._there.longest, longest)

"""Keys in two dimensions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

# Of the randomized method (Halko, Martinsson, Tropp 2011): directions beside the two, and times that they are refined.
_OVERSAMPLED, _REFINED = 8, 12


def principal_plane(keys: F32) -> tuple[F32, float]:
    """The first two principal components [n, 2] of keys [n, d], and the share of the variance that they have."""
    centred = keys - keys.mean(axis=0, keepdims=True)
    variance = float(np.square(centred, dtype=np.float64).sum())
    if variance == 0:
        return np.zeros((len(keys), 2), np.float32), 0.0
    width = min(2 + _OVERSAMPLED, *keys.shape)
    basis = np.random.default_rng(0).standard_normal((keys.shape[1], width)).astype(np.float32)
    for _ in range(_REFINED):
        basis, _ = np.linalg.qr(centred.T @ (centred @ basis))
    left, singular, _ = np.linalg.svd(centred @ basis, full_matrices=False)
    plane = np.zeros((len(keys), 2), np.float32)
    plane[:, : min(2, width)] = (left * singular)[:, :2]
    return plane, min(1.0, float(np.square(singular[:2], dtype=np.float64).sum()) / variance)

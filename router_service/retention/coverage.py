"""Greedy k-center: which keys cover the others best. Pure functions."""

from __future__ import annotations

import numpy as np

from router_service.arrays import F32
from router_service.retention.tables import F64, Rows


def farthest_first(keys: F32, size: int) -> Rows:
    """Rows of `size` centres of keys [n, d], in the order in which they were chosen (Gonzalez 1985).

    The first is the key nearest the mean, each other the key farthest from those before it; equals: the lowest row.
    The covering radius is at most twice the best possible one.
    """
    if not len(keys) or size <= 0:
        return np.empty(0, np.intp)
    wide, norms = _centred(keys)
    centres = [int(np.argmin(norms))]
    distances = _squared_distances(wide, norms, centres[0])
    while len(centres) < min(size, len(keys)):
        distances[centres[-1]] = -1.0
        centres.append(int(np.argmax(distances)))
        np.minimum(distances, _squared_distances(wide, norms, centres[-1]), out=distances)
    return np.array(centres, np.intp)


def covering_radius(keys: F32, centres: Rows) -> float:
    """The largest distance of a key [n, d] to its nearest centre; inf without centres, 0 without keys."""
    if not len(keys):
        return 0.0
    if not len(centres):
        return float("inf")
    wide, norms = _centred(keys)
    nearest = np.full(len(keys), np.inf)
    for centre in centres:
        np.minimum(nearest, _squared_distances(wide, norms, int(centre)), out=nearest)
    return float(np.sqrt(nearest.max()))


def block_share(size: int, total: int, start: int, stop: int) -> int:
    """How many of `size` places entries [start, stop) of `total` get; blocks end to end get `size` together."""
    return size * stop // total - size * start // total


def _centred(keys: F32) -> tuple[F64, F64]:
    """Keys around their mean and their squared lengths: of short vectors the expanded distance cancels less."""
    wide = keys.astype(np.float64)
    wide -= wide.mean(axis=0)
    return wide, np.einsum("nd,nd->n", wide, wide)


def _squared_distances(wide: F64, norms: F64, row: int) -> F64:
    expanded = norms - 2.0 * (wide @ wide[row]) + norms[row]
    return np.maximum(expanded, 0.0)

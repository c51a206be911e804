"""Greedy k-center: which keys cover the others best. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from router_service.arrays import F32
from router_service.retention.tables import F64, Rows

_CENTRES_AT_ONCE = 256


def centres_by_block(blocks: Iterable[tuple[Rows, F32]], size: int, total: int) -> Iterator[Rows]:
    """Rows of the centres of each block of (rows [b], keys [b, d]); `size` of `total` rows over all blocks.

    A block gets its share by its number of rows, and covers what the centres of the blocks before it left uncovered: of
    those centres as many are remembered as a block has rows, and half of them forgotten when there are more.
    """
    start, earlier = 0, None
    for rows, keys in blocks:
        stop = min(start + len(rows), total)
        chosen = farthest_first(keys, block_share(size, total, start, stop), earlier)
        yield rows[chosen]
        start = stop
        earlier = keys[chosen] if earlier is None else np.concatenate([earlier, keys[chosen]])
        while len(earlier) > len(keys):
            earlier = earlier[::2]


def farthest_first(keys: F32, size: int, earlier: F32 | None = None) -> Rows:
    """Rows of `size` centres of keys [n, d], in the order in which they were chosen (Gonzalez 1985).

    Each is the key farthest from the centres before it, among them `earlier` ones [m, d]; without any, the first is the
    key nearest the mean. Of equals the lowest row. Without `earlier` the covering radius is at most twice the best one.
    """
    if not len(keys) or size <= 0:
        return np.empty(0, np.intp)
    mean = keys.mean(axis=0, dtype=np.float64)
    wide, norms = _around(keys, mean)
    if earlier is not None and len(earlier):
        distances = _nearest_distances(wide, norms, _around(earlier, mean)[0])
        centres = [int(np.argmax(distances))]
    else:
        distances, centres = np.full(len(keys), np.inf), [int(np.argmin(norms))]
    while True:
        np.minimum(distances, _squared_distances(wide, norms, wide[centres[-1]]), out=distances)
        distances[centres[-1]] = -1.0
        if len(centres) >= min(size, len(keys)):
            return np.array(centres, np.intp)
        centres.append(int(np.argmax(distances)))


def covering_radius(keys: F32, centres: Rows) -> float:
    """The largest distance of a key [n, d] to its nearest centre; inf without centres, 0 without keys."""
    if not len(keys):
        return 0.0
    wide, norms = _around(keys, keys.mean(axis=0, dtype=np.float64))
    return float(np.sqrt(_nearest_distances(wide, norms, wide[centres]).max()))


def block_share(size: int, total: int, start: int, stop: int) -> int:
    """How many of `size` places entries [start, stop) of `total` get; blocks end to end get `size` together."""
    return size * stop // total - size * start // total


def _around(keys: F32, mean: F64) -> tuple[F64, F64]:
    """Keys less their mean, and their squared lengths: of short vectors the expanded distance cancels less."""
    wide = keys.astype(np.float64) - mean
    return wide, np.einsum("nd,nd->n", wide, wide)


def _nearest_distances(wide: F64, norms: F64, centres: F64) -> F64:
    """Squared distances [n] to the nearest centre; inf without centres."""
    nearest = np.full(len(wide), np.inf)
    for start in range(0, len(centres), _CENTRES_AT_ONCE):
        some = centres[start : start + _CENTRES_AT_ONCE]
        reach = np.einsum("md,md->m", some, some) - 2.0 * (wide @ some.T)
        np.minimum(nearest, norms + reach.min(axis=1), out=nearest)
    return np.maximum(nearest, 0.0)


def _squared_distances(wide: F64, norms: F64, centre: F64) -> F64:
    expanded = norms - 2.0 * (wide @ centre) + centre @ centre
    return np.maximum(expanded, 0.0)

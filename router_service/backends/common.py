"""What every backend does in the same way: names, stored keys, exclusions, results without neighbours."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from router_service.arrays import F32, NO_ID, ExampleRef, Neighbours
from router_service.backends.base import Metric
from router_service.errors import InvalidField

# "gen-", CURRENT and LOCK are names of the Edge backend's own files.
_PART = r"(?!gen-|CURRENT(?:/|$)|LOCK(?:/|$))[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}"
_NAME = re.compile(rf"{_PART}(/{_PART}){{0,3}}")
# Rounding a unit vector to f32 leaves its length within 2^-24 of 1.
_UNIT_TOLERANCE = 2.0**-23


def require_name(name: str) -> None:
    """Raises InvalidField unless `name` is 1 to 4 path parts that are safe and not reserved."""
    if not _NAME.fullmatch(name):
        raise InvalidField(
            "name", name, "letters, digits, '_', '-', '.', in up to 4 parts joined by '/'"
        )


def as_stored(rows: F32, metric: Metric, field: str) -> F32:
    """Keys or queries [n, d] as the metric compares them: unit length in f32 under cosine, else unchanged.

    Rows that are unit vectors as closely as f32 can tell stay as they are, so that a stored key stays what it was.
    Done here and not by the engine, which leaves vectors shorter than about 3e-4 as they are. Raises InvalidField that
    names the row when its length is 0 under cosine.
    """
    if metric is not Metric.COSINE:
        return rows
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    if not norms.all():
        row = int(np.argmin(norms))
        raise InvalidField(
            f"{field}[{row}]", "a zero vector", "a length above 0 under the cosine metric"
        )
    norms[np.abs(norms - 1.0) <= _UNIT_TOLERANCE] = 1.0
    stored: F32 = (rows / norms[:, None]).astype(np.float32)
    return stored


def per_query(exclude: Sequence[ExampleRef], queries: int) -> list[ExampleRef | None]:
    """The example that each query leaves out. Raises InvalidField unless none, one or one per query is given."""
    if len(exclude) == queries:
        return list(exclude)
    if len(exclude) > 1:
        raise InvalidField("exclude", f"{len(exclude)} examples", f"none, 1 or {queries}")
    return [exclude[0] if exclude else None] * queries


def empty_neighbours(queries: int, k: int, value_width: int) -> Neighbours:
    """[T, K] slots that hold no neighbour, to be filled from the left."""
    return Neighbours(
        np.full((queries, k), NO_ID, np.uint64),
        np.full((queries, k), np.inf, np.float32),
        np.zeros((queries, k, value_width), np.float32),
    )

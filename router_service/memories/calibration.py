"""The bandwidth of a layer, from exact distances to the nearest entry that says something else than a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_service import kernels
from router_service.arrays import F32, F64, Bool, Entries, ExampleRef
from router_service.backends.base import CollectionReader, pages
from router_service.errors import InvalidField

# An entry nearer than this share of the typical squared distance is a copy of the query: text made from a template, or
# text that is there twice. On ordinary text at most 3 % of the nearest are (docs/recall.md).
COPY_SHARE = 1e-3
# Numbers that a sample of a layer's own keys compares, some 20 s: smaller in layers of more than 100,000 x 2,048.
MOST_NUMBERS = 1 << 38
_FEWEST_QUERIES = 64
_PAGE_ENTRIES = 2048
# float64 products held at once, 64 MiB.
_BLOCK_ELEMENTS = 1 << 23


@dataclass(frozen=True, slots=True)
class LayerCalibration:
    """The bandwidth of one layer and the distance that set it.

    Attributes:
        typical_squared_distance: the median between queries and entries.
        queries: that had an entry to measure, of those asked.
        copies: of them, those whose nearest entry was a copy, which counted as their own example.

    """

    layer: int
    squared_distance: float
    gamma: float
    queries: int
    typical_squared_distance: float
    copies: int


@dataclass(frozen=True, slots=True)
class Queries:
    """Router inputs [n, d], and for each the example that it does not see; none: it sees all."""

    inputs: F32
    own: Sequence[ExampleRef] = ()

    @staticmethod
    def of_own(sample: Entries, entries: int) -> Queries:
        """Keys of the layer, which has so many entries, each without its own example; as many as MOST_NUMBERS allow.

        Entries that change nothing stand for text that the memory is not for: they are not asked about.
        """
        numbers = max(1, entries * sample.keys.shape[1])
        if len(saying := np.flatnonzero(sample.values.any(axis=1))):
            sample = sample.take(saying)
        some = sample.slice(0, max(_FEWEST_QUERIES, MOST_NUMBERS // numbers))
        return Queries(some.keys, [ExampleRef(p.source, p.example) for p in some.provenance])


def calibrated(
    layer: int,
    collection: CollectionReader,
    queries: Queries,
    lambda0: float,
    quantile: float,
    on_page: Callable[[int], None],
) -> LayerCalibration:
    """The gamma at which `quantile` of the distances to the nearest entry has similarity lambda0.

    Every entry is looked at, index or not. `on_page` is called after each page, with the entries that were looked at;
    what it raises ends the work.
    Raises InvalidField when no query has an entry of another example, or none that is not a copy of it.
    """
    found = _nearest(collection, queries, on_page)
    some = np.isfinite(found.nearest)
    if not some.any():
        raise InvalidField(
            "memory",
            f"no neighbours in layer {layer}",
            "a layer with entries of at least two examples; upsert first",
        )
    different = np.isfinite(found.beyond_copies)
    if not different.any():
        raise InvalidField(
            "memory",
            f"nothing but copies in layer {layer}: each of {int(some.sum())} queries repeats an entry",
            "entries of text that differs, or router inputs of held-out text to calibrate with",
        )
    distance = float(np.quantile(found.beyond_copies[different], quantile))
    return LayerCalibration(
        layer,
        distance,
        kernels.calibrated_gamma(distance, lambda0),
        int(different.sum()),
        found.typical,
        int(np.count_nonzero(found.nearest[some] < found.beyond_copies[some])),
    )


@dataclass(frozen=True, slots=True)
class _Nearest:
    """Squared distances [n]: to the nearest entry that a query sees, and the nearest that is no copy; inf if none."""

    nearest: F64
    beyond_copies: F64
    typical: float


def _nearest(
    collection: CollectionReader, queries: Queries, on_page: Callable[[int], None]
) -> _Nearest:
    done = 0
    nearest = np.full(len(queries.inputs), np.inf)
    beyond = nearest.copy()
    typical: float | None = None
    centre = queries.inputs.mean(axis=0, dtype=np.float64) if len(queries.inputs) else 0.0
    for page in pages(collection, _PAGE_ENTRIES, with_keys=True):
        keys = page.keys.astype(np.float64) - centre
        # Ids are hashes, so that the first page is a random sample of the layer
        for rows in _blocks(len(queries.inputs), len(page)):
            asked = queries.inputs[rows].astype(np.float64) - centre
            distances = _squared_distances(asked, keys)
            if typical is None:
                typical = float(np.median(distances))
            if queries.own:
                distances[_same_example(queries.own[rows], page)] = np.inf
            np.minimum(nearest[rows], distances.min(axis=1), out=nearest[rows])
            distances[distances <= COPY_SHARE * typical] = np.inf
            np.minimum(beyond[rows], distances.min(axis=1), out=beyond[rows])
        done += len(page)
        on_page(done)
    return _Nearest(nearest, beyond, typical or 0.0)


def _blocks(queries: int, entries: int) -> list[slice]:
    step = max(1, _BLOCK_ELEMENTS // max(1, entries))
    return [slice(start, start + step) for start in range(0, queries, step)]


def _squared_distances(queries: F64, keys: F64) -> F64:
    """[n, m] of rows less a common centre; where the expansion cancels, two rows are copies of each other."""
    lengths = np.einsum("nd,nd->n", queries, queries)[:, None] + np.einsum("md,md->m", keys, keys)
    return np.maximum(lengths - 2.0 * (queries @ keys.T), 0.0)


def _same_example(own: Sequence[ExampleRef], page: Entries) -> Bool:
    """[n, m]: which entries are of a query's own example."""
    numbers: dict[ExampleRef, int] = {ref: number for number, ref in enumerate(set(own))}
    mine: NDArray[np.intp] = np.array([numbers[ref] for ref in own], np.intp)
    theirs = np.array(
        [numbers.get(ExampleRef(p.source, p.example), -1) for p in page.provenance], np.intp
    )
    return mine[:, None] == theirs

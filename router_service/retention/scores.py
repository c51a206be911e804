"""How much an entry is worth keeping, from the entry alone: one number each, higher stays. Pure functions."""

from __future__ import annotations

from collections.abc import Collection as Container

import numpy as np

from router_service.arrays import Bool, Entries, ExampleRef
from router_service.memory_settings import Kind
from router_service.retention.reading import LayerReading, overlap
from router_service.retention.tables import F64, HitCounts, OwnAssignments


def created_unix_ms(page: Entries) -> F64:
    """Creation times [n] in milliseconds since the epoch; 0 for an entry that was never stamped."""
    times = (origin.created_unix_ms for origin in page.provenance)
    return np.fromiter(times, np.float64, len(page))


def gains(page: Entries) -> F64:
    """Gains [n] in nats, as the builder measured them."""
    return np.fromiter((origin.gain for origin in page.provenance), np.float64, len(page))


def outside(page: Entries, examples: Container[ExampleRef], sources: Container[str]) -> F64:
    """0 for entries of these examples or sources, 1 for the others [n]."""
    inside = (
        origin.source in sources or ExampleRef(origin.source, origin.example) in examples
        for origin in page.provenance
    )
    return 1.0 - np.fromiter(inside, np.float64, len(page))


def use(page: Entries, hits: HitCounts, spare_created_from_unix_ms: int | None) -> F64:
    """Hits [n]; inf for entries created at or after the given time, which had no chance yet."""
    counts = hits.of_entries(page.ids)
    if spare_created_from_unix_ms is None:
        return counts
    return np.where(created_unix_ms(page) >= spare_created_from_unix_ms, np.inf, counts)


def strength(page: Entries, reading: LayerReading, own: OwnAssignments | None) -> F64:
    """How far an entry can move routing [n].

    Logit deltas: the Euclidean norm, in logits. Assignments: L1 / 2 in [0, 1] to the router's own assignment where
    `own` has it, else to the uniform one.
    """
    dense = reading.dense(page.values)
    if reading.settings.kind is Kind.LOGIT_DELTA:
        return np.linalg.norm(dense.astype(np.float64), axis=1)
    reference = np.ones_like(dense)
    if own is not None:
        rows, known = own.of_entries(page.ids)
        reference[known] = reading.dense(rows[known])
    return 1.0 - overlap(dense, reference)


def lowest(scores: F64, among: Bool, drop: int) -> Bool:
    """The `drop` lowest scores [n] of the rows `among` [n]; of equal scores the later row goes."""
    rows = np.flatnonzero(among)
    worst_first = rows[np.lexsort((-rows, scores[rows]))]
    chosen = np.zeros(len(scores), np.bool_)
    chosen[worst_first[: max(0, drop)]] = True
    return chosen

"""Small layers to prune: what they hold, and how they are read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import strategies as st

from router_service.arrays import F32, Entries, Provenance
from router_service.backends.base import Collection, CollectionSpec, Metric
from router_service.backends.exact import ExactCollection
from router_service.memories.settings import MemorySettings, preset
from router_service.retention.plan import PrunePlan
from router_service.retention.pruning import PruneOptions, PruneResult, plan_prune
from router_service.retention.scores import LayerReading

DIMENSION = 3
EXPERTS = 4
TOP_K = 2
# Similarity .90, .82, .74, .67, ... at squared distances 1, 2, 3, 4: no test threshold is near one of them.
DELTAS = LayerReading(
    0, EXPERTS, replace(preset("recommended"), gamma=(0.1,), neighbours=4, step_size=(2.0,))
)
ASSIGNMENTS = LayerReading(
    0, EXPERTS, replace(preset("paper"), gamma=(0.1,), neighbours=4, min_lambda=0.1)
)
LOGITS = LayerReading(
    0, EXPERTS, replace(preset("paper-v2"), gamma=(0.1,), neighbours=4, min_lambda=0.1)
)
READINGS = pytest.mark.parametrize(
    "reading", [DELTAS, ASSIGNMENTS, LOGITS], ids=lambda reading: reading.settings.kind
)


def filled(entries: Entries, metric: Metric = Metric.EUCLID) -> ExactCollection:
    spec = CollectionSpec(entries.keys.shape[1], metric, entries.values.shape[1])
    collection = ExactCollection(spec)
    collection.upsert(entries)
    return collection


def pruned(
    entries: Entries, *policies: object, reading: LayerReading = DELTAS, **rest: int | None
) -> PruneResult:
    """The result for a plan of these policies, without the effect; page_entries and the plan's sizes in `rest`."""
    options = PruneOptions(page_entries=rest.pop("page_entries", None) or 7, effect_queries=0)
    plan = PrunePlan(policies, **{"keep_at_least": 0, **rest})  # type: ignore[arg-type]
    return plan_prune(filled(entries), plan, reading, options)


def random_entries(n: int, reading: LayerReading = DELTAS, *, seed: int = 0) -> Entries:
    """Keys, gains and creation times from few numbers, so that there are ties; 5 entries to an example."""
    random = np.random.default_rng(seed)
    keys = random.integers(0, 4, (n, DIMENSION)).astype(np.float32)
    provenance = [
        Provenance(
            f"source {row % 2}",
            f"example {row // 5}",
            row,
            gain=float(random.integers(0, 4)),
            created_unix_ms=int(random.integers(0, 9)),
        )
        for row in range(n)
    ]
    ids = np.sort(random.choice(10 * n, n, replace=False)).astype(np.uint64)
    return Entries(ids, keys, random_values(random, n, reading), provenance)


def random_values(random: np.random.Generator, n: int, reading: LayerReading) -> F32:
    """Logits or deltas of small whole numbers, or two different experts with weights from 1/4 to 1."""
    if reading.settings.kind.blends_logits:
        return random.integers(-2, 3, (n, EXPERTS)).astype(np.float32)
    experts = random.permuted(np.tile(np.arange(EXPERTS), (n, 1)), axis=1)[:, :TOP_K]
    weights = random.integers(1, 5, (n, TOP_K)) / 4
    return np.concatenate([experts, weights], axis=1).astype(np.float32)


def layers(reading: LayerReading = DELTAS) -> st.SearchStrategy[Entries]:
    """Layers of 0 to 40 entries."""
    return st.builds(
        lambda n, seed: random_entries(n, reading, seed=seed),
        st.integers(0, 40),
        st.integers(0, 10_000),
    )


def all_entries(collection: Collection) -> Entries:
    return collection.scroll(None, collection.info().entries + 1)


def with_provenance(entries: Entries, **fields: list[object]) -> Entries:
    """A copy with one value per entry of some provenance fields."""
    rows = [
        replace(origin, **{name: values[row] for name, values in fields.items()})  # type: ignore[arg-type]
        for row, origin in enumerate(entries.provenance)
    ]
    return replace(entries, provenance=rows)


def settings_of(reading: LayerReading, **changes: object) -> LayerReading:
    settings: MemorySettings = replace(reading.settings, **changes)  # type: ignore[arg-type]
    return replace(reading, settings=settings)

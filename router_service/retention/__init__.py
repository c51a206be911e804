"""Retention: which entries of a layer go. Decides only; deleting is the caller's.

Nothing here reads a clock, logs or changes a collection: cut-off times, hit counts and seeds come from the caller.
"""

from router_service.retention.plan import (
    Age,
    Agreement,
    Coverage,
    Forget,
    Gain,
    NearDuplicates,
    Policy,
    PrunePlan,
    Random,
    Strength,
    Use,
    reason_of,
    validate,
)
from router_service.retention.pruning import PruneOptions, PruneResult, plan_prune
from router_service.retention.scores import LayerReading

__all__ = [
    "Age",
    "Agreement",
    "Coverage",
    "Forget",
    "Gain",
    "LayerReading",
    "NearDuplicates",
    "Policy",
    "PruneOptions",
    "PrunePlan",
    "PruneResult",
    "Random",
    "Strength",
    "Use",
    "plan_prune",
    "reason_of",
    "validate",
]

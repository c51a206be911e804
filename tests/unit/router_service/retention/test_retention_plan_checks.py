from __future__ import annotations

import numpy as np
import pytest

from router_service.arrays import HitCounts, OwnAssignments
from router_service.errors import InvalidRequest
from router_service.memories.settings import Kind
from router_service.retention.plan import (
    Age,
    Agreement,
    Coverage,
    Forget,
    Gain,
    NearDuplicates,
    PrunePlan,
    Random,
    Strength,
    Use,
    reason_of,
    validate,
)

DELTA, ASSIGNMENT = Kind.LOGIT_DELTA, Kind.ASSIGNMENT
OWN = OwnAssignments(np.array([1], np.uint64), np.zeros((1, 4), np.float32))
UNSORTED = HitCounts(np.array([2, 1], np.uint64), np.array([1, 1]))


@pytest.mark.parametrize(
    ("plan", "kind", "message"),
    [
        (PrunePlan([]), DELTA, r"plan.policies: got '?0'?, expected at least one"),
        (PrunePlan([Age(1), Age(2)]), DELTA, r"policies\[1\].*each policy once"),
        (PrunePlan([Age(1)], keep_at_least=-1), DELTA, "keep_at_least"),
        (PrunePlan([Age()]), DELTA, "max_entries_by_age.*a maximum size, or a threshold"),
        (PrunePlan([Age(1)], max_entries=5), DELTA, "none that ranks.*exactly one policy"),
        (PrunePlan([Age(), Gain()], max_entries=5), DELTA, "exactly one policy"),
        (PrunePlan([Age()], max_entries=0), DELTA, "max_entries: got '?0'?, expected 1 or more"),
        (PrunePlan([Age()], 9, 8), DELTA, "max_entries: got '?8'?, expected 9 or more"),
        (PrunePlan([Forget()]), DELTA, "an example or a source"),
        (PrunePlan([Gain(float("nan"))]), DELTA, r"policies\[0\].threshold"),
        (PrunePlan([Strength(float("inf"))]), DELTA, r"policies\[0\].threshold"),
        (PrunePlan([NearDuplicates(similarity=0.0)]), DELTA, "similarity"),
        (PrunePlan([NearDuplicates(similarity=1.1)]), DELTA, "similarity"),
        (PrunePlan([NearDuplicates(agreement=-0.1)]), ASSIGNMENT, r"agreement.*in \[0, 1\]"),
        (PrunePlan([Agreement(-1.5)]), DELTA, r"below.*in \[-1, 1\]"),
        (PrunePlan([Agreement(0.1, neighbours=0)]), DELTA, "neighbours"),
        (PrunePlan([Agreement(0.1, neighbours=2**40)]), DELTA, "neighbours"),
        (PrunePlan([Agreement(0.1, min_similarity=2)]), DELTA, "min_similarity"),
        (PrunePlan([Coverage(0)], max_entries=1), DELTA, "block_entries"),
        (PrunePlan([Use(UNSORTED, 1)]), DELTA, "hits.ids.*ascending"),
        (PrunePlan([Strength(0.1, OWN)]), DELTA, "own.*none for a memory of logit deltas"),
        (PrunePlan([Strength(0.1, OWN)]), Kind.LOGITS, "own.*none for a memory of logit deltas or"),
    ],
)
def test_what_makes_no_sense_is_named(plan: PrunePlan, kind: Kind, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        validate(plan, kind)


@pytest.mark.parametrize(
    "plan",
    [
        PrunePlan([Age(1), Age()], max_entries=5),
        PrunePlan([Agreement(-1.0), NearDuplicates(1.0, 1.0), Random()], 5, 5),
        PrunePlan([Use(HitCounts.of({3: 1, 2: 4}), 1), Coverage()], max_entries=1),
    ],
)
def test_what_makes_sense_passes(plan: PrunePlan) -> None:
    validate(plan, DELTA)


def test_own_assignments_are_for_assignment_memories() -> None:
    validate(PrunePlan([Strength(0.1, OWN)]), ASSIGNMENT)


def test_reasons_tell_threshold_from_size() -> None:
    assert reason_of(Age(1)) == "age"
    assert reason_of(Age()) == "max_entries_by_age"
    assert reason_of(Coverage()) == "max_entries_by_coverage"
    assert reason_of(NearDuplicates()) == "near_duplicates"

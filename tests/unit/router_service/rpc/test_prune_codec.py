"""Plans on the wire: every field becomes its policy, and what makes no sense is refused by the field's name."""

from __future__ import annotations

from typing import Any

import pytest
from knnmoe.v1 import retention_pb2 as pb

from router_service.arrays import ExampleRef
from router_service.errors import InvalidField
from router_service.retention.plan import (
    Age,
    Agreement,
    Coverage,
    Forget,
    Gain,
    NearDuplicates,
    Random,
    Strength,
    Use,
)
from router_service.rpc.retention import decode_plan


def test_every_threshold() -> None:
    plan = pb.PrunePlan(
        forget=[pb.EntryFilter(source="a"), pb.EntryFilter(source="b", example="1")],
        older_than_unix_ms=1000,
        unused_below=2,
        spare_newer_than_unix_ms=3000,
        gain_below=-0.5,
        strength_below=0.25,
        agreement_below=0.0,
        near_duplicate_similarity=0.98,
        near_duplicate_agreement=0.8,
        keep_at_least=7,
    )
    decoded = decode_plan(plan).plan
    forget, age, use, gain, strength, *others = decoded.policies
    assert forget == Forget(frozenset({ExampleRef("b", "1")}), frozenset({"a"}))
    assert age == Age(1000)
    assert isinstance(use, Use)
    assert (use.fewer_than, use.spare_created_from_unix_ms) == (2, 3000)
    assert isinstance(strength, Strength)
    assert (gain, strength.below) == (Gain(-0.5), 0.25)
    assert others == [Agreement(0.0), NearDuplicates(0.98, 0.8)]
    assert (decoded.keep_at_least, decoded.max_entries) == (7, None)


@pytest.mark.parametrize(
    ("by", "kind"),
    [
        (pb.PRUNE_RANKING_AGE, Age),
        (pb.PRUNE_RANKING_USE, Use),
        (pb.PRUNE_RANKING_GAIN, Gain),
        (pb.PRUNE_RANKING_STRENGTH, Strength),
        (pb.PRUNE_RANKING_DISAGREEMENT, Agreement),
        (pb.PRUNE_RANKING_COVERAGE, Coverage),
        (pb.PRUNE_RANKING_RANDOM, Random),
    ],
)
def test_every_ranking(by: Any, kind: type) -> None:
    decoded = decode_plan(pb.PrunePlan(max_entries=10, by=by, seed=5))
    [policy] = decoded.plan.policies
    assert isinstance(policy, kind)
    assert (decoded.plan.max_entries, decoded.max_share) == (10, None)
    assert not isinstance(policy, Random) or policy.seed == 5
    shared = decode_plan(pb.PrunePlan(max_share=0.5, by=by))
    assert shared.max_share == 0.5


NAN = float("nan")
BAD: list[tuple[dict[str, Any], str]] = [
    ({"forget": [pb.EntryFilter()]}, "plan.forget[0].source: got 'nothing'"),
    ({"forget": [pb.EntryFilter(source="x" * 2000)]}, "plan.forget[0].source"),
    ({"gain_below": NAN}, "plan.gain_below: got nan"),
    ({"strength_below": float("inf")}, "plan.strength_below: got inf"),
    ({"agreement_below": 1.5}, "plan.agreement_below: got 1.5, expected in [-1, 1]"),
    ({"agreement_below": NAN}, "plan.agreement_below: got nan"),
    ({"near_duplicate_similarity": 0.0}, "plan.near_duplicate_similarity: got 0.0"),
    ({"near_duplicate_similarity": 0.9, "near_duplicate_agreement": 2.0}, "plan.near_duplicate_agreement"),
    ({"near_duplicate_agreement": 0.9}, "together with plan.near_duplicate_similarity"),
    ({"spare_newer_than_unix_ms": 1, "gain_below": 0}, "together with plan.unused_below"),
    ({"max_share": 0.0, "by": pb.PRUNE_RANKING_AGE}, "plan.max_share: got 0.0"),
    ({"max_share": NAN, "by": pb.PRUNE_RANKING_AGE}, "plan.max_share: got nan"),
    ({"max_entries": 5}, "plan.by: got 'nothing', expected who goes first: PRUNE_RANKING_AGE"),
    ({"max_entries": 5, "by": 99}, "plan.by: got 99"),
    ({"by": pb.PRUNE_RANKING_AGE}, "together with plan.max_entries or max_share"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "words"), BAD)
def test_plans_that_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidField) as refused:
        decode_plan(pb.PrunePlan(**fields))
    assert words in str(refused.value)

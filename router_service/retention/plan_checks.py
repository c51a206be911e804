"""Whether a plan makes sense for a memory. Every failure is an InvalidField that names the policy and the remedy."""

from __future__ import annotations

import math

from router_service.errors import InvalidField
from router_service.memory_settings import MAX_NEIGHBOURS, Kind
from router_service.retention.plan import (
    Agreement,
    Coverage,
    Forget,
    NearDuplicates,
    Policy,
    PrunePlan,
    Strength,
    Use,
    ranks,
    reason_of,
)
from router_service.retention.tables import require_ascending


def validate(plan: PrunePlan, kind: Kind) -> None:
    """Raises InvalidField or InvalidTensor on the first thing that is wrong with a plan for a memory of `kind`."""
    _require("policies", len(plan.policies), bool(plan.policies), "at least one policy")
    names = [reason_of(policy) for policy in plan.policies]
    for number, name in enumerate(names):
        _require(f"policies[{number}]", name, name not in names[:number], "each policy once")
    _require("keep_at_least", plan.keep_at_least, plan.keep_at_least >= 0, "0 or more")
    _check_size(plan)
    for number, policy in enumerate(plan.policies):
        _check_policy(f"policies[{number}]", policy, kind)


def _check_size(plan: PrunePlan) -> None:
    """A maximum size needs exactly one policy that ranks, and the other way round."""
    ranking = [reason_of(policy) for policy in plan.policies if ranks(policy)]
    if plan.max_entries is None:
        expected = "a maximum size, or a threshold for that policy"
        _require("max_entries", f"none, with {', '.join(ranking)}", not ranking, expected)
        return
    least = max(1, plan.keep_at_least)
    _require("max_entries", plan.max_entries, plan.max_entries >= least, f"{least} or more")
    expected = "exactly one policy without a threshold, which decides who goes"
    _require("policies", ", ".join(ranking) or "none that ranks", len(ranking) == 1, expected)


def _check_policy(field: str, policy: Policy, kind: Kind) -> None:
    if isinstance(policy, NearDuplicates):
        similarity, agreement = policy.similarity, policy.agreement
        _require(f"{field}.similarity", similarity, 0 < similarity <= 1, "in (0, 1]")
        _check_agreement(f"{field}.agreement", agreement, kind)
    elif isinstance(policy, Coverage):
        blocks = policy.block_entries
        _require(f"{field}.block_entries", blocks, 1 <= blocks <= 65_536, "1 to 65536")
    elif isinstance(policy, Forget):
        named = len(policy.examples) + len(policy.sources)
        _require(field, "no example and no source", named > 0, "an example or a source to forget")
    else:
        _check_threshold(field, policy.threshold)
    if isinstance(policy, Agreement):
        _check_disagreement(field, policy, kind)
    if isinstance(policy, Use):
        require_ascending(f"plan.{field}.hits.ids", policy.hits.ids, len(policy.hits.hits))
    if isinstance(policy, Strength):
        _check_own(field, policy, kind)


def _check_threshold(field: str, threshold: float | None) -> None:
    finite = threshold is None or math.isfinite(threshold)
    _require(f"{field}.threshold", threshold, finite, "a finite number")


def _check_disagreement(field: str, policy: Agreement, kind: Kind) -> None:
    within = 1 <= policy.neighbours <= MAX_NEIGHBOURS
    _require(f"{field}.neighbours", policy.neighbours, within, f"1 to {MAX_NEIGHBOURS}")
    least = policy.min_similarity
    _require(f"{field}.min_similarity", least, 0 <= least <= 1, "in [0, 1]")
    if policy.below is not None:
        _check_agreement(f"{field}.below", policy.below, kind)


def _check_own(field: str, policy: Strength, kind: Kind) -> None:
    if policy.own is None:
        return
    expected = "none for a memory of logit deltas, whose strength is their norm"
    _require(f"{field}.own", "assignments", kind is Kind.ASSIGNMENT, expected)
    require_ascending(f"plan.{field}.own.ids", policy.own.ids, len(policy.own.values))


def _check_agreement(field: str, agreement: float, kind: Kind) -> None:
    least = 0 if kind is Kind.ASSIGNMENT else -1
    _require(field, agreement, least <= agreement <= 1, f"in [{least}, 1]")


def _require(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise InvalidField(f"plan.{name}", value, expected)

"""The policies of retention and how a plan combines them.

A score policy with a threshold drops every entry whose score is below it; without one it ranks, and the lowest go until
`max_entries` are left. Order: Forget, Age, Use, Gain and Strength look at every entry on its own, so an entry may have
several reasons; Agreement, then NearDuplicates, then the ranking policy look only at what is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from router_service.arrays import (
    F64,
    Entries,
    ExampleRef,
    HitCounts,
    OwnAssignments,
    mixed_ids,
    require_ascending,
)
from router_service.errors import InvalidField
from router_service.memories.settings import MAX_NEIGHBOURS, Kind
from router_service.retention import scores
from router_service.retention.scores import LayerReading


@dataclass(frozen=True, slots=True)
class Forget:
    """Entries of these examples, and of whole sources. Never undone by `keep_at_least`."""

    name: ClassVar[str] = "forget"
    threshold: ClassVar[float] = 1.0
    examples: frozenset[ExampleRef] = frozenset()
    sources: frozenset[str] = frozenset()

    def scores(self, page: Entries, reading: LayerReading) -> F64:
        """0 for what is to be forgotten, 1 for the others [n]."""
        return scores.outside(page, self.examples, self.sources)


@dataclass(frozen=True, slots=True)
class Age:
    """Entries created before a time; without one, the oldest.

    The service stamps what it stores; an entry that was never stamped counts as the oldest.
    """

    name: ClassVar[str] = "age"
    older_than_unix_ms: int | None = None

    @property
    def threshold(self) -> float | None:
        """Milliseconds since the epoch."""
        return self.older_than_unix_ms

    def scores(self, page: Entries, reading: LayerReading) -> F64:
        """Creation times [n] in milliseconds since the epoch."""
        return scores.created_unix_ms(page)


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """Entries with fewer hits than `fewer_than`; without it, the least used. Newer ones can be spared."""

    name: ClassVar[str] = "use"
    hits: HitCounts
    fewer_than: int | None = None
    spare_created_from_unix_ms: int | None = None

    @property
    def threshold(self) -> float | None:
        """A number of hits."""
        return self.fewer_than

    def scores(self, page: Entries, reading: LayerReading) -> F64:
        """Hits [n]; inf for entries that are spared."""
        return scores.use(page, self.hits, self.spare_created_from_unix_ms)


@dataclass(frozen=True, slots=True)
class Gain:
    """Entries whose gain, in nats, is below `below`; without it, the smallest gains."""

    name: ClassVar[str] = "gain"
    below: float | None = None

    @property
    def threshold(self) -> float | None:
        """Nats."""
        return self.below

    def scores(self, page: Entries, reading: LayerReading) -> F64:
        """Gains [n] in nats."""
        return scores.gains(page)


@dataclass(frozen=True, slots=True, eq=False)
class Strength:
    """Entries that hardly move routing: see scores.strength; without `below`, the weakest."""

    name: ClassVar[str] = "strength"
    below: float | None = None
    own: OwnAssignments | None = None

    @property
    def threshold(self) -> float | None:
        """Logits, or half an L1 distance."""
        return self.below

    def scores(self, page: Entries, reading: LayerReading) -> F64:
        """How far an entry can move routing [n], in logits or as half an L1 distance."""
        return scores.strength(page, reading, self.own)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Entries that contradict the kernel average of their nearest neighbours from other examples: they mislead.

    Cosine of logit deltas or logits, or overlap of assignments, below `below`; without it, the lowest. An entry whose
    nearest such neighbour is less similar than `min_similarity` is not judged, and stays. So does one without
    provenance: all of these count as one example.
    """

    name: ClassVar[str] = "agreement"
    below: float | None = None
    neighbours: int = 16
    min_similarity: float = 0.01

    @property
    def threshold(self) -> float | None:
        """A cosine or an overlap."""
        return self.below


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """Of entries with nearly the same key (kernel similarity) and value (cosine or overlap), the best one stays.

    Best is the highest gain, then the smallest id. Every entry that goes is itself near one that stays, except in
    neighbourhoods of more than policies.MAX_LINKS better equals. As complete as the collection's search: of many
    identical keys an HNSW index may miss some, and more than one stays.
    """

    name: ClassVar[str] = "near_duplicates"
    similarity: float = 0.98
    agreement: float = 0.9


@dataclass(frozen=True, slots=True)
class Coverage:
    """Ranks by greedy k-center over the keys, in blocks of b entries in the order of ids.

    When m of n entries are to stay, a block keeps its share b m / n of them, for b (b + b m / n) d multiplications.
    Outliers stay: they are what others cover least.
    """

    name: ClassVar[str] = "coverage"
    block_entries: int = 2048


@dataclass(frozen=True, slots=True)
class Random:
    """Ranks by a hash of id and seed: the control that any other ranking has to beat."""

    name: ClassVar[str] = "random"
    threshold: ClassVar[None] = None
    seed: int = 0

    def scores(self, page: Entries, reading: LayerReading) -> F64:
        """Numbers in [0, 2^53)."""
        return (mixed_ids(page.ids, self.seed) >> np.uint64(11)).astype(np.float64)


RowPolicy = Forget | Age | Use | Gain | Strength | Random
Policy = RowPolicy | Agreement | NearDuplicates | Coverage

# The order in which policies are applied; keep_at_least undoes the last ones first.
_ORDER: tuple[type[Policy], ...] = (Forget, Age, Use, Gain, Strength, Agreement, NearDuplicates)


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What goes. `keep_at_least` and `max_entries` are per layer, in entries."""

    policies: Sequence[Policy]
    keep_at_least: int = 1
    max_entries: int | None = None

    def in_order(self) -> list[tuple[int, Policy]]:
        """Number and policy of those with a threshold, in the order in which they are applied."""
        numbered = [(i, policy) for i, policy in enumerate(self.policies) if not ranks(policy)]
        return sorted(numbered, key=lambda pair: _ORDER.index(type(pair[1])))

    def ranking(self) -> tuple[int, Policy] | None:
        """Number and policy that decides who goes when there are more than `max_entries`."""
        return next(((i, p) for i, p in enumerate(self.policies) if ranks(p)), None)


def ranks(policy: Policy) -> bool:
    """Whether a policy ranks for `max_entries` rather than drops by itself."""
    if isinstance(policy, NearDuplicates):
        return False
    return isinstance(policy, Coverage) or policy.threshold is None


def reason_of(policy: Policy) -> str:
    """The name under which a result counts the entries that a policy drops."""
    return f"max_entries_by_{policy.name}" if ranks(policy) else policy.name


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
    expected = "none for a memory of logit deltas or logits, whose strength is their norm"
    _require(f"{field}.own", "assignments", not kind.blends_logits, expected)
    require_ascending(f"plan.{field}.own.ids", policy.own.ids, len(policy.own.values))


def _check_agreement(field: str, agreement: float, kind: Kind) -> None:
    least = -1 if kind.blends_logits else 0
    _require(field, agreement, least <= agreement <= 1, f"in [{least}, 1]")


def _require(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise InvalidField(f"plan.{name}", value, expected)

"""What a plan drops of one layer, and what that is expected to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from router_service.arrays import F64, U64, Entries, mixed_ids
from router_service.backends.base import Collection, pages
from router_service.errors import InvalidField
from router_service.retention import scores
from router_service.retention.plan import (
    Agreement,
    Coverage,
    Forget,
    NearDuplicates,
    Policy,
    PrunePlan,
    RowPolicy,
    reason_of,
    validate,
)
from router_service.retention.policies import agreement_scores, not_covering, redundant
from router_service.retention.run import U32, Ledger, Run, everyone
from router_service.retention.scores import LayerReading

# Another stream of numbers than Random's: a sample of its victims would be no sample.
_SAMPLE_SALT = 0x5EED0FEFFEC7


def _ignore(stage: str, entries: int) -> None:
    """Nobody is watching."""


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """How a plan is computed. `page_entries` never shows in the result, the others only in the expected effect."""

    page_entries: int = 1024
    effect_queries: int = 256  # 0: no expected effect
    seed: int = 0
    # Called with the stage and the entries read so far, page by page; raise from it to cancel.
    on_page: Callable[[str, int], None] = _ignore


@dataclass(frozen=True, slots=True, eq=False)
class PruneResult:
    """What a plan drops of a layer of `entries` entries, and what that is expected to change."""

    entries: int
    ids_to_drop: U64  # [m] ascending
    reason_bits: U32  # [m]: bit p stands for policy p of the plan
    # Entries per reason_of(policy); one with several reasons counts in each.
    reasons: dict[str, int]
    kept: int
    rescued: int  # by keep_at_least
    bytes_estimate: int  # of what goes; the engine gives disk back when it optimizes
    expected_effect: dict[str, float]  # see scores.expected_effect
    incomplete_searches: int  # entries whose neighbourhood could not be seen whole


def plan_prune(
    collection: Collection,
    plan: PrunePlan,
    reading: LayerReading,
    options: PruneOptions | None = None,
) -> PruneResult:
    """What `plan` drops of a layer; changes nothing.

    Raises InvalidField on a plan that makes no sense, and on one that would leave fewer than `keep_at_least` entries by
    forgetting alone; StorageError when the engine fails.
    """
    options = options or PruneOptions()
    validate(plan, reading.settings.kind)
    run = _first_pass(collection, plan, reading, options)
    forget = _forget_of(plan)
    _require_enough_left(plan, run.scores.get(forget))
    for number, policy in plan.in_order():
        _apply(run, number, policy)
    _shrink(run, plan)
    rescued = run.ledger.rescue(plan.keep_at_least, forget)
    return _result(run, plan, rescued, options)


def _first_pass(
    collection: Collection, plan: PrunePlan, reading: LayerReading, options: PruneOptions
) -> Run:
    """Reads ids, gains and what the policies that look at entries one by one say of them."""
    alone = {
        number: policy
        for number, policy in enumerate(plan.policies)
        if not isinstance(policy, Agreement | NearDuplicates | Coverage)
    }
    ids: list[U64] = [np.empty(0, np.uint64)]
    gains: list[F64] = [np.empty(0)]
    parts: dict[int, list[F64]] = {number: [np.empty(0)] for number in alone}
    done = 0
    for page in pages(collection, options.page_entries, with_keys=False):
        ids.append(page.ids)
        gains.append(scores.gains(page))
        for number, policy in alone.items():
            parts[number].append(policy.scores(page, reading))
        done += len(page)
        options.on_page("read", done)
    return Run(
        collection,
        reading,
        options.page_entries,
        options.on_page,
        Ledger(np.concatenate(ids)),
        np.concatenate(gains),
        {number: np.concatenate(column) for number, column in parts.items()},
    )


def _apply(run: Run, number: int, policy: Policy) -> None:
    """Drops what a policy with a threshold drops."""
    if isinstance(policy, NearDuplicates):
        run.ledger.drop(number, redundant(run, policy), run.gains)
    elif not isinstance(policy, Coverage) and policy.threshold is not None:
        found = _scores_of(run, number, policy)
        run.ledger.drop(number, found < policy.threshold, found)


def _scores_of(run: Run, number: int, policy: RowPolicy | Agreement) -> F64:
    """Scores [n]: those of the first pass, or of a pass of their own."""
    if isinstance(policy, Agreement):
        return agreement_scores(run, policy)
    return run.scores[number]


def _shrink(run: Run, plan: PrunePlan) -> None:
    """Drops the lowest of what is left, down to max_entries."""
    ranking, size = plan.ranking(), plan.max_entries
    kept = run.ledger.kept
    left = int(kept.sum())
    if ranking is None or size is None or left <= size:
        return
    number, policy = ranking
    if isinstance(policy, Coverage):
        going = not_covering(run, policy, size)
    elif not isinstance(policy, NearDuplicates):
        going = scores.lowest(_scores_of(run, number, policy), kept, left - size)
    run.ledger.drop(number, going, np.zeros(len(run.ledger)))


def _forget_of(plan: PrunePlan) -> int:
    """Number of the policy whose drops stand whatever keep_at_least says; -1 for none."""
    numbers = (n for n, policy in enumerate(plan.policies) if isinstance(policy, Forget))
    return next(numbers, -1)


def _require_enough_left(plan: PrunePlan, remembered: F64 | None) -> None:
    """Forgetting is never undone: it is refused when too little would be left."""
    if remembered is None or remembered.all():
        return
    left = int(remembered.sum())
    if left < plan.keep_at_least:
        expected = (
            f"at most {left}: {len(remembered) - left} of {len(remembered)} are to be forgotten"
        )
        raise InvalidField("plan.keep_at_least", plan.keep_at_least, expected)


def _result(run: Run, plan: PrunePlan, rescued: int, options: PruneOptions) -> PruneResult:
    ledger = run.ledger
    dropped = ~ledger.kept
    reasons = {
        reason_of(policy): int(ledger.dropped_by(number).sum())
        for number, policy in enumerate(plan.policies)
    }
    # Before the searches that were cut off are counted: it searches too.
    effect = _effect_on_sample(run, options.effect_queries, options.seed)
    return PruneResult(
        entries=len(ledger),
        ids_to_drop=ledger.ids[dropped],
        reason_bits=ledger.reasons[dropped],
        reasons=reasons,
        kept=int(ledger.kept.sum()),
        rescued=rescued,
        bytes_estimate=_bytes_of(run.collection, int(dropped.sum()), len(ledger)),
        expected_effect=effect,
        incomplete_searches=int(run.cut_off.sum()),
    )


def _effect_on_sample(run: Run, queries: int, seed: int) -> dict[str, float]:
    """Means of expected_effect() over a random sample of the layer's own entries, dropped ones included."""
    mixed = mixed_ids(run.ledger.ids, seed ^ _SAMPLE_SALT)
    chosen = np.sort(np.argsort(mixed, kind="stable")[:queries])
    parts = list(_entries_of(run.collection, run.ledger.ids[chosen].tolist()))
    if not parts:
        return {}
    sample, k = Entries.concat(parts), run.reading.settings.neighbours
    before, _ = run.nearest_elsewhere(sample, k, everyone)
    after, cut_off = run.nearest_elsewhere(sample, k, run.ledger.keeps)
    rows, _ = run.ledger.rows_of(sample.ids)
    run.mark_cut_off(rows[cut_off])
    return scores.expected_effect(sample.values, before, after, run.reading)


def _entries_of(collection: Collection, ids: Sequence[int]) -> Iterator[Entries]:
    """The entries of these ids, one by one and with keys; those that are gone are left out."""
    for number in ids:
        found = collection.scroll(number - 1 if number else None, 1)
        if list(found.ids) == [number]:
            yield found


def _bytes_of(collection: Collection, dropped: int, entries: int) -> int:
    """The dropped entries' share of the disk; where none is known, the bytes of their ids, keys and values in f32."""
    if not dropped:
        return 0
    on_disk = collection.info().disk_bytes
    if on_disk:
        return on_disk * dropped // entries
    one = collection.scroll(None, 1)
    return dropped * (one.ids.nbytes + one.keys.nbytes + one.values.nbytes)

"""The stages of a run over one layer that look at keys or neighbours; each drops entries in the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from router_service.arrays import NO_ID, U64, Bool, Entries, Neighbours
from router_service.backends.base import Collection
from router_service.retention import coverage, disagreement, duplicates, scores
from router_service.retention.effect import expected_effect
from router_service.retention.ledger import Ledger
from router_service.retention.neighbourhood import Search
from router_service.retention.pages import entries_of, joined, kept_pages, key_blocks
from router_service.retention.plan import Agreement, Coverage, NearDuplicates
from router_service.retention.reading import LayerReading
from router_service.retention.tables import F64, Rows, mixed_ids

# Neighbours asked for at first when looking for duplicates: most entries have none.
_FIRST_WIDTH = 8
# Another stream of numbers than Random's: a sample of its victims would be no sample.
_SAMPLE_SALT = 0x5EED0FEFFEC7


@dataclass(slots=True)
class Run:
    """A run over one layer of n entries."""

    collection: Collection
    reading: LayerReading
    page_entries: int
    on_page: Callable[[str, int], None]
    ledger: Ledger
    gains: F64  # [n], in nats
    # Rows whose neighbourhood was too full of dropped entries or of equals to be seen whole.
    cut_off: Bool = field(init=False)  # [n]

    def __post_init__(self) -> None:
        self.cut_off = np.zeros(len(self.ledger), np.bool_)

    @property
    def search(self) -> Search:
        """Searches among the entries that are still in."""
        return self._search(self.ledger.keeps)

    @property
    def search_of_all(self) -> Search:
        """Searches among all entries."""
        return self._search(lambda ids: ids != NO_ID)

    def _search(self, keeps: Callable[[U64], Bool]) -> Search:
        options = self.reading.settings.search
        return Search(self.collection, options, keeps, self.reading.num_experts)

    def kept_pages(self, stage: str) -> Iterator[tuple[Rows, Entries]]:
        """See pages.kept_pages; reports progress."""
        done = 0
        for rows, page in kept_pages(self.collection, self.ledger, self.page_entries):
            yield rows, page
            done += len(rows)
            self.on_page(stage, done)


def agreement_scores(run: Run, policy: Agreement) -> F64:
    """See disagreement.leave_one_out_agreement, for all n entries; inf for those that are out."""
    agreement = np.full(len(run.ledger), np.inf)
    for rows, page in run.kept_pages(policy.name):
        found, cut_off = run.search.nearest_elsewhere(page, policy.neighbours)
        judged = disagreement.leave_one_out_agreement(page.values, found, run.reading, policy)
        agreement[rows] = judged
        run.cut_off[rows[cut_off]] = True
    return agreement


def redundant(run: Run, policy: NearDuplicates) -> Bool:
    """See duplicates.redundant, for all n entries."""
    place = duplicates.places(run.gains)
    links = duplicates.joined(list(_links(run, policy, place)))
    truncated = np.zeros(len(run.ledger), np.bool_)
    truncated[links.truncated] = True
    return duplicates.redundant(links, place, truncated)


def _links(run: Run, policy: NearDuplicates, place: Rows) -> Iterator[duplicates.Links]:
    """Links page by page; each entry sees every neighbour that is near enough, or is marked as truncated."""

    def enough(found: Neighbours, _: Bool) -> Bool:
        return ~duplicates.within(found.distances[:, -1], run.reading, policy)

    for rows, page in run.kept_pages(policy.name):
        for found in run.search.widening(page, _FIRST_WIDTH, enough, other_examples=False):
            slots, mine = found.neighbours, page.values[found.rows]
            near = duplicates.near_pairs(mine, slots.values, slots.distances, run.reading, policy)
            others, _ = run.ledger.rows_of(slots.ids)
            near &= found.counted
            run.cut_off[rows[found.rows[found.cut_off]]] = True
            yield duplicates.links_to_better(rows[found.rows], others, near, place, found.cut_off)


def not_covering(run: Run, policy: Coverage, size: int) -> Bool:
    """Which of the n entries go when `size` are to cover the keys: see coverage.centres_by_block."""
    going = run.ledger.kept
    blocks = key_blocks(run.kept_pages(policy.name), policy.block_entries)
    for centres in coverage.centres_by_block(blocks, size, int(going.sum())):
        going[centres] = False
    return going


def lowest(run: Run, ranked: F64, size: int) -> Bool:
    """Which of the n entries go when the `size` highest scores stay."""
    kept = run.ledger.kept
    return scores.lowest(ranked, kept, int(kept.sum()) - size)


def effect_on_sample(run: Run, queries: int, seed: int) -> dict[str, float]:
    """See effect.expected_effect, on a random sample of the layer's own entries, dropped ones included."""
    mixed = mixed_ids(run.ledger.ids, seed ^ _SAMPLE_SALT)
    chosen = np.sort(np.argsort(mixed, kind="stable")[:queries])
    parts = entries_of(run.collection, run.ledger.ids[chosen].tolist())
    if not parts:
        return {}
    sample, k = joined(parts), run.reading.settings.neighbours
    before, _ = run.search_of_all.nearest_elsewhere(sample, k)
    after, cut_off = run.search.nearest_elsewhere(sample, k)
    rows, _ = run.ledger.rows_of(sample.ids)
    run.cut_off[rows[cut_off]] = True
    return expected_effect(sample.values, before, after, run.reading)

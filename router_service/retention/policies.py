"""The policies that look at keys or neighbours, for all n entries of a run: agreement, near-duplicates, coverage.

T entries of a page, K neighbours, d = hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from router_service.arrays import F32, F64, Bool, Entries, Neighbours, Rows
from router_service.retention.plan import Agreement, Coverage, NearDuplicates
from router_service.retention.run import Run
from router_service.retention.scores import LayerReading, kernel_average

# Links kept per entry, those to the best entries; bounds the RAM by n.
MAX_LINKS = 64
# Neighbours asked for at first when looking for duplicates: most entries have none.
_FIRST_WIDTH = 8
_CENTRES_AT_ONCE = 256


def agreement_scores(run: Run, policy: Agreement) -> F64:
    """Agreement [n] of the entries with the kernel average of their neighbours from other examples.

    inf for those that are out, and for those that are not judged.
    """
    agreement = np.full(len(run.ledger), np.inf)
    for rows, page in run.kept_pages(policy.name):
        found, cut_off = run.nearest_elsewhere(page, policy.neighbours, run.ledger.keeps)
        similarities = run.reading.similarities(found.distances)
        average = kernel_average(run.reading.dense(found.values), similarities)
        nearest = similarities[:, 0]
        judged = (nearest > 0) & (nearest >= policy.min_similarity)
        agreed = run.reading.agreement(run.reading.dense(page.values), average)
        agreement[rows] = np.where(judged, agreed, np.inf)
        run.mark_cut_off(rows[cut_off])
    return agreement


# Entry `worse[e]` is near `better[e]` in key and value, [E] each; and the entries that may have more such links.
Links = tuple[Rows, Rows, Rows]


def redundant(run: Run, policy: NearDuplicates) -> Bool:
    """Which of the n entries go."""
    rank = gain_ranks(run.gains)
    none = np.empty(0, np.intp)
    links = zip((none, none, none), *_links(run, policy, rank), strict=True)
    worse, better, truncated = (np.concatenate(column) for column in links)
    return sent_away((worse, better, truncated), rank)


def gain_ranks(gains: F64) -> Rows:
    """Rank [n] of each entry: from the highest gain down, equals by row."""
    rank = np.empty(len(gains), np.intp)
    rank[np.lexsort((np.arange(len(gains)), -gains))] = np.arange(len(gains))
    return rank


def sent_away(links: Links, rank: Rows) -> Bool:
    """Which of n entries go, by their links and ranks.

    From the best rank on, an entry that is still in sends away all that are linked to it, so nobody goes for the sake
    of a chain. An entry whose links are incomplete goes for any better one that it is linked to: a huge group of
    equals, of which each entry sees only some, shrinks all the same.
    """
    worse, better, incomplete = links
    truncated, gone = np.zeros((2, len(rank)), np.bool_)
    truncated[incomplete] = True
    order = np.lexsort((worse, rank[better]))
    worse, better = worse[order], better[order]
    starts = np.flatnonzero(np.diff(better, prepend=-1))
    for start, stop in zip(starts, np.append(starts, len(better))[1:], strict=True):
        linked = worse[start:stop]
        gone[linked if not gone[better[start]] else linked[truncated[linked]]] = True
    return gone


def _links(run: Run, policy: NearDuplicates, rank: Rows) -> Iterator[Links]:
    """Links page by page; each entry sees every neighbour that is near enough, or is marked as truncated."""

    def enough(found: Neighbours, _: Bool) -> Bool:
        return ~_within(found.distances[:, -1], run.reading, policy)

    for rows, page in run.kept_pages(policy.name):
        for found in run.widening(
            page, _FIRST_WIDTH, enough, run.ledger.keeps, other_examples=False
        ):
            mine, others = page.values[found.rows], found.neighbours
            near = found.counted & _near(mine, others, run.reading, policy)
            other_rows, _ = run.ledger.rows_of(others.ids)
            run.mark_cut_off(rows[found.rows[found.cut_off]])
            yield links_to_better(rows[found.rows], other_rows, near, rank, found.cut_off)


def _near(
    values: F32, neighbours: Neighbours, reading: LayerReading, policy: NearDuplicates
) -> Bool:
    """Which neighbours [T, K] of entries with these value rows say nearly the same at nearly the same place."""
    mine, others = reading.dense(values)[:, None, :], reading.dense(neighbours.values)
    same = reading.agreement(mine, others) >= policy.agreement
    return same & _within(neighbours.distances, reading, policy)


def _within(distances: F32, reading: LayerReading, policy: NearDuplicates) -> Bool:
    """Whether distances [...] are near enough; that of an empty slot never is."""
    return np.isfinite(distances) & (reading.similarities(distances) >= policy.similarity)


def links_to_better(
    rows: Rows, neighbour_rows: Rows, near: Bool, rank: Rows, cut_off: Bool
) -> Links:
    """Links of entries `rows` [T] to those of their neighbours [T, K] that are `near` and have a better rank.

    cut_off [T]: entries that may have more such neighbours than K. An entry among its own neighbours is no link.
    """
    better = near & (rank[neighbour_rows] < rank[rows][:, None])
    order = np.argsort(np.where(better, rank[neighbour_rows], len(rank)), axis=1, kind="stable")
    first = order[:, :MAX_LINKS]
    entry, slot = np.nonzero(np.take_along_axis(better, first, axis=1))
    truncated = rows[cut_off | (better.sum(axis=1) > MAX_LINKS)]
    return rows[entry], neighbour_rows[entry, first[entry, slot]], truncated


def not_covering(run: Run, policy: Coverage, size: int) -> Bool:
    """Which of the n entries go when `size` are to cover the keys."""
    going = run.ledger.kept
    blocks = _key_blocks(run.kept_pages(policy.name), policy.block_entries)
    for centres in centres_by_block(blocks, size, int(going.sum())):
        going[centres] = False
    return going


def _key_blocks(
    parts: Iterator[tuple[Rows, Entries]], block_entries: int
) -> Iterator[tuple[Rows, F32]]:
    """Rows and keys in blocks of exactly `block_entries` (the last one less), however the pages fell."""
    rows: list[Rows] = []
    keys: list[F32] = []
    for page_rows, page in parts:
        rows.append(page_rows)
        keys.append(page.keys)
        while sum(map(len, rows)) >= block_entries:
            joined_rows, joined_keys = np.concatenate(rows), np.concatenate(keys)
            yield joined_rows[:block_entries], joined_keys[:block_entries]
            rows, keys = [joined_rows[block_entries:]], [joined_keys[block_entries:]]
    if sum(map(len, rows)):
        yield np.concatenate(rows), np.concatenate(keys)


def centres_by_block(blocks: Iterable[tuple[Rows, F32]], size: int, total: int) -> Iterator[Rows]:
    """Rows of the centres of each block of (rows [b], keys [b, d]); `size` of `total` rows over all blocks.

    A block gets its share by its number of rows, and covers what the centres of the blocks before it left uncovered: of
    those centres as many are remembered as a block has rows, and half of them forgotten when there are more.
    """
    start, earlier = 0, None
    for rows, keys in blocks:
        stop = min(start + len(rows), total)
        chosen = farthest_first(keys, block_share(size, total, start, stop), earlier)
        yield rows[chosen]
        start = stop
        earlier = keys[chosen] if earlier is None else np.concatenate([earlier, keys[chosen]])
        while len(earlier) > len(keys):
            earlier = earlier[::2]


def farthest_first(keys: F32, size: int, earlier: F32 | None = None) -> Rows:
    """Rows of `size` centres of keys [n, d], in the order in which they were chosen (Gonzalez 1985).

    Each is the key farthest from the centres before it, among them `earlier` ones [m, d]; without any, the first is the
    key nearest the mean. Of equals the lowest row. Without `earlier` the covering radius is at most twice the best one.
    """
    if not len(keys) or size <= 0:
        return np.empty(0, np.intp)
    mean = keys.mean(axis=0, dtype=np.float64)
    wide, norms = _around(keys, mean)
    if earlier is not None and len(earlier):
        distances = _nearest_distances(wide, norms, _around(earlier, mean)[0])
        centres = [int(np.argmax(distances))]
    else:
        distances, centres = np.full(len(keys), np.inf), [int(np.argmin(norms))]
    while True:
        np.minimum(distances, _squared_distances(wide, norms, wide[centres[-1]]), out=distances)
        distances[centres[-1]] = -1.0
        if len(centres) >= min(size, len(keys)):
            return np.array(centres, np.intp)
        centres.append(int(np.argmax(distances)))


def block_share(size: int, total: int, start: int, stop: int) -> int:
    """How many of the `size` that stay are among entries [start, stop) of `total`; the blocks have `size` together."""
    return size * stop // total - size * start // total


def _around(keys: F32, mean: F64) -> tuple[F64, F64]:
    """Keys less their mean, and their squared lengths: of short vectors the expanded distance cancels less."""
    wide = keys.astype(np.float64) - mean
    return wide, np.einsum("nd,nd->n", wide, wide)


def _nearest_distances(wide: F64, norms: F64, centres: F64) -> F64:
    """Squared distances [n] to the nearest centre; inf without centres."""
    nearest = np.full(len(wide), np.inf)
    for start in range(0, len(centres), _CENTRES_AT_ONCE):
        some = centres[start : start + _CENTRES_AT_ONCE]
        reach = np.einsum("md,md->m", some, some) - 2.0 * (wide @ some.T)
        np.minimum(nearest, norms + reach.min(axis=1), out=nearest)
    return np.maximum(nearest, 0.0)


def _squared_distances(wide: F64, norms: F64, centre: F64) -> F64:
    expanded = norms - 2.0 * (wide @ centre) + centre @ centre
    return np.maximum(expanded, 0.0)

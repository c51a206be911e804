"""Nearest neighbours among the entries that are still in: the collection cannot leave the others out, so ask for more.

A search is repeated with twice, four times, ... as many neighbours for the queries that need it, up to MAX_WIDTH.
T queries, w = neighbours asked for, W = width of a value row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from router_service.arrays import F32, F64, NO_ID, U64, Bool, Entries, ExampleRef, Neighbours, Rows
from router_service.backends.base import Collection, SearchOptions
from router_service.memories.settings import Kind
from router_service.retention.plan import Agreement, NearDuplicates
from router_service.retention.scores import LayerReading, kernel_average

MAX_WIDTH = 4096
# Numbers in the neighbours' dense values of one search: 16 MiB in f64.
_MAX_NUMBERS = 1 << 21
_MAX_QUERIES = 256

# Whether each query [T] has seen enough, from what was found and which slots [T, w] count.
Enough = Callable[[Neighbours, Bool], Bool]


@dataclass(frozen=True, slots=True)
class Found:
    """What was found for some of the queries."""

    rows: Rows  # [t] of the queries
    neighbours: Neighbours  # [t, w]
    counted: Bool  # [t, w]: still in
    cut_off: Bool  # [t]: there may be more, beyond MAX_WIDTH


@dataclass(frozen=True, slots=True)
class Search:
    """How to search a collection for neighbours that count."""

    collection: Collection
    options: SearchOptions
    keeps: Callable[[U64], Bool]
    num_experts: int

    def widening(
        self, queries: Entries, first_width: int, enough: Enough, *, other_examples: bool
    ) -> Iterator[Found]:
        """Every query once, as soon as it has seen enough, every entry, or MAX_WIDTH of them.

        other_examples: leaves out entries of the query's own example, and with them the query itself.
        """
        waiting: Rows = np.arange(len(queries))
        width = min(first_width, MAX_WIDTH)
        while len(waiting):
            again: list[Rows] = []
            for rows in np.array_split(waiting, self._parts(queries, len(waiting), width)):
                found = self._once(queries, rows, width, other_examples)
                exhausted = found.neighbours.ids[:, -1] == NO_ID
                satisfied = exhausted | enough(found.neighbours, found.counted)
                done = satisfied | (width >= MAX_WIDTH)
                again.append(rows[~done])
                if done.any():
                    yield _part(found, np.flatnonzero(done), ~satisfied[done])
            waiting, width = np.concatenate(again), min(2 * width, MAX_WIDTH)

    def nearest_elsewhere(self, queries: Entries, k: int) -> tuple[Neighbours, Bool]:
        """The k nearest from other examples that count [T, k], and which queries [T] were cut off."""
        result = Neighbours.empty(len(queries), k, queries.values.shape[1])
        cut_off = np.zeros(len(queries), np.bool_)

        def enough(_: Neighbours, counted: Bool) -> Bool:
            return counted.sum(axis=1) >= k

        for found in self.widening(queries, k, enough, other_examples=True):
            _fill(result, found, k)
            cut_off[found.rows] = found.cut_off
        return result, cut_off

    def _parts(self, queries: Entries, waiting: int, width: int) -> int:
        """Into how many searches to split, so that neither value rows nor dense values fill the RAM."""
        numbers = width * max(queries.values.shape[1], self.num_experts)
        at_once = min(max(1, _MAX_NUMBERS // numbers), _MAX_QUERIES)
        return -(-waiting // at_once)

    def _once(self, queries: Entries, rows: Rows, width: int, other_examples: bool) -> Found:
        origins = [queries.provenance[row] for row in rows]
        exclude: Sequence[ExampleRef] = [ExampleRef(o.source, o.example) for o in origins]
        found = self.collection.search(
            queries.keys[rows], width, self.options, exclude if other_examples else ()
        )
        return Found(rows, found, self.keeps(found.ids), np.zeros(len(rows), np.bool_))


def _part(found: Found, rows: Rows, cut_off: Bool) -> Found:
    all_slots = found.neighbours
    some = Neighbours(all_slots.ids[rows], all_slots.distances[rows], all_slots.values[rows])
    return Found(found.rows[rows], some, found.counted[rows], cut_off)


def _fill(result: Neighbours, found: Found, k: int) -> None:
    """Writes the first k slots that count into the queries' rows of `result`; the others stay empty."""
    order = np.argsort(~found.counted, axis=1, kind="stable")[:, :k]
    counted = np.take_along_axis(found.counted, order, axis=1)
    query, slot = np.nonzero(counted)
    source = order[query, slot]
    target = found.rows[query]
    result.ids[target, slot] = found.neighbours.ids[query, source]
    result.distances[target, slot] = found.neighbours.distances[query, source]
    result.values[target, slot] = found.neighbours.values[query, source]


_CENTRES_AT_ONCE = 256


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


def covering_radius(keys: F32, centres: Rows) -> float:
    """The largest distance of a key [n, d] to its nearest centre; inf without centres, 0 without keys."""
    if not len(keys):
        return 0.0
    wide, norms = _around(keys, keys.mean(axis=0, dtype=np.float64))
    return float(np.sqrt(_nearest_distances(wide, norms, wide[centres]).max()))


def block_share(size: int, total: int, start: int, stop: int) -> int:
    """How many of `size` places entries [start, stop) of `total` get; blocks end to end get `size` together."""
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


def leave_one_out_agreement(
    values: F32, neighbours: Neighbours, reading: LayerReading, policy: Agreement
) -> F64:
    """Agreement [T] of value rows [T, W] with the kernel average of their neighbours [T, K]; inf: not judged."""
    similarities = reading.similarities(neighbours.distances)
    average = kernel_average(reading.dense(neighbours.values), similarities)
    agreement = reading.agreement(reading.dense(values), average)
    nearest = similarities[:, 0]
    judged = (nearest > 0) & (nearest >= policy.min_similarity)
    return np.where(judged, agreement, np.inf)


# Links kept per entry, those to the best entries; bounds the RAM by n.
MAX_LINKS = 64


@dataclass(frozen=True, slots=True)
class Links:
    """Entry `worse[e]` is near `better[e]` in key and value; rows of the ledger."""

    worse: Rows  # [E]
    better: Rows  # [E]
    truncated: Rows  # rows of entries that may have more links than are named


def joined(parts: Sequence[Links]) -> Links:
    """Links of parts, end to end."""

    def column(name: str) -> Rows:
        return np.concatenate([np.empty(0, np.intp), *(getattr(part, name) for part in parts)])

    return Links(column("worse"), column("better"), column("truncated"))


def places(gains: F64) -> Rows:
    """Place [n] of each entry: from the highest gain down, equals by row."""
    place = np.empty(len(gains), np.intp)
    place[np.lexsort((np.arange(len(gains)), -gains))] = np.arange(len(gains))
    return place


def near_pairs(
    values: F32, neighbours: F32, distances: F32, reading: LayerReading, policy: NearDuplicates
) -> Bool:
    """Which neighbours [T, K] say nearly the same at nearly the same place.

    values: value rows [T, W] of the entries; neighbours: those of their neighbours [T, K, W], at `distances` [T, K].
    """
    near = within(distances, reading, policy)
    same = reading.agreement(reading.dense(values)[:, None, :], reading.dense(neighbours))
    return near & (same >= policy.agreement)


def within(distances: F32, reading: LayerReading, policy: NearDuplicates) -> Bool:
    """Whether distances [...] are near enough; that of an empty slot never is."""
    return np.isfinite(distances) & (reading.similarities(distances) >= policy.similarity)


def links_to_better(
    rows: Rows, neighbour_rows: Rows, near: Bool, place: Rows, cut_off: Bool
) -> Links:
    """Links of entries `rows` [T] to those of their neighbours [T, K] that are `near` and have a better place.

    cut_off [T]: entries that may have more such neighbours than K. An entry among its own neighbours is no link.
    """
    better = near & (place[neighbour_rows] < place[rows][:, None])
    order = np.argsort(np.where(better, place[neighbour_rows], len(place)), axis=1, kind="stable")
    first = order[:, :MAX_LINKS]
    entry, slot = np.nonzero(np.take_along_axis(better, first, axis=1))
    truncated = rows[cut_off | (better.sum(axis=1) > MAX_LINKS)]
    return Links(rows[entry], neighbour_rows[entry, first[entry, slot]], truncated)


def redundant(links: Links, place: Rows, truncated: Bool) -> Bool:
    """Which of n entries go.

    From the best place on, an entry that is still in sends away all that are linked to it, so nobody goes for the sake
    of a chain. An entry whose links are incomplete (`truncated` [n]) goes for any better one that it is linked to: a
    huge group of equals, of which each entry sees only some, shrinks all the same.
    """
    order = np.lexsort((links.worse, place[links.better]))
    worse, better = links.worse[order], links.better[order]
    starts = np.flatnonzero(np.diff(better, prepend=-1))
    gone = np.zeros(len(place), np.bool_)
    for start, stop in zip(starts, np.append(starts, len(better))[1:], strict=True):
        linked = worse[start:stop]
        gone[linked if not gone[better[start]] else linked[truncated[linked]]] = True
    return gone


def expected_effect(
    values: F32, before: Neighbours, after: Neighbours, reading: LayerReading
) -> dict[str, float]:
    """Means over T leave-one-example-out queries: entries with value rows [T, W] and their neighbours [T, K].

    lambda_*; abstained_*: the share with lambda 0; agreement_*: of the contribution with the entry's own value, 0 where
    nothing is retrieved; contribution_before and contribution_change: sizes, the Euclidean norm in logits for deltas,
    L1 of the weights for assignments.
    """
    if not len(values):
        return {}
    own = reading.dense(values)
    lambdas, contributions = zip(*(_read(part, reading) for part in (before, after)), strict=True)
    effect = {"queries": float(len(values))}
    for name, weights, added in zip(("before", "after"), lambdas, contributions, strict=True):
        effect[f"lambda_{name}"] = float(weights.mean())
        effect[f"abstained_{name}"] = float((weights == 0).mean())
        effect[f"agreement_{name}"] = float(reading.agreement(own, added).mean())
    effect["lambda_change"] = effect["lambda_after"] - effect["lambda_before"]
    effect["contribution_before"] = _mean_size(contributions[0], reading)
    effect["contribution_change"] = _mean_size(contributions[1] - contributions[0], reading)
    return effect


def _read(neighbours: Neighbours, reading: LayerReading) -> tuple[F64, F64]:
    """Lambdas [T] and contributions [T, N]."""
    similarities = reading.similarities(neighbours.distances)
    lambdas = reading.lambdas(similarities).astype(np.float64)
    return lambdas, reading.contribution(reading.dense(neighbours.values), similarities)


def _mean_size(rows: F64, reading: LayerReading) -> float:
    order = 1 if reading.settings.kind is Kind.ASSIGNMENT else 2
    return float(np.linalg.norm(rows, ord=order, axis=1).mean())

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_service.arrays import Entries, Provenance
from router_service.retention.plan import Coverage, Random
from router_service.retention.policies import block_share, centres_by_block, farthest_first
from tests.unit.router_service.retention.pruning_memories import pruned, random_entries


def clustered(n: int, *, seed: int = 0) -> Entries:
    """Half of the entries in one dense cluster, half spread over twenty others."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(21, 8)) * 6
    cluster = np.where(random.random(n) < 0.5, 0, random.integers(1, 21, n))
    keys = centres[cluster] + random.normal(size=(n, 8)) * 0.5
    values = random.normal(size=(n, 4)).astype(np.float32)
    provenance = [Provenance("s", str(row)) for row in range(n)]
    return Entries(np.arange(n, dtype=np.uint64), keys.astype(np.float32), values, provenance)


def covering_radius(keys: np.ndarray, centres: np.ndarray) -> float:
    """The largest distance of a key [n, d] to its nearest centre; inf without centres, 0 without keys."""
    wide = keys.astype(np.float64)
    squared = [((wide - centre) ** 2).sum(axis=1) for centre in wide[centres]]
    nearest = np.min([np.full(len(wide), np.inf), *squared], axis=0)
    return float(np.sqrt(nearest.max(initial=0)))


def kept_radius(entries: Entries, ids_to_drop: np.ndarray) -> float:
    return covering_radius(entries.keys, np.flatnonzero(~np.isin(entries.ids, ids_to_drop)))


@given(st.integers(0, 30), st.integers(0, 32), st.integers(0, 1000))
def test_each_centre_is_the_farthest_from_those_before(n: int, size: int, seed: int) -> None:
    keys = np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32) + 100
    wide = keys.astype(np.float64)
    centres = farthest_first(keys, size)
    assert len(set(centres.tolist())) == len(centres) == min(n, size)
    if not len(centres):
        return
    squared = ((wide[:, None] - wide[None]) ** 2).sum(axis=-1)
    from_mean = ((wide - wide.mean(axis=0)) ** 2).sum(axis=1)
    assert from_mean[centres[0]] == pytest.approx(from_mean.min())
    for number in range(1, len(centres)):
        nearest = squared[:, centres[:number]].min(axis=1)
        assert nearest[centres[number]] == pytest.approx(nearest.max())
    radius = np.sqrt(squared[:, centres].min(axis=1).max())
    assert covering_radius(keys, centres) == pytest.approx(radius, abs=1e-6)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 9), st.integers(0, 1000))
def test_earlier_centres_count_as_centres(n: int, size: int, m: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    keys = random.normal(size=(n, 3)).astype(np.float32)
    earlier = random.normal(size=(m, 3)).astype(np.float32)
    centres = farthest_first(keys, size, earlier)
    assert len(set(centres.tolist())) == min(n, size)
    for number, centre in enumerate(centres):
        known = np.concatenate([earlier, keys[centres[:number]]]).astype(np.float64)
        nearest = ((keys[:, None] - known[None]) ** 2).sum(axis=-1).min(axis=1)
        assert nearest[centre] == pytest.approx(nearest.max(), abs=1e-9)


def test_equal_keys_are_chosen_by_row() -> None:
    assert farthest_first(np.ones((5, 2), np.float32), 3).tolist() == [0, 1, 2]


def test_a_radius_without_centres_or_keys() -> None:
    keys = np.ones((2, 2), np.float32)
    assert covering_radius(keys, np.empty(0, np.intp)) == np.inf
    assert covering_radius(keys[:0], np.empty(0, np.intp)) == 0


@given(st.integers(1, 50), st.integers(1, 60), st.integers(1, 20))
def test_block_shares_add_up(total: int, size: int, block: int) -> None:
    size = min(size, total)
    shares = [
        block_share(size, total, start, min(start + block, total))
        for start in range(0, total, block)
    ]
    assert sum(shares) == size
    assert all(0 <= share <= block for share in shares)


@pytest.mark.parametrize("block_entries", [50, 400])
@pytest.mark.parametrize("size", [40, 120])
def test_coverage_beats_random(size: int, block_entries: int) -> None:
    entries = clustered(400)
    covering = pruned(entries, Coverage(block_entries), max_entries=size)
    radius = kept_radius(entries, covering.ids_to_drop)
    at_random = [
        kept_radius(entries, pruned(entries, Random(seed), max_entries=size).ids_to_drop)
        for seed in range(5)
    ]
    assert radius < min(at_random)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50), st.integers(1, 50))
def test_streamed_blocks_equal_blocks_in_ram(n: int, size: int, block: int, page: int) -> None:
    entries = random_entries(n)
    result = pruned(entries, Coverage(block), max_entries=size, page_entries=page)
    if n <= size:
        assert result.kept == n
        return
    blocks = [
        (np.arange(start, min(start + block, n)), entries.keys[start : start + block])
        for start in range(0, n, block)
    ]
    staying = np.concatenate(list(centres_by_block(blocks, size, n)))
    assert len(staying) == size
    gone = np.delete(entries.ids, staying)
    np.testing.assert_array_equal(result.ids_to_drop, gone)


def test_choosing_leaves_the_keys_alone() -> None:
    keys = random_entries(10).keys
    copy = keys.copy()
    farthest_first(keys, 5)
    np.testing.assert_array_equal(keys, copy)

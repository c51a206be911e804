"""Search keys: reduced dimensions, f16, and files of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from router_service.arrays import F32
from router_service.backends.base import Compression
from router_service.backends.edge.search_keys import FILE, SearchKeys, fitted
from router_service.errors import CorruptMemory

RNG = np.random.default_rng(0)


def low_rank(rows: int = 400, dimension: int = 32, rank: int = 4) -> F32:
    """Keys in a subspace of few dimensions, far from the origin."""
    basis = RNG.standard_normal((rank, dimension))
    return (RNG.standard_normal((rows, rank)) @ basis + 7).astype(np.float32)


def made(keys: F32, label: str) -> SearchKeys:
    return fitted(keys, Compression.parse(label), len(keys))


def squared_distances(rows: F32) -> F32:
    return ((rows[:40, None] - rows[None, :40]) ** 2).sum(axis=2)


@pytest.mark.parametrize("label", ["pca4", "pca8", "float16"])
def test_distances_are_kept_up_to_a_factor_where_nothing_is_lost(label: str) -> None:
    keys = low_rank()
    search_keys = made(keys, label)
    found = squared_distances(search_keys.of(keys)) / search_keys.scale**2
    np.testing.assert_allclose(found, squared_distances(keys), rtol=1e-3, atol=1e-2)


def test_random_directions_are_orthonormal_and_always_the_same() -> None:
    keys = low_rank()
    matrix, again = made(keys, "random8").matrix, made(keys[:50], "random8").matrix
    assert matrix is not None
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(8), atol=1e-6)
    np.testing.assert_array_equal(matrix, again)


@pytest.mark.parametrize("label", ["float16", "pca4", "random4+float16"])
@pytest.mark.parametrize("factor", [1e-38, 1e-20, 1e18, 3e38])
def test_search_keys_are_always_finite(label: str, factor: float) -> None:
    keys = low_rank()
    search_keys = made(keys, label)
    with np.errstate(over="ignore"):
        rows = search_keys.of(np.clip(keys * factor, -3e38, 3e38).astype(np.float32))
    assert np.isfinite(rows).all()
    assert not search_keys.half or np.isfinite(rows.astype(np.float16)).all()


@pytest.mark.parametrize("keys", [np.empty((0, 8), np.float32), np.ones((5, 8), np.float32)])
def test_too_little_to_fit_is_enough(keys: F32) -> None:
    rows = made(keys, "pca3+float16").of(np.ones((2, 8), np.float32))
    assert rows.shape == (2, 3)
    assert np.isfinite(rows).all()


@pytest.mark.parametrize("label", ["float16", "pca4"])
def test_saving_and_loading(tmp_path: Path, label: str) -> None:
    keys = low_rank()
    search_keys = made(keys, label)
    search_keys.save(tmp_path)
    np.testing.assert_array_equal(SearchKeys.load(tmp_path).of(keys), search_keys.of(keys))


def test_damage_and_loss_are_corruption(tmp_path: Path) -> None:
    with pytest.raises(CorruptMemory, match=FILE):
        SearchKeys.load(tmp_path)
    (tmp_path / FILE).write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(CorruptMemory, match=FILE):
        SearchKeys.load(tmp_path)


@pytest.mark.parametrize(
    ("label", "entries", "stays"),
    [
        ("pca4+int8", 400, True),
        ("pca4", 800, True),
        ("pca4", 801, False),
        ("pca5", 400, False),
        ("random4", 400, False),
        ("pca4+float16", 400, False),
    ],
)
def test_when_they_can_stay(label: str, entries: int, stays: bool) -> None:
    assert made(low_rank(), "pca4").serves(Compression.parse(label), entries) is stays

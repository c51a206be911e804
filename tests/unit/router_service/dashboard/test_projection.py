import numpy as np
import pytest

from router_service.dashboard.projection import principal_plane


@pytest.mark.parametrize("shape", [(400, 64), (50, 300), (3, 5), (2, 1), (1, 4)])
def test_the_plane_is_that_of_an_exact_decomposition(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    scales = 1 / np.arange(1, shape[1] + 1)
    keys = (5 + rng.standard_normal(shape) * scales).astype(np.float32)
    plane, share = principal_plane(keys)
    centred = keys.astype(np.float64) - keys.mean(axis=0, dtype=np.float64)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    exact = (left * singular)[:, :2]
    assert plane.shape == (shape[0], 2)
    for axis in range(exact.shape[1]):  # either way round
        found = plane[:, axis] * np.sign(plane[:, axis] @ exact[:, axis] or 1)
        np.testing.assert_allclose(found, exact[:, axis], atol=2e-3 * max(singular[0], 1e-3))
    total = np.square(singular).sum()
    assert share == pytest.approx(np.square(singular[:2]).sum() / total if total else 0, abs=1e-4)


def test_keys_that_are_all_the_same_are_one_point() -> None:
    plane, share = principal_plane(np.full((10, 4), 3.0, np.float32))
    assert not plane.any()
    assert share == 0

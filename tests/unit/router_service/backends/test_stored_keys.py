"""Keys as they are stored: a stored key that is written again stays as it is, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from router_service.backends.base import Metric, as_stored


@pytest.mark.parametrize("dimension", [1, 2, 3, 16, 256])
def test_a_stored_key_is_stored_again_as_it_is(dimension: int) -> None:
    rng = np.random.default_rng(dimension)
    lengths = rng.choice([1e-6, 1.0, 1e6], (20_000, 1))
    keys = (rng.normal(size=(20_000, dimension)) * lengths).astype(np.float32)
    stored = as_stored(keys, Metric.COSINE, "keys")
    assert as_stored(stored, Metric.COSINE, "keys").tobytes() == stored.tobytes()


def test_what_f32_can_tell_from_a_unit_vector_is_made_one() -> None:
    keys = np.array([[1.0 + 2e-7, 0.0], [0.0, 1.0 - 2e-7]], np.float32)
    np.testing.assert_array_equal(as_stored(keys, Metric.COSINE, "keys"), np.eye(2))


def test_other_metrics_leave_keys_alone() -> None:
    keys = np.array([[3.0, 4.0]], np.float32)
    assert as_stored(keys, Metric.EUCLID, "keys") is keys

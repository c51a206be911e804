"""Bandwidths from exact distances: what counts as a copy, what is refused, and what gamma is at most."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_service.arrays import F32, Entries, ExampleRef, Provenance
from router_service.backends.base import CollectionSpec, Metric
from router_service.backends.exact import ExactBackend, ExactCollection
from router_service.errors import Cancelled, InvalidField
from router_service.memories.calibration import (
    COPY_SHARE,
    MOST_NUMBERS,
    LayerCalibration,
    Queries,
    calibrated,
)
from router_service.memories.layer import LayerMemory
from router_service.memories.memory import sample_entries

D = 8


def layer_of(keys: F32, examples: list[str]) -> ExactCollection:
    collection = ExactBackend().create("layer", CollectionSpec(D, Metric.EUCLID, 1))
    origins = [Provenance("s", example, row) for row, example in enumerate(examples)]
    ids = np.arange(len(keys), dtype=np.uint64)
    collection.upsert(Entries(ids, keys, np.zeros((len(keys), 1), np.float32), origins))
    return collection


def calibration(
    collection: ExactCollection, queries: Queries, lambda0: float = 0.5, quantile: float = 0.5
) -> LayerCalibration:
    return calibrated(3, collection, queries, lambda0, quantile, lambda _: None)


def random_keys(rows: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).normal(size=(rows, D)).astype(np.float32)


def leave_one_out(keys: F32, examples: list[str]) -> Queries:
    return Queries(keys, [ExampleRef("s", example) for example in examples])


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(2, 60),
    offset=st.sampled_from([0.0, 1e3]),
    quantile=st.sampled_from([0.25, 0.5, 0.9]),
)
def test_it_is_the_quantile_of_distances_to_other_examples(
    seed: int, rows: int, offset: float, quantile: float
) -> None:
    rng = np.random.default_rng(seed)
    keys = (rng.normal(size=(rows, D)) + offset).astype(np.float32)
    examples = [str(rng.integers(2)) for _ in range(rows - 2)] + ["0", "1"]
    wide = keys.astype(np.float64)
    distances = ((wide[:, None] - wide) ** 2).sum(axis=2)
    distances[np.equal.outer(np.array(examples), np.array(examples))] = np.inf
    true = float(np.quantile(distances.min(axis=1), quantile))
    found = calibration(layer_of(keys, examples), leave_one_out(keys, examples), 0.3, quantile)
    assert found.squared_distance == pytest.approx(true, rel=1e-5)
    assert found.gamma == pytest.approx(-np.log(0.3) / true, rel=1e-5)
    assert (found.layer, found.queries, found.copies) == (3, rows, 0)


def test_copies_count_as_the_own_example() -> None:
    """Twenty examples of one sentence: the distance is that between tokens that differ."""
    sentence = random_keys(12)
    keys = np.concatenate([sentence + 1e-4 * random_keys(12, seed) for seed in range(20)])
    examples = [str(row // 12) for row in range(len(keys))]
    found = calibration(layer_of(keys, examples), leave_one_out(keys, examples))
    once = calibration(layer_of(sentence, list(map(str, range(12)))), Queries(sentence))
    assert found.copies == found.queries == len(keys)
    assert found.gamma == pytest.approx(once.gamma, rel=0.01)


def test_gamma_has_a_bound() -> None:
    """The nearest that counts is at least a thousandth of the typical distance away."""
    keys = random_keys(40)
    near = keys.copy()
    near[:, 0] += 1.01 * np.sqrt(COPY_SHARE * 2 * D)
    both = np.concatenate([keys, near])
    examples = ["a"] * 40 + ["b"] * 40
    found = calibration(layer_of(both, examples), leave_one_out(both, examples))
    bound = np.log(2) / (COPY_SHARE * found.typical_squared_distance)
    assert bound / 3 < found.gamma <= bound


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_nothing_but_copies_is_refused(offset: float) -> None:
    keys = np.full((10, D), offset, np.float32)
    examples = [str(row) for row in range(10)]
    with pytest.raises(InvalidField, match=r"nothing but copies in layer 3.*held-out text"):
        calibration(layer_of(keys, examples), leave_one_out(keys, examples))


def test_one_example_has_no_neighbours() -> None:
    keys = random_keys(10)
    with pytest.raises(InvalidField, match="at least two examples"):
        calibration(layer_of(keys, ["x"] * 10), leave_one_out(keys, ["x"] * 10))


def test_whoever_asks_can_end_it() -> None:
    def gone(done: int) -> None:
        raise Cancelled("gone")

    keys = random_keys(10)
    with pytest.raises(Cancelled):
        calibrated(0, layer_of(keys, ["x"] * 10), Queries(keys), 0.5, 0.5, gone)


@pytest.mark.parametrize("first", [0, 1, 2**62])
def test_a_sample_is_not_the_beginning_of_a_layer(first: int) -> None:
    """Ids need not be hashes: where they count from 0, entries from all over the layer are asked about."""
    keys = random_keys(600)
    collection = ExactBackend().create("layer", CollectionSpec(D, Metric.EUCLID, 1))
    ids = np.arange(first, first + 600, dtype=np.uint64)
    values = np.zeros((600, 1), np.float32)
    collection.upsert(Entries(ids, keys, values, [Provenance()] * 600))
    sample = sample_entries(LayerMemory(0, collection, 1, 1), 100)
    assert len(sample) == len(set(sample.ids.tolist())) == 100
    assert sample.ids.max() - sample.ids.min() > 400
    everything = sample_entries(LayerMemory(0, collection, 1, 1), 1000)
    assert everything.ids.tolist() == ids.tolist()


def test_entries_that_change_nothing_are_not_asked_about() -> None:
    keys, values = random_keys(500), np.zeros((500, 1), np.float32)
    values[::5] = 1
    sample = Entries(np.arange(500, dtype=np.uint64), keys, values, [Provenance()] * 500)
    assert np.array_equal(Queries.of_own(sample, 500).inputs, keys[::5])


def test_few_are_asked_about_in_a_large_layer() -> None:
    keys = random_keys(500)
    sample = Entries(
        np.arange(500, dtype=np.uint64), keys, np.zeros((500, 1), np.float32), [Provenance()] * 500
    )
    assert len(Queries.of_own(sample, MOST_NUMBERS // D // 100).inputs) == 100
    assert len(Queries.of_own(sample, MOST_NUMBERS).inputs) == 64
    assert len(Queries.of_own(sample, 500).own) == 500

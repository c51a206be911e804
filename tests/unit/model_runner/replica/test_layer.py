"""A layer of a replica against a dictionary: what is staged is not found, what is committed is, at once."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from model_runner.errors import BadInput
from model_runner.lookup_lock import LookupLock
from model_runner.replica.layer import INFINITY, KEY_DTYPES, LayerReplica
from model_runner.replica.search import nearest

D, W = 16, 4


def u64(*ids: int) -> np.ndarray:
    return np.array(ids, np.uint64)


def stage(
    layer: LayerReplica, ids: np.ndarray, value: float = 1.0, key: Tensor | None = None
) -> None:
    """Entries with the key (id + value) * ones unless given."""
    n = len(ids)
    numbers = torch.from_numpy(ids.astype(np.float32)) + value
    keys = numbers.unsqueeze(1).expand(n, D) if key is None else key
    values = torch.full((n, W), value)
    layer.stage(
        ids, keys.to(layer.dtype), None, values, ids.astype(np.int64) % 3, ids + np.uint64(7)
    )


def found(layer: LayerReplica, number: float, k: int = 1) -> list[int]:
    """Ids of the nearest entries to number * ones."""
    with layer.lock:
        rows, distances = nearest(layer, torch.full((1, D), float(number)), k)
    return layer.ids_of(rows[distances < INFINITY].numpy()).tolist()


def test_staged_entries_are_found_from_the_commit_on() -> None:
    layer = LayerReplica(D, W)
    stage(layer, u64(1, 5, 9))
    assert (found(layer, 5), len(layer), layer.version) == ([], 0, 0)
    layer.commit()
    assert (found(layer, 6), len(layer), layer.version) == ([5], 3, 1)
    stage(layer, u64(5, 100), value=50.0)
    layer.stage_deletion(u64(1, 77))
    assert sorted(found(layer, 6, 9)) == [1, 5, 9]
    layer.commit()
    assert found(layer, 6, 9) == [9, 5, 100]
    with layer.lock:
        rows, _ = nearest(layer, torch.full((1, D), 55.0), 1)
    assert layer.values[rows[0, 0]].tolist() == [50.0] * W
    assert layer.version == 2
    layer.commit()
    assert layer.version == 2


def test_the_last_word_before_a_commit_counts() -> None:
    layer = LayerReplica(D, W)
    stage(layer, u64(1))
    stage(layer, u64(1), value=2.0)
    layer.stage_deletion(u64(2))
    stage(layer, u64(2))
    stage(layer, u64(3))
    layer.stage_deletion(u64(3))
    layer.commit()
    ids, digests = layer.held()
    assert (ids.tolist(), digests.tolist()) == ([1, 2], [8, 9])
    stage(layer, u64(4))
    layer.discard()
    layer.commit()
    assert (len(layer), sorted(found(layer, 3, 9))) == (2, [1, 2])


def test_free_rows_are_used_again() -> None:
    layer = LayerReplica(D, W)
    layer.reserve(6)
    tensors = [t.data_ptr() for t in (layer.keys, layer.squared_norms, layer.values, layer.hits)]
    for start in range(0, 300, 3):
        stage(layer, u64(start, start + 1, start + 2))
        layer.stage_deletion(u64(*range(start)))
        layer.commit()
    assert layer.held()[0].tolist() == [297, 298, 299]
    assert (layer.capacity, layer.growths) == (6, 1)
    same = [t.data_ptr() for t in (layer.keys, layer.squared_norms, layer.values, layer.hits)]
    assert same == tensors


def test_capacity_doubles_and_keeps_what_is_there() -> None:
    layer = LayerReplica(D, W)
    layer.reserve(5)
    assert layer.capacity == 5
    for number in range(41):
        stage(layer, u64(number))
        layer.commit()
    assert (layer.capacity, layer.growths) == (80, 5)
    assert [found(layer, number + 1) for number in range(41)] == [[n] for n in range(41)]
    assert layer.rows == 41


@pytest.mark.parametrize("dtype", KEY_DTYPES)
def test_keys_of_every_dtype(dtype: torch.dtype) -> None:
    layer, generator = LayerReplica(D, W, dtype=dtype), torch.Generator().manual_seed(0)
    exact = torch.randn(50, D, generator=generator)
    scales = exact.abs().amax(1) / 127 if dtype == torch.int8 else None
    stored = exact.to(dtype) if scales is None else (exact / scales[:, None]).round().to(dtype)
    ids = np.arange(50, dtype=np.uint64)
    layer.stage(ids, stored, scales, torch.zeros(50, W), ids.astype(np.int64), ids)
    layer.commit()
    wanted = stored.float() if scales is None else stored * scales[:, None]
    rows = torch.arange(50)
    assert torch.equal(layer.stored_keys(rows), wanted[layer.ids_of(rows.numpy()).astype(np.int64)])
    ids_found = [layer.ids_of(nearest(layer, key[None], 1)[0].numpy())[0, 0] for key in exact]
    assert ids_found == list(range(50))
    scale = 0 if scales is None else 4
    assert layer.row_bytes(D, W, dtype) == D * dtype.itemsize + scale + 4 * W + 20


def test_hits_follow_the_ids() -> None:
    layer = LayerReplica(D, W)
    stage(layer, u64(1, 2, 3))
    layer.commit()

    def hit(number: float, times: int) -> None:
        rows, _ = nearest(layer, torch.full((1, D), float(number)), 1)
        counts = torch.tensor([times, 0, 0, 0.5], dtype=torch.float64)
        layer.count(rows[0].expand(times), torch.ones(times, dtype=torch.bool), counts)

    def taken() -> dict[int, int]:
        ids, hits = layer.take_hits()
        return dict(zip(ids.tolist(), hits.tolist(), strict=True))

    hit(2, 2), hit(3, 3)
    assert taken() == {1: 2, 2: 3}
    assert taken() == {}
    hit(2, 1), hit(3, 4)
    stage(layer, u64(1), value=10.0)  # in another row
    layer.stage_deletion(u64(2))
    layer.commit()
    hit(11, 5)
    stage(layer, u64(8, 9))  # in the rows that 1 and 2 had
    layer.commit()
    assert taken() == {1: 6, 2: 4}
    assert layer.take_counts() == (5, 15, 0, 2.5)
    assert layer.take_counts() == (0, 0, 0, 0.0)


def test_what_does_not_fit_is_named() -> None:
    layer = LayerReplica(D, W)
    with pytest.raises(BadInput, match=r"a replica: keys \(1, 3\), expected \(1, 16\)"):
        stage(layer, u64(1), key=torch.zeros(1, 3))
    with pytest.raises(BadInput, match=r"keys of a replica: got torch.float64, expected one of"):
        LayerReplica(D, W, dtype=torch.float64)
    with pytest.raises(BadInput, match="scales"):
        stage(LayerReplica(D, W, dtype=torch.int8), u64(1))
    assert len(layer) == 0


def test_the_device_is_waited_for_before_and_after_what_changes() -> None:
    """Whichever streams lookups and commits use, as on a GPU."""
    seen = list[tuple[float, int]]()
    layer = LayerReplica(D, W, lock=LookupLock(lambda: seen.append(state())))

    def state() -> tuple[float, int]:
        return float(layer.squared_norms[:1].sum()), int(layer.hits[:1].sum())

    layer.reserve(1)
    stage(layer, u64(7))
    seen.clear()
    layer.commit()
    norm = float(layer.squared_norms[0])
    assert seen == [(INFINITY, 0), (norm, 0)]
    seen.clear()
    layer.count(torch.tensor([0]), torch.tensor([True]), torch.zeros(4, dtype=torch.float64))
    layer.take_hits()
    assert seen == [(norm, 1), (norm, 0)]


def test_lookups_see_all_of_a_commit_or_nothing() -> None:
    """Every commit replaces all entries: a lookup of all finds those of one value."""
    layer, ids = LayerReplica(D, W), u64(*range(20))
    stage(layer, ids, value=0.0)
    layer.commit()
    done, before_s = threading.Event(), sys.getswitchinterval()

    def values_seen() -> set[tuple[float, ...]]:
        seen = set()
        while not done.is_set():
            with layer.lock:
                rows, distances = nearest(layer, torch.zeros(1, D), 30)
                held = distances[0] < INFINITY
                seen.add((int(held.sum()), *layer.values[rows[0, held], 0].unique().tolist()))
        return seen

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(values_seen) for _ in range(2)]
            for number in range(1, 40):
                stage(layer, ids, value=float(number))
                layer.commit()
            done.set()
            seen = set.union(*(job.result() for job in jobs))
    finally:
        done.set()
        sys.setswitchinterval(before_s)
    assert {len(values) for values in seen} == {2}
    assert {count for count, *_ in seen} == {20}

"""The K nearest rows against NumPy in float64: a scan finds them, a first pass what it measured, at exact distances."""

from __future__ import annotations

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from model_runner.errors import BadInput
from model_runner.replica import budget, first_pass, native, search
from model_runner.replica.bounded import BoundedScan
from model_runner.replica.first_pass import CodedFirstPass
from model_runner.replica.layer import INFINITY, KEY_DTYPES, LayerReplica

D, W = 96, 3
SPREAD = 0.3


class Keys:
    """Keys around centres in a subspace, and tokens near them."""

    def __init__(self, seed: int = 0, dimension: int = D) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.dimension = dimension
        self.basis = torch.randn(24, dimension, generator=self.random)
        self.centres = 3 * self.draw(40)

    def draw(self, number: int) -> Tensor:
        noise = torch.randn(number, self.dimension, generator=self.random)
        return torch.randn(number, 24, generator=self.random) @ self.basis + 0.1 * noise

    def some(self, number: int, centre: int | None = None) -> Tensor:
        chosen = torch.randint(40, (number,), generator=self.random)
        around = self.centres[chosen if centre is None else centre]
        return around + SPREAD * self.draw(number)


def write(layer: LayerReplica, ids: np.ndarray, keys: Tensor) -> None:
    scales = keys.abs().amax(1) / 127 if layer.dtype == torch.int8 else None
    stored = keys if scales is None else (keys / scales.unsqueeze(1)).round()
    values = torch.zeros(len(ids), W)
    layer.stage(ids, stored.to(layer.dtype), scales, values, ids.astype(np.int64) % 7, ids)


def filled(keys: Tensor, dtype: torch.dtype = torch.float32) -> LayerReplica:
    layer = LayerReplica(keys.shape[1], W, dtype=dtype)
    write(layer, np.arange(len(keys), dtype=np.uint64), keys)
    layer.commit()
    return layer


def brute_force(
    layer: LayerReplica, queries: Tensor, k: int, exclude: Tensor | None = None
) -> np.ndarray:
    """Squared distances [T, k] to the stored keys, +inf where there are no more."""
    rows = torch.arange(layer.capacity)
    keys = layer.stored_keys(rows).double().numpy()
    difference = queries.double().numpy()[:, None] - keys[None]
    distances = np.einsum("tnd,tnd->tn", difference, difference)
    distances[:, ~np.isfinite(layer.squared_norms.numpy())] = np.inf
    if exclude is not None:
        distances[layer.examples.numpy()[None] == exclude.numpy()[:, None]] = np.inf
    distances = np.pad(distances, ((0, 0), (0, k)), constant_values=np.inf)
    return np.sort(distances, axis=1)[:, :k]


def require_consistent(layer: LayerReplica, queries: Tensor, rows: Tensor, found: Tensor) -> None:
    """Rows are found once, are those of entries, and have their own distances; empty slots are row 0 at +inf."""
    for row, distance, query in zip(rows, found, queries, strict=True):
        there = row[distance < INFINITY]
        assert len(set(there.tolist())) == len(there)
        assert torch.isfinite(layer.squared_norms[there]).all()
        assert (row[distance == INFINITY] == 0).all()
        difference = layer.stored_keys(there).double() - query.double()
        expected = difference.square().sum(1)
        torch.testing.assert_close(
            distance[distance < INFINITY].double(), expected, rtol=1e-5, atol=1e-9
        )
    assert (found.diff(dim=1).nan_to_num(0.0) >= 0).all()


@pytest.mark.parametrize("at_once", [200, search._SCORES])
@pytest.mark.parametrize("dtype", KEY_DTYPES)
def test_a_scan_finds_the_nearest(
    dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_SCORES", at_once)
    keys = Keys()
    layer, queries = filled(keys.some(300), dtype), keys.some(9)
    for k in (1, 3, 32, 400):
        rows, distances = search.nearest(layer, queries, k)
        assert rows.shape == distances.shape == (9, k)
        require_consistent(layer, queries, rows, distances)
        np.testing.assert_allclose(distances, brute_force(layer, queries, k), rtol=1e-5)


@pytest.mark.parametrize("numbers", [search._NUMBERS_OF_BLOCKS, 1])
@pytest.mark.parametrize("tokens", [9, search._NUMBERS_OF_BLOCKS // D + 1])
def test_a_scan_in_blocks_finds_no_hidden_and_no_staged_row(
    numbers: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where FAISS does not look at the norms, as with few tokens."""
    monkeypatch.setattr(search, "_NUMBERS_OF_BLOCKS", numbers)
    keys = Keys()
    layer = filled(keys.some(300))
    layer.stage_deletion(np.arange(0, 200, 2, dtype=np.uint64))
    layer.commit()
    write(layer, np.arange(500, 550, dtype=np.uint64), keys.some(50))
    queries = keys.some(tokens)
    for k in (1, 32, 250):
        rows, distances = search.nearest(layer, queries, k)
        require_consistent(layer, queries, rows, distances)
        np.testing.assert_allclose(distances, brute_force(layer, queries, k), rtol=1e-5)


@pytest.mark.parametrize("numbers", [search._NUMBERS_OF_BLOCKS, 1])
@pytest.mark.parametrize("tokens", [9, search._NUMBERS_OF_BLOCKS // D + 1])
def test_entries_of_a_tokens_example_are_not_found(
    numbers: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where more of them are near than a scan in blocks looks beyond."""
    monkeypatch.setattr(search, "_NUMBERS_OF_BLOCKS", numbers)
    keys = Keys()
    layer, queries = filled(keys.some(300)), keys.some(tokens)
    exclude = torch.arange(tokens) % 9 - 1
    for k in (1, 32, 290):
        rows, distances = search.nearest(layer, queries, k, exclude)
        require_consistent(layer, queries, rows, distances)
        expected = brute_force(layer, queries, k, exclude)
        np.testing.assert_allclose(distances, expected, rtol=1e-5)


def test_of_no_rows_and_for_no_tokens() -> None:
    layer = LayerReplica(D, W)
    rows, distances = search.nearest(layer, torch.zeros(2, D), 3)
    assert (rows.tolist(), distances.tolist()) == ([[0] * 3] * 2, [[INFINITY] * 3] * 2)
    layer = filled(Keys().some(5))
    layer.stage_deletion(np.arange(5, dtype=np.uint64))
    layer.commit()
    _, distances = search.nearest(layer, torch.zeros(2, D), 3)
    assert distances.tolist() == [[INFINITY] * 3] * 2
    assert [part.shape for part in search.nearest(layer, torch.zeros(0, D), 3)] == [(0, 3)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_key_beside_a_long_one(dtype: torch.dtype) -> None:
    """|q|^2 - 2qk + |k|^2 of keys this long is off by 0.1 and more."""
    long = 1000 * torch.ones(20, D)
    layer = filled((long + 8 * torch.arange(20).unsqueeze(1)).to(dtype).float(), dtype)
    queries = layer.stored_keys(torch.arange(4)) + 1e-3
    rows, distances = search.nearest(layer, queries, 2)
    require_consistent(layer, queries, rows, distances)
    np.testing.assert_allclose(distances, brute_force(layer, queries, 2), rtol=1e-5)


def test_candidates_of_many_tokens_are_as_far_as_those_of_few() -> None:
    """Key by key or token by token, bit for bit; a candidate that is none is infinitely far."""
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(2, 300, D, generator=generator)
    layer, rows = filled(keys), torch.randint(-1, 300, (300, 9), generator=generator)
    found = search.exact_distances(layer, queries, rows)
    few = [
        search.exact_distances(layer, queries[n : n + 2], rows[n : n + 2]) for n in range(0, 300, 2)
    ]
    assert torch.equal(found, torch.cat(few))
    assert torch.equal(found == torch.inf, rows < 0)


def test_keys_at_the_same_distance_are_all_found() -> None:
    layer = filled(Keys().some(1).expand(12, D).contiguous())
    rows, _ = search.nearest(layer, torch.zeros(1, D), 12)
    assert sorted(rows[0].tolist()) == list(range(12))


def trained(
    keys: Keys, number: int = 3000, ks: tuple[int, ...] = (1, 8), dtype: torch.dtype = torch.float32
) -> tuple[LayerReplica, CodedFirstPass]:
    """A layer with a first pass that was measured on tokens like those of the test."""
    layer = filled(keys.some(number), dtype)
    passed = CodedFirstPass(layer, "pca")
    layer.first_pass = passed
    for k in ks:
        passed.train(k, keys.some(256))
    assert all(passed.plans[k].candidates for k in ks)
    return layer, passed


def recall(layer: LayerReplica, queries: Tensor, k: int, found: Tensor) -> float:
    true = brute_force(layer, queries, k)[:, -1:]
    return float((found.numpy() <= true * (1 + 1e-5)).mean())


@pytest.mark.parametrize("dtype", KEY_DTYPES)
def test_a_first_pass_finds_what_it_measured_with_exact_distances(dtype: torch.dtype) -> None:
    keys = Keys()
    layer, passed = trained(keys, dtype=dtype)
    for k, tokens in ((1, 1), (1, 70), (8, 1), (8, 70)):
        queries = keys.some(tokens)
        found = passed.nearest(queries, k)
        assert found is not None
        require_consistent(layer, queries, *found)
        assert recall(layer, queries, k, found[1]) >= (0.98 if k == 1 else 0.93)
    assert (passed.plans[1].tokens, passed.width) == (256, 64)
    assert 0 < passed.nbytes < layer.keys.nbytes


def test_unit_vectors() -> None:
    """Of cosine memories: half a squared distance is 1 - cosine."""
    keys = Keys()

    def unit(number: int) -> Tensor:
        return torch.nn.functional.normalize(keys.some(number))

    layer = filled(unit(3000))
    passed = CodedFirstPass(layer, "pca")
    passed.train(1, unit(256))
    queries = unit(60)
    found = passed.nearest(queries, 1)
    assert found is not None
    require_consistent(layer, queries, *found)
    assert recall(layer, queries, 1, found[1]) >= 0.98


def test_what_was_written_since_is_found_at_once_and_what_was_hidden_never() -> None:
    keys = Keys()
    layer, passed = trained(keys)
    fresh = keys.some(20, centre=3)
    write(layer, np.arange(5, 25, dtype=np.uint64), fresh)
    layer.stage_deletion(np.arange(100, 160, dtype=np.uint64))
    old = layer.stored_keys(torch.arange(5, 25)).clone()
    layer.commit()
    for queries in (fresh, old, keys.some(40)):
        found = passed.nearest(queries, 8)
        assert found is not None
        require_consistent(layer, queries, *found)
        assert recall(layer, queries, 8, found[1]) >= 0.93
    found = passed.nearest(fresh, 1)
    assert found is not None
    assert found[1].max() == 0.0
    assert set(layer.ids_of(found[0].numpy())[:, 0].tolist()) == set(range(5, 25))


def test_a_neighbourhood_that_was_deleted_leaves_the_nearest_of_the_rest() -> None:
    keys = Keys()
    layer, passed = trained(keys, 4000, ks=(8,))
    centre = keys.centres[7]
    near, _ = search.exact(layer, centre.unsqueeze(0), 200)
    layer.stage_deletion(layer.ids_of(near[0].numpy()))
    layer.commit()
    queries = centre + SPREAD * keys.draw(10)
    found = passed.nearest(queries, 8)
    assert found is not None
    require_consistent(layer, queries, *found)
    np.testing.assert_allclose(found[1], brute_force(layer, queries, 8), rtol=1e-5)


def test_thousands_of_changes_while_lookups_go_on() -> None:
    """The thread takes changes into new codes; at every moment lookups agree with a scan."""
    keys, rng = Keys(), np.random.default_rng(0)
    layer, passed = trained(keys)
    first, stop = passed._state, False

    def lookups(seed: int) -> list[float]:
        own, seen = Keys(seed), []
        own.basis, own.centres = keys.basis, keys.centres
        while not stop:
            queries = own.some(8)
            with layer.lock:
                rows, found = search.nearest(layer, queries, 8)
                true = search.exact(layer, queries, 8)[1]
                assert torch.isfinite(layer.squared_norms[rows]).all()
            seen.append(float((found <= true[:, -1:] * (1 + 1e-5)).float().mean()))
        return seen

    with ThreadPoolExecutor(2) as pool:
        seen = [pool.submit(lookups, seed) for seed in (1, 2)]
        for _ in range(60):
            ids = rng.integers(0, 5000, 60).astype(np.uint64)
            layer.stage_deletion(ids[:20])
            write(layer, np.unique(ids[20:]), keys.some(len(np.unique(ids[20:]))))
            layer.commit()
        stop = True
        assert np.mean([share for part in seen for share in part.result()]) >= 0.93
    with layer.lock:
        for _ in range(200):  # what changed is read until new codes cost less
            passed.nearest(keys.some(64), 8)
    passed.wait()
    assert passed._state is not first
    queries = keys.some(50)
    with layer.lock:
        rows, found = search.nearest(layer, queries, 8)
    require_consistent(layer, queries, rows, found)
    assert recall(layer, queries, 8, found) >= 0.93


def test_lookups_train_it_and_are_scans_until_then() -> None:
    keys = Keys()
    layer = filled(keys.some(2000))
    first_pass.attach(layer, "pca")
    passed = layer.first_pass
    assert isinstance(passed, CodedFirstPass)
    for _ in range(9):  # tokens to measure on come with lookups
        with layer.lock:
            assert passed.nearest(keys.some(14), 3) is None
    passed.wait()
    assert passed.plans == {}
    with layer.lock:
        passed.nearest(keys.some(14), 3)
    passed.wait()
    assert passed.plans[3].candidates
    with layer.lock:
        assert passed.nearest(keys.some(2), 3) is not None
        assert passed.nearest(keys.some(2), 4) is None  # not measured for 4 yet
    passed.wait()
    assert sorted(passed.plans) == [3, 4]
    with layer.lock:
        assert passed.nearest(keys.some(2), 300) is None
    passed.wait()
    assert passed.plans[300].candidates == 0


def test_a_first_pass_that_finds_less_of_another_text_is_measured_anew() -> None:
    """One token at a time: plans must not outlive some hundred of them. What is close together has the same codes."""
    keys = Keys()
    close = keys.centres[0] + 1e-4 * keys.draw(1900)
    layer = filled(torch.cat((close, 100 * keys.some(1100))))
    passed = CodedFirstPass(layer, "pca")
    passed.train(1, 100 * keys.some(256))
    assert passed.plans[1].candidates

    def ask(tokens: Tensor) -> None:
        for token in tokens.split(1):
            passed.nearest(token, 1)
        passed.wait()

    ask(100 * keys.some(260))
    assert passed.plans[1].candidates
    ask(keys.centres[0] + 1e-4 * keys.draw(520))
    ask(keys.centres[0] + 1e-4 * keys.draw(1))
    assert not any(plan.candidates for plan in passed.plans.values())
    queries = keys.centres[0] + 1e-4 * keys.draw(5)
    assert passed.nearest(queries, 1) is None


def test_where_nothing_finds_enough_every_row_is_looked_at(
    caplog: pytest.LogCaptureFixture,
) -> None:
    random = torch.Generator().manual_seed(0)
    layer = filled(torch.randn(3000, 512, generator=random))
    passed = layer.first_pass = CodedFirstPass(layer, "pca")
    with caplog.at_level(logging.INFO):
        passed.train(1, torch.randn(256, 512, generator=random))
    assert passed.plans[1].candidates == 0
    assert "no first pass finds enough" in caplog.text
    queries = torch.randn(5, 512, generator=random)
    assert passed.nearest(queries, 1) is None
    _, distances = search.nearest(layer, queries, 1)
    np.testing.assert_allclose(distances, brute_force(layer, queries, 1), rtol=1e-5)


def test_auto_scans_where_that_costs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ready", lambda: None)
    keys = Keys()
    layer = filled(keys.some(1500))
    passed = CodedFirstPass(layer)
    passed.train(1, keys.some(256))
    assert passed.nearest(keys.some(8), 1) is None
    assert CodedFirstPass(layer, "exact").nearest(keys.some(8), 1) is None


@pytest.fixture
def compiled() -> None:
    """What is compiled for this CPU is there."""
    if native.compiled() is None:
        pytest.skip("nothing is compiled for this CPU")


compiles = pytest.mark.usefixtures("compiled")


@compiles
@pytest.mark.parametrize("dimension", [17, D, 256])
def test_a_scan_of_bytes_finds_the_nearest(dimension: int) -> None:
    """All of them: how far bytes put a distance off is known of every row."""
    keys = Keys(dimension=dimension)
    layer = filled(keys.some(1203))
    scan = BoundedScan(layer)
    for tokens in (1, 2, 3, 7, 40):
        queries = keys.some(tokens)
        queries[-1] *= 30  # far from every key
        for k in (1, 32, native.MOST_NEIGHBOURS):
            rows, found = scan.nearest(queries, k)
            require_consistent(layer, queries, rows, found)
            np.testing.assert_allclose(found, brute_force(layer, queries, k), rtol=1e-5, atol=1e-6)
    assert 0 < scan.nbytes < 1250 * (dimension + 7 + budget.BESIDE_BYTES)


@compiles
def test_of_fewer_rows_than_neighbours_and_of_what_is_no_number() -> None:
    keys = Keys()
    layer, queries = filled(keys.some(20)), keys.some(5)
    queries[1, 3], queries[4] = torch.nan, torch.inf
    rows, found = BoundedScan(layer).nearest(queries, 40)
    finite = [0, 2, 3]
    require_consistent(layer, queries[finite], rows[finite], found[finite])
    np.testing.assert_allclose(found[finite], brute_force(layer, queries[finite], 40), rtol=1e-5)
    assert found[[1, 4]].amin() == INFINITY
    layer.stage_deletion(np.arange(20, dtype=np.uint64))
    layer.commit()
    assert BoundedScan(layer).nearest(keys.some(3), 2)[1].amin() == INFINITY


@compiles
def test_a_scan_of_bytes_follows_its_layer() -> None:
    """Keys that are written, hidden, staged, far longer than all before, and so many that the layer grows."""
    keys = Keys()
    layer = filled(keys.some(1500))
    layer.reserve(200)
    scan = BoundedScan(layer)
    scan.nearest(keys.some(2), 8)
    encoded = scan._bytes
    fresh = keys.some(20, centre=3)
    write(layer, np.arange(5, 25, dtype=np.uint64), fresh)
    write(layer, np.arange(9000, 9040, dtype=np.uint64), 50 * keys.some(40))
    layer.stage_deletion(np.arange(100, 160, dtype=np.uint64))
    layer.commit()
    write(layer, np.arange(5000, 5010, dtype=np.uint64), fresh[:10])  # staged
    for more in (0, 4000):
        queries = torch.cat((fresh, keys.some(30), 50 * keys.some(3)))
        rows, found = scan.nearest(queries, 8)
        require_consistent(layer, queries, rows, found)
        np.testing.assert_allclose(found, brute_force(layer, queries, 8), rtol=1e-5, atol=1e-6)
        assert (scan._bytes is encoded) == (more == 0 and found[:20, 0].max() == 0)
        write(layer, np.arange(20_000, 24_000, dtype=np.uint64), keys.some(4000))
        layer.commit()


@compiles
def test_where_bytes_tell_keys_apart_badly_every_key_is_looked_at() -> None:
    """Many keys far closer to one another than a byte's step: what is found is exact all the same."""
    keys = Keys()
    layer = filled(keys.centres[0] + 1e-4 * keys.draw(1500))
    passed = layer.first_pass = CodedFirstPass(layer)
    queries = 30 * keys.some(200)
    assert passed.bounded.serves(200, 4)
    rows, found = search.nearest(layer, queries, 4)
    require_consistent(layer, queries, rows, found)
    np.testing.assert_allclose(found, brute_force(layer, queries, 4), rtol=1e-5)
    assert not passed.bounded.serves(200, 4)
    search.nearest(layer, queries, 4)
    passed.wait()


@compiles
def test_short_keys_are_searched_by_bytes() -> None:
    keys = Keys()
    layer = filled(keys.some(1500))
    passed = layer.first_pass = CodedFirstPass(layer)
    for tokens in (1, 60):
        queries = keys.some(tokens)
        _, found = search.nearest(layer, queries, 2)
        assert passed.nbytes == passed.bounded.nbytes > 0
        np.testing.assert_allclose(found, brute_force(layer, queries, 2), rtol=1e-5)
    assert passed.plans == {}


def test_without_a_compiler_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native._compile() is None
    assert "install g++" in caplog.text
    assert "no-such-compiler" in caplog.text


def test_without_faiss_every_row_is_looked_at_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = Keys()
    layer, _ = trained(keys)
    queries = keys.some(5)
    expected = brute_force(layer, queries, 8)
    monkeypatch.setattr(search, "faiss", lambda: None)
    first_pass._has_faiss.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            rows, distances = search.nearest(layer, queries, 8)
    first_pass._has_faiss.cache_clear()
    require_consistent(layer, queries, rows, distances)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)
    assert caplog.text.count("FAISS is not installed") == 1


ENDS_WHILE_IT_LEARNS = """
import threading
import torch
from model_runner.replica import first_pass
from model_runner.replica.layer import LayerReplica
from tests.unit.model_runner.replica.test_search import Keys, filled

begun, encode = threading.Event(), first_pass.Codes.encode

def encoded(self, keys):
    begun.set()
    threading.main_thread().join()
    print("encoded", flush=True)
    return encode(self, keys)

first_pass.Codes.encode = encoded
first_pass.measure = lambda *_: print("measured", flush=True)
keys = Keys()
layer = filled(keys.some(3000))
layer.first_pass = first_pass.CodedFirstPass(layer, "pca")
layer.first_pass.nearest(keys.some(300), 1)
layer.first_pass.nearest(keys.some(1), 1)
begun.wait()
"""


def test_a_program_that_ends_does_not_wait_for_codes() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ENDS_WHILE_IT_LEARNS], capture_output=True, text=True, check=True
    )
    assert ended.stdout.split() == ["encoded"], ended.stderr
    assert not ended.stderr


def test_another_choice_is_refused() -> None:
    with pytest.raises(BadInput, match="first pass: got 'hnsw', expected one of auto, exact, pca"):
        CodedFirstPass(LayerReplica(D, W), "hnsw")

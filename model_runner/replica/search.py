"""The K nearest rows of a layer of a replica: all of them are scanned, or a first pass chooses candidates.

Distances are exact either way: summed over the differences from the stored keys, since the expanded form
|q|^2 - 2qk + |k|^2 cancels near a long key. A scan ranks by the expanded form and looks at a few more than K.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model_runner.replica.layer import INFINITY, LayerReplica

Found = tuple[Tensor, Tensor]

# Candidates beyond K whose exact distances are looked at: the scan's own distances cancel near a long key.
MORE_CANDIDATES = 8
# Scores of a scan, and differences between queries and candidates, that are held at once: 32 and 8 MiB.
_SCORES, _DIFFERENCES = 1 << 23, 1 << 21
# From so many tokens on their candidates are looked at key by key.
_TOKENS_BY_KEY = 128
# Candidates beyond those, of tokens that must not find their own example: so many of its entries may be among them.
_OWN_CANDIDATES = 32
# From so many numbers of queries on FAISS takes keys by blocks (faiss::distance_compute_blas_threshold); with fewer it
# is slower than torch, and does not look at the norms that say which rows count.
_NUMBERS_OF_BLOCKS = 128_000


def nearest(layer: LayerReplica, queries: Tensor, k: int, exclude: Tensor | None = None) -> Found:
    """Rows int64 [T, k] of the nearest stored keys, and squared distances f32 [T, k], ascending.

    queries f32 [T, d]; exclude int64 [T]: the example whose entries a token must not find, or a number that no entry
    has. An empty slot is row 0 at distance +inf. Call it within `layer.lock`. The layer's first pass is asked, if it
    has one, unless entries are excluded.
    """
    if exclude is None and layer.first_pass is not None:
        found = layer.first_pass.nearest(queries, k)
        if found is not None:
            return found
    return exact(layer, queries, k, exclude)


def exact(layer: LayerReplica, queries: Tensor, k: int, exclude: Tensor | None = None) -> Found:
    """As `nearest`, by a scan of all rows. Shapes are those of the tensors, and nothing waits for the host."""
    rows = scan(layer, layer.squared_norms, queries, k + MORE_CANDIDATES, exclude)
    return closest(layer, queries, rows, k)


def scan(
    layer: LayerReplica,
    squared_norms: Tensor,
    queries: Tensor,
    count: int,
    exclude: Tensor | None = None,
) -> Tensor:
    """Rows int64 [T, <= count] of the nearest keys, about and in no order; -1: none.

    squared_norms [capacity]: those of the rows that count, +inf for others.
    """
    if queries.numel() >= _NUMBERS_OF_BLOCKS and _reads_in_place(layer):
        keys, more = layer.keys[: layer.rows], 0 if exclude is None else _OWN_CANDIDATES
        near = _scan_in_blocks(keys, squared_norms, queries, count + more)
        if near is not None and exclude is not None:
            return _without(layer, squared_norms, queries, count, exclude, near)
        if near is not None:
            return near
    return _scan_all(layer, squared_norms, queries, count, exclude)


def _scan_all(
    layer: LayerReplica,
    squared_norms: Tensor,
    queries: Tensor,
    count: int,
    exclude: Tensor | None,
) -> Tensor:
    """`scan` by torch."""
    every = layer.capacity if layer.device.type == "cuda" else layer.rows
    height = max(count, _SCORES // max(1, len(queries)))
    scores: list[Tensor] = []
    rows: list[Tensor] = []
    for start in range(0, every, height):
        part = slice(start, min(start + height, every))
        scored = _scores(layer, squared_norms, queries, part)
        if exclude is not None:
            scored.masked_fill_(layer.examples[part] == exclude.unsqueeze(1), INFINITY)
        best = scored.topk(min(count, scored.shape[1]), largest=False, sorted=False)
        scores.append(best.values)
        rows.append(best.indices + start)
    if not rows:
        return torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    found, finite = torch.cat(rows, 1), torch.cat(scores, 1)
    if len(rows) > 1:
        finite, order = finite.topk(min(count, found.shape[1]), largest=False, sorted=False)
        found = found.gather(1, order)
    return found.masked_fill_(finite == INFINITY, -1)


def _without(
    layer: LayerReplica,
    squared_norms: Tensor,
    queries: Tensor,
    count: int,
    exclude: Tensor,
    near: Tensor,
) -> Tensor:
    """`scan` of rows that were found without a look at `exclude`; tokens that are left with too few are asked again."""
    own = layer.examples[near.clamp_min(0)] == exclude.unsqueeze(1)
    found = near.masked_fill(own, -1)
    short = (own.any(1) & ((found >= 0).sum(1) < count)).nonzero().flatten()
    if len(short):
        again = _scan_all(layer, squared_norms, queries[short], count, exclude[short])
        found[short] = torch.nn.functional.pad(
            again, (0, found.shape[1] - again.shape[1]), value=-1
        )
    return found


def _scan_in_blocks(
    keys: Tensor, squared_norms: Tensor, queries: Tensor, count: int
) -> Tensor | None:
    """`scan` by FAISS, which keeps the best of a block of scores while it is in the cache; f32, on the CPU.

    None: it did not look at the norms, and found rows that do not count.

    4,096 tokens and 30,480 keys of 128 numbers take 0.3 of the time of torch, K = 1 or 32 (2026-11-28).
    """
    library, count, queries = faiss(), min(count, len(keys)), queries.contiguous()
    found = torch.empty(len(queries), count, dtype=torch.int64)
    distances = torch.empty(len(queries), count)
    floats = library.cast_integer_to_float_ptr
    library.knn_L2sqr(
        *(floats(tensor.data_ptr()) for tensor in (queries, keys)),
        *(keys.shape[1], len(queries), len(keys), count),
        floats(distances.data_ptr()),
        library.cast_integer_to_idx_t_ptr(found.data_ptr()),
        floats(squared_norms.data_ptr()),
    )
    found.masked_fill_(distances == INFINITY, -1)
    norms = squared_norms[found.clamp_min(0)]
    return None if bool(((norms == INFINITY) & (found >= 0)).any()) else found


def _reads_in_place(layer: LayerReplica) -> bool:
    """Whether FAISS can read the layer's own keys."""
    return layer.device.type == "cpu" and layer.dtype == torch.float32 and faiss() is not None


def _scores(layer: LayerReplica, squared_norms: Tensor, queries: Tensor, rows: slice) -> Tensor:
    """|k|^2 - 2qk, f32 [T, n] of new memory."""
    keys = layer.keys[rows]
    if keys.dtype == torch.bfloat16 and keys.is_cuda:  # no copy of the keys as f32
        products = torch.mm(queries.bfloat16(), keys.T, out_dtype=torch.float32)
        return products.mul_(-2).add_(squared_norms[rows])
    if layer.scales is None:
        return torch.addmm(squared_norms[rows], queries, keys.float().T, alpha=-2)
    products = torch.mm(queries, keys.float().T)
    return torch.addcmul(squared_norms[rows], products, layer.scales[rows], value=-2)


def closest(layer: LayerReplica, queries: Tensor, rows: Tensor, k: int) -> Found:
    """The k nearest of each token's candidates, rows int64 [T, c], -1: none; by exact distances, as `nearest`."""
    every = exact_distances(layer, queries, rows)
    if len(queries) == 1 and rows.shape[1] >= k and layer.device.type == "cpu":
        return _closest_of_one(rows, every, k)
    distances, order = every.topk(min(k, rows.shape[1]), largest=False)
    rows = rows.gather(1, order).masked_fill_(distances == INFINITY, 0)
    if rows.shape[1] == k:
        return rows, distances
    missing = k - rows.shape[1]
    pad = torch.nn.functional.pad
    return pad(rows, (0, missing)), pad(distances, (0, missing), value=INFINITY)


def _closest_of_one(rows: Tensor, distances: Tensor, k: int) -> Found:
    """Of one token's candidates, rows [1, c] and distances [1, c], by NumPy: in a third of the time of torch."""
    near, found = distances.numpy(), rows.numpy()
    order = near.argmin(1) if k == 1 else near[0].argsort()[:k]
    near, found = near[:, order], found[:, order]
    return torch.from_numpy(np.where(near == INFINITY, 0, found)), torch.from_numpy(near)


def exact_distances(layer: LayerReplica, queries: Tensor, rows: Tensor) -> Tensor:
    """Squared distances f32 [T, c] of queries [T, d] to the stored keys of rows [T, c]; +inf for row -1."""
    if _reads_in_place(layer):
        return _distances_in_place(layer.keys, queries.contiguous(), rows.contiguous())
    at_once = max(1, _DIFFERENCES // max(1, rows.shape[1] * layer.dimension))
    parts = []
    for start in range(0, len(queries), at_once):
        part = slice(start, start + at_once)
        keys = layer.stored_keys(rows[part].clamp_min(0))
        parts.append(keys.sub_(queries[part].unsqueeze(1)).square_().sum(-1))
    if not parts:
        return torch.empty(rows.shape, device=queries.device)
    return torch.cat(parts).masked_fill_(rows < 0, INFINITY)


def _distances_in_place(keys: Tensor, queries: Tensor, rows: Tensor) -> Tensor:
    """`exact_distances` without a copy of the candidates' keys; all tensors contiguous, on the CPU."""
    tokens, count = rows.shape
    if tokens >= _TOKENS_BY_KEY:
        return _distances_by_key(keys, queries, rows)
    distances = torch.empty(tokens, count)
    library = faiss()
    floats = library.cast_integer_to_float_ptr
    threads = library.omp_get_max_threads()  # of this thread
    # Waking a second thread for one token takes as long as it saves. Whether it is woken must not depend on more: teams
    # of one and of two in turn cost the model's next operations 8 ms (GNU OpenMP, 2 cores, 2026-11-28).
    if tokens == 1:
        library.omp_set_num_threads(1)
    try:
        library.fvec_L2sqr_by_idx(
            *(floats(tensor.data_ptr()) for tensor in (distances, queries, keys)),
            library.cast_integer_to_idx_t_ptr(rows.data_ptr()),
            *(keys.shape[1], tokens, count),
        )
    finally:
        library.omp_set_num_threads(threads)
    return distances


def _distances_by_key(keys: Tensor, queries: Tensor, rows: Tensor) -> Tensor:
    """`_distances_in_place` in the order of the keys: of many tokens each is read from RAM once, not once a token.

    512 tokens with 256 candidates each among 8,000 keys, d = 2,048: 21 ms, 55 token by token (one thread, 2026-11-28).
    """
    library, count = faiss(), rows.shape[1]
    by_key = rows.view(-1).int().argsort()
    wanted, tokens = rows.view(-1)[by_key], by_key // count
    ordered = torch.full((len(by_key),), INFINITY)
    floats, integers = library.cast_integer_to_float_ptr, library.cast_integer_to_idx_t_ptr
    library.pairwise_indexed_L2sqr(
        *(keys.shape[1], len(by_key)),
        *(floats(queries.data_ptr()), integers(tokens.data_ptr())),
        *(floats(keys.data_ptr()), integers(wanted.data_ptr())),
        floats(ordered.data_ptr()),
    )
    return torch.empty_like(ordered).scatter_(0, by_key, ordered).view(rows.shape)


@cache
def faiss() -> Any:
    """FAISS; None where it is not installed."""
    try:
        import faiss as library
    except ImportError:
        return None
    return library

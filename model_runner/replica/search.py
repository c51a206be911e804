"""The K nearest rows of a layer of a replica."""

from __future__ import annotations

import torch
from torch import Tensor

from model_runner.replica.layer import INFINITY, LayerReplica

# Of differences between queries and candidates that are held at once, 64 MiB.
_BLOCK_ELEMENTS = 1 << 24
# Candidates beyond K whose exact distances are looked at: the scan's own distances cancel near a long key.
_MORE_CANDIDATES = 8


def nearest(
    layer: LayerReplica, queries: Tensor, k: int, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows int64 [T, k] of the nearest stored keys, and squared distances f32 [T, k], ascending.

    queries f32 [T, d]; exclude int64 [T]: the example whose entries a token must not find, or a number that no entry
    has. An empty slot is row 0 at distance +inf. Call it within `layer.lock`.
    """
    if not layer.capacity:
        empty = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
        return empty, torch.full(empty.shape, INFINITY, device=queries.device)
    every = torch.arange(layer.capacity, device=queries.device)
    scores = torch.addmm(layer.squared_norms, queries, layer.stored_keys(every).T, alpha=-2)
    if exclude is not None:
        scores.masked_fill_(layer.examples == exclude.unsqueeze(1), INFINITY)
    count = min(layer.capacity, k + _MORE_CANDIDATES)
    scores, rows = scores.topk(count, largest=False)
    distances = _exact_distances(layer, queries, rows)
    distances.masked_fill_(scores == INFINITY, INFINITY)
    distances, order = distances.topk(min(k, count), largest=False)
    rows = rows.gather(1, order).masked_fill_(distances == INFINITY, 0)
    missing = k - rows.shape[1]
    pad = torch.nn.functional.pad
    return pad(rows, (0, missing)), pad(distances, (0, missing), value=INFINITY)


def _exact_distances(layer: LayerReplica, queries: Tensor, rows: Tensor) -> Tensor:
    """Squared distances f32 [T, n] of queries [T, d] to the keys of rows [T, n]."""
    at_once = max(1, _BLOCK_ELEMENTS // (rows.shape[1] * layer.dimension))
    parts = []
    for start in range(0, len(queries), at_once):
        part = slice(start, start + at_once)
        difference = layer.stored_keys(rows[part]) - queries[part].unsqueeze(1)
        parts.append(difference.square_().sum(-1))
    return torch.cat(parts) if parts else torch.empty(rows.shape, device=queries.device)

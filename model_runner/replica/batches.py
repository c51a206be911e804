"""Candidates for large batches on a CPU that multiplies bytes: every key is scanned as int8, the best are looked at.

Short keys are cheap to scan and hard to reduce: of d = 128, codes of 64 numbers had 0.90 of the nearest of tokens of
another text than they were measured on, int8 keys 1.0 (2026-11-28). What a scan finds is measured on some tokens of
every batch, by a scan of the keys themselves, before it is answered.

A key is rotated, so that all its numbers weigh about the same, and kept in bytes of one scale for the layer; half its
squared length stands in DIGITS bytes more, whose sum counts. So one product of integers ranks keys by distance.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from model_runner.replica import search
from model_runner.replica.budget import DIGITS, LONGEST_BYTES
from model_runner.replica.layer import INFINITY, LayerReplica
from model_runner.replica.plans import RECALL_AT_1, RECALL_AT_K, SAME
from model_runner.replica.search import Found

log = logging.getLogger(__name__)

# Where a product of bytes takes less than a scan of the keys. Codes of the keys, once they are learnt, take less still
# where they find enough; of keys longer than this they do. Scores of some tokens and all keys should stay in the cache.
SHORTEST, FEWEST_TOKENS, MOST_ROWS = 32, 512, 1 << 16
_BYTE = 127
# The best score of a group stands for its rows, which are `rows / _GROUP` apart; of so many tokens at once.
_GROUP, _TOKENS = 16, 64
# Scores of which the best stands for all, where some of many are selected.
_OF_SCORES = 8
# Groups beyond K that are looked into, and half of the candidates beyond K: the first that finds enough.
_EFFORTS = (8, 16, 32, 64)
# Tokens on which an effort is measured at first, and one of how many afterwards; those that are remembered.
_MEASURED, _ONE_OF, _REMEMBERED = 256, 128, 1024
# Of the numbers of keys, those that are not cut off; of so many keys: an order of all takes half of encoding them.
_WITHIN, _SAMPLE = 0.9999, 4096


@dataclass(slots=True)
class Effort:
    """What lookups of one K do, and how many of the true neighbours they found.

    Attributes:
        place: in _EFFORTS; beyond its end: every key is looked at.
        tokens, missed, found_of_k: that were measured; those whose nearest was missed; shares of K, summed.

    """

    place: int = 0
    tokens: int = 0
    missed: int = 0
    found_of_k: float = 0.0

    @property
    def finds_enough(self) -> bool:
        """One miss more than was seen: the sample is small."""
        at_1 = self.missed + 1 <= (1 - RECALL_AT_1) * (self.tokens + 1)
        return at_1 and self.found_of_k >= RECALL_AT_K * self.tokens

    def count(self, found: Tensor, true: Tensor) -> None:
        """Distances [n, K] that were found, and the true ones."""
        if self.tokens >= _REMEMBERED:
            self.tokens, self.missed = self.tokens // 2, self.missed // 2
            self.found_of_k /= 2
        self.tokens += len(found)
        self.missed += int((found[:, 0] > true[:, 0] * SAME).sum())
        self.found_of_k += float((found <= true[:, -1:] * SAME).sum()) / found.shape[1]


class BatchScan:
    """Scans one layer for large batches; keys that changed are taken in by the next lookup. Any thread may ask."""

    def __init__(self, layer: LayerReplica, seed: int = 0) -> None:
        self._layer = layer
        self._generator = torch.Generator().manual_seed(seed)
        self._encoding = threading.Lock()
        self._bytes: _Bytes | None = None
        self.efforts: dict[int, Effort] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of RAM beside the layer's."""
        return 0 if self._bytes is None else self._bytes.keys.nbytes

    def serves(self, tokens: int) -> bool:
        """Whether a lookup of so many tokens is faster by this scan."""
        layer = self._layer
        return (
            tokens >= FEWEST_TOKENS
            and SHORTEST <= layer.dimension <= LONGEST_BYTES
            and layer.rows <= MOST_ROWS
            and multiplies_bytes()
        )

    def nearest(self, queries: Tensor, k: int) -> Found | None:
        """As search.nearest; None: too few are found, every key is to be looked at. Within the layer's lock."""
        kept = self._up_to_date()
        asked = queries.any(1).nonzero()[:, 0]  # a token that is not looked up is the zero vector
        if not len(asked):
            return None
        effort = self.efforts.get(k)
        if effort is None:
            effort = self._chosen(kept, queries[_some(asked, _MEASURED)], k)
        while effort.place < len(_EFFORTS):
            found = self._found(kept, queries, k, effort)
            some = _some(asked, len(asked) // _ONE_OF)
            effort.count(found[1][some], search.exact(self._layer, queries[some], k)[1])
            if effort.finds_enough:
                return found
            effort = self._chosen(kept, queries[_some(asked, _MEASURED)], k, effort.place + 1)
        return None

    def _chosen(self, kept: _Bytes, tokens: Tensor, k: int, first: int = 0) -> Effort:
        """The first effort that finds enough for some tokens; beyond the last one if none does."""
        true = search.exact(self._layer, tokens, k)[1]
        efforts = [Effort(place) for place in range(first, len(_EFFORTS))]
        for effort in efforts:
            effort.count(self._found(kept, tokens, k, effort)[1], true)
            if effort.finds_enough:
                break
        else:
            effort = Effort(len(_EFFORTS))
            log.info("K = %d: no scan of int8 keys finds enough, every key is looked at", k)
        self.efforts[k] = effort
        return effort

    def _found(self, kept: _Bytes, queries: Tensor, k: int, effort: Effort) -> Found:
        rows = kept.candidates(queries, k, _EFFORTS[effort.place])
        norms = self._layer.squared_norms[: self._layer.rows]
        beyond = rows >= len(norms)
        rows.masked_fill_(beyond | (norms[rows.masked_fill(beyond, 0)] == INFINITY), -1)
        return search.closest(self._layer, queries, rows, k)

    def _up_to_date(self) -> _Bytes:
        """The keys of the layer's version, which nothing changes while a lookup is inside."""
        with self._encoding:
            kept = self._bytes
            if kept is None or not kept.take_in(self._layer):
                kept = self._bytes = _Bytes(self._layer, self._generator)
                self.efforts.clear()
            return kept


class _Bytes:
    """Keys of a layer at one version as bytes [rows, d + DIGITS]; rows are those of the layer and some that are hidden.

    A query's bytes of the squared length are one number, the weight of the digits: its scale is chosen so that it is
    a whole one.
    """

    def __init__(self, layer: LayerReplica, generator: torch.Generator) -> None:
        self.version, self._rows = layer.version, layer.rows
        shown = layer.squared_norms[: layer.rows] < INFINITY
        every = layer.stored_keys(torch.arange(layer.rows))
        self._mean = every[shown].mean(0)
        square = torch.randn(layer.dimension, layer.dimension, generator=generator)
        self._rotation = torch.linalg.qr(square).Q
        rotated, halves = self._reduced(every)
        kept = halves[shown]
        self._scale = _longest(rotated[shown]) / _BYTE
        self._middle = float(kept.max() + kept.min()) / 2
        self._digit = max(float(kept.max() - kept.min()) / 2, 1e-30) / (_BYTE * DIGITS)
        height = -(-layer.rows // (_GROUP * 64)) * _GROUP * 64
        self.keys = torch.zeros(height, layer.dimension + DIGITS, dtype=torch.int8)
        self.keys[:, layer.dimension :] = _BYTE  # hidden rows are farther than any
        self._write(torch.arange(layer.rows)[shown], rotated[shown], kept)

    def take_in(self, layer: LayerReplica) -> bool:
        """Follows the layer; False: what changed does not fit these scales, or is much."""
        if layer.version == self.version:
            return True
        if layer.rows > len(self.keys):
            return False
        changed = torch.from_numpy(layer.row_versions[: layer.rows] > self.version).nonzero()[:, 0]
        shown = changed[layer.squared_norms[changed] < INFINITY]
        rotated, halves = self._reduced(layer.stored_keys(shown))
        if len(shown) > self._rows // 4 or not self._fits(rotated, halves):
            return False
        self.keys[changed, : layer.dimension] = 0
        self.keys[changed, layer.dimension :] = _BYTE
        self._write(shown, rotated, halves)
        self.version = layer.version
        return True

    def candidates(self, queries: Tensor, k: int, effort: int) -> Tensor:
        """Rows int64 [T, c] of the nearest keys, about and in no order; hidden ones among them."""
        asked, rows = self._asked(queries), len(self.keys)
        groups = rows // _GROUP
        into, count = min(k + effort, groups), k + 2 * effort
        members = torch.arange(0, rows, groups).view(1, -1, 1)
        scores = torch.empty(min(_TOKENS, len(asked)), rows, dtype=torch.int32)
        found = []
        for part in torch.split(asked, _TOKENS):
            scored = torch._int_mm(part, self.keys.T, out=scores[: len(part)])
            best = scored.view(-1, _GROUP, groups).amax(1)
            chosen = _largest(best, into)
            near = (chosen.unsqueeze(1) + members).flatten(1)
            order = _largest(scored.gather(1, near), min(count, near.shape[1]))
            found.append(near.gather(1, order))
        return torch.cat(found)

    def _asked(self, queries: Tensor) -> Tensor:
        """Bytes of queries [T, d]."""
        rotated, _ = self._reduced(queries)
        largest = rotated.abs().amax(1, keepdim=True).clamp_min_(1e-30)
        weights = (self._digit * _BYTE / self._scale / largest).floor_().clamp_(1, _BYTE)
        scales = self._digit / (self._scale * weights)
        digits = (-weights).expand(-1, DIGITS)
        return torch.cat((_bytes(rotated / scales), digits.to(torch.int8)), 1)

    def _reduced(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated [n, d] about the mean, and half their squared lengths [n]."""
        rotated = (vectors - self._mean) @ self._rotation
        return rotated, rotated.square().sum(1) / 2

    def _fits(self, rotated: Tensor, halves: Tensor) -> bool:
        within = (halves - self._middle).abs() <= self._digit * _BYTE * DIGITS * SAME
        return bool(within.all()) and bool((rotated.abs() <= 2 * self._scale * _BYTE).all())

    def _write(self, rows: Tensor, rotated: Tensor, halves: Tensor) -> None:
        length = (
            ((halves - self._middle) / self._digit).round_().clamp_(-_BYTE * DIGITS, _BYTE * DIGITS)
        )
        each = torch.div(length, DIGITS, rounding_mode="floor")
        one_more = torch.arange(DIGITS) < (length - each * DIGITS).unsqueeze(1)
        digits = each.unsqueeze(1) + one_more
        self.keys[rows] = torch.cat((_bytes(rotated / self._scale), digits.to(torch.int8)), 1)


def _some(tokens: Tensor, number: int) -> Tensor:
    """About so many of some tokens' places [n], evenly."""
    return tokens[:: max(1, len(tokens) // max(1, number))]


def _largest(scores: Tensor, count: int) -> Tensor:
    """Columns int64 [T, count] of each row's largest scores [T, n], in no order.

    They are all in the `count` groups whose own largest are the largest: two selections among few take two thirds of
    the time of one among many (40 of 1,920 for 4,096 rows: 14 ms instead of 21, 2026-11-28).
    """
    columns = scores.shape[1]
    groups = columns // _OF_SCORES
    if columns % _OF_SCORES or 2 * count > groups:
        return scores.topk(count, sorted=False).indices
    chosen = scores.view(-1, _OF_SCORES, groups).amax(1).topk(count, sorted=False).indices
    near = (chosen.unsqueeze(1) + torch.arange(0, columns, groups).view(1, -1, 1)).flatten(1)
    order = scores.gather(1, near).topk(count, sorted=False).indices
    return near.gather(1, order)


def _longest(rotated: Tensor) -> float:
    """What numbers are cut off at: the few beyond it would take the others' precision, and cost recall themselves."""
    numbers = _some(rotated, _SAMPLE).abs().flatten()
    return max(float(numbers.kthvalue(max(1, int(len(numbers) * _WITHIN))).values), 1e-30)


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.round_().clamp_(-_BYTE, _BYTE).to(torch.int8)


@cache
def multiplies_bytes() -> bool:
    """Whether this CPU has instructions for products of bytes, and oneDNN, which uses them."""
    able = torch.cpu.get_capabilities()
    one_dnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return one_dnn and bool(able.get("avx512_vnni") or able.get("amx_int8"))

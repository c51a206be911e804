"""How a layer is searched: what is measured of a first pass before lookups rely on it, and what a lookup costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model_runner.replica import search
from model_runner.replica.codes import Codes
from model_runner.replica.layer import INFINITY, LayerReplica

# A plan must find the nearest of so many tokens, and of all K this share.
RECALL_AT_1, RECALL_AT_K = 0.99, 0.95
# What is tried: candidates, and as how much alike (the cosine) the parts of a query and of a key are taken that the
# components leave.
CANDIDATES = (16, 32, 64, 128, 256)
AGREEMENTS = (0.0, 0.1, 0.2, 0.3)
# Plans are measured on so many tokens that lookups asked for, and on half as many before there are that many. Stored
# keys in their place flatter: 64 numbers a key found the nearest of every one of them, and 0.80 to 0.91 of a random
# OLMoE's tokens (2026-11-28).
MEASURED = 256
ENOUGH = MEASURED // 2
# Between two measurements a plan is tried on so many of the latest tokens: another text's may be found less.
CHECKED = 16
# Every which lookup gives tokens, once there are enough: of CHECKED and more tokens, and of fewer.
_ONE_OF_LONG, _ONE_OF_SHORT = 32, 16
# Distances are the same within it.
SAME = 1 + 1e-5


@dataclass(frozen=True, slots=True)
class Costs:
    """What a lookup costs, in seconds: one table, for 2 cores.

    From the CPU time of one thread at d = 2,048, on a machine that others used (2026-11-28).

    Attributes:
        start: of a first pass.
        numbers_read: f32 numbers a second, from RAM.
        products: multiplications and additions a second, of a matrix product.
        levels_added: codes' numbers a second.
        differences: numbers of candidates a second.

    """

    start: float = 1e-4
    numbers_read: float = 5e9
    products: float = 1.5e11
    levels_added: float = 3e11
    differences: float = 1.5e10

    def of_scan(self, rows: int, dimension: int, tokens: int) -> float:
        """Every row's key for T tokens."""
        numbers = rows * dimension
        return max(numbers / self.numbers_read, tokens * numbers / self.products)

    def of_first_pass(
        self, rows: int, dimension: int, tokens: int, width: int, candidates: int
    ) -> float:
        """Reduced queries, codes, candidates; for one token projection and codes have to be read."""
        reducing = dimension * width * max(1 / self.numbers_read, tokens / self.products)
        scanning = rows * width * max(1 / (8 * self.numbers_read), tokens / self.levels_added)
        return self.start + reducing + scanning + tokens * candidates * dimension / self.differences


COSTS = Costs()


@dataclass(frozen=True, slots=True)
class Plan:
    """How a layer is searched for K neighbours, and how many of the true ones that found.

    Attributes:
        candidates: per token; 0: no number of them finds enough, every row is scanned.
        agreement: see AGREEMENTS.
        recall_at_1, recall_at_k: on `tokens` tokens that lookups asked for.

    """

    candidates: int
    agreement: float
    recall_at_1: float
    recall_at_k: float
    tokens: int


class AskedTokens:
    """Some of the tokens that lookups asked for, to measure plans on: the first ones, then now and then another."""

    def __init__(self, dimension: int) -> None:
        self._kept = np.zeros((MEASURED, dimension), np.float32)
        self._filled = self._lookups = self._checked = 0

    @property
    def enough(self) -> bool:
        """Whether plans can be measured on them."""
        return self._filled >= ENOUGH

    @property
    def times_filled(self) -> int:
        """How often as many came as are kept."""
        return self._filled // MEASURED

    @property
    def to_check(self) -> bool:
        """Whether enough came since plans were last measured or checked."""
        return self._filled - self._checked >= CHECKED

    def notice(self, queries: Tensor) -> None:
        """Tokens [T, d] of a lookup; threads that come together lose one another's, which does no harm."""
        self._lookups += 1
        one_of = _ONE_OF_LONG if len(queries) >= CHECKED else _ONE_OF_SHORT
        if self._filled >= MEASURED and self._lookups % one_of:
            return
        some = queries[:: max(1, len(queries) // MEASURED)].numpy()
        # A token that is not looked up searches for the zero vector, or for what is no number.
        some = some[some.any(1) & np.isfinite(some).all(1)]
        place = self._filled % MEASURED
        some = some[: MEASURED - place]
        self._kept[place : place + len(some)] = some
        self._filled += len(some)

    def tokens(self) -> Tensor:
        """Those that are kept, f32 [n, d]; they count as checked."""
        self._checked = self._filled
        return torch.from_numpy(self._kept[: self._filled].copy())

    def latest(self) -> Tensor:
        """The last CHECKED of them, f32 [n, d]; they count as checked."""
        self._checked = filled = self._filled
        places = np.arange(max(0, filled - CHECKED), filled) % MEASURED
        return torch.from_numpy(self._kept[places])

    def forget(self) -> None:
        """They are of another text than what is asked for now."""
        self._filled = self._checked = 0


def measure(
    layer: LayerReplica, tried: Sequence[Codes], wanted: Sequence[int], tokens: Tensor
) -> list[dict[int, Plan]]:
    """The plan of each K that is wanted, for each of some codes of the same rows."""
    nearest = _nearest(layer, tried[0], tokens, max(wanted))
    return [_plans(layer, codes, wanted, tokens, nearest) for codes in tried]


def finds_less(layer: LayerReplica, codes: Codes, plan: Plan, tokens: Tensor) -> bool:
    """Whether a plan misses more of these tokens' nearest [n, d] than one that was measured does by chance."""
    rows = codes.candidates(codes.reduction(tokens, plan.agreement), plan.candidates)
    found = search.exact_distances(layer, tokens, torch.from_numpy(rows)).amin(1)
    missed = found > _nearest(layer, codes, tokens, 1)[:, 0] * SAME
    return int(missed.sum()) > 1


def _nearest(layer: LayerReplica, codes: Codes, tokens: Tensor, k: int) -> Tensor:
    """Distances f32 [T, k] of the true neighbours among the rows of the codes that are still shown."""
    rows = torch.from_numpy(codes.rows)
    norms = torch.full((layer.capacity,), INFINITY)
    norms[rows] = layer.squared_norms[rows]
    near = search.scan(layer, norms, tokens, k + search.MORE_CANDIDATES)
    return search.closest(layer, tokens, near, k)[1]


def _plans(
    layer: LayerReplica, codes: Codes, wanted: Sequence[int], tokens: Tensor, nearest: Tensor
) -> dict[int, Plan]:
    found = {}
    for agreement in AGREEMENTS:
        rows = codes.candidates(codes.reduction(tokens, agreement), CANDIDATES[-1])
        found[agreement] = search.exact_distances(layer, tokens, torch.from_numpy(rows))
    return {k: _plan(k, found, nearest) for k in wanted}


def _plan(k: int, found: dict[float, Tensor], nearest: Tensor) -> Plan:
    """Twice the candidates that find enough: what is asked next is never quite what was measured.

    found: distances of candidates [T, c] by agreement; nearest: those of the true neighbours [T, >= k].
    """
    plans = []
    for candidates in CANDIDATES:
        if candidates >= k:
            tried = [_tried(k, candidates, each, nearest) for each in found.items()]
            plans.append(max(tried, key=_worth))
    enough = [place for place, plan in enumerate(plans) if plan.candidates]
    if enough:
        return plans[min(enough[0] + 1, len(plans) - 1)]
    return plans[-1] if plans else Plan(0, 0.0, 0.0, 0.0, len(nearest))


def _tried(k: int, candidates: int, found: tuple[float, Tensor], nearest: Tensor) -> Plan:
    near = found[1][:, :candidates]
    first = (near <= nearest[:, :1] * SAME).any(1)
    every = (near <= nearest[:, k - 1 : k] * SAME).sum(1).clamp_max(k)
    at_1, at_k = float(first.float().mean()), float(every.float().mean()) / k
    missed = int((~first).sum()) + 1  # one more than was seen: the sample is small
    enough = missed <= (1 - RECALL_AT_1) * (len(nearest) + 1) and at_k >= RECALL_AT_K
    return Plan(candidates if enough else 0, found[0], at_1, at_k, len(nearest))


def _worth(plan: Plan) -> tuple[bool, float]:
    return plan.candidates > 0, plan.recall_at_1 + plan.recall_at_k

"""Similarity, lambda, abstention and blend of T tokens with their K neighbours: the sidecar's arithmetic in torch.

The same formulas as router_service/kernels.py and router_service/blending.py, in f32, within 1e-5 of them. Shapes
depend on those of the arguments only and nothing waits for the host, so a CUDA graph can hold it. N experts, k = top-k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from knnmoe.client import blends_logits
from knnmoe.v1.types_pb2 import (
    MEMORY_KIND_LOGIT_DELTA,
    SIMILARITY_COSINE,
    SUPPORT_TOP_K,
    MemorySettings,
)
from torch import Tensor

from model_runner.architectures.families import Assignment

_FLOATS = torch.finfo(torch.float32)
# Of all f32 above 0.
SMALLEST = _FLOATS.smallest_normal * _FLOATS.eps
# As the sidecar counts hits: a neighbour counts when it is at least this similar.
MIN_SIMILARITY = 0.01


@dataclass(frozen=True, slots=True)
class LayerSettings:
    """How one layer is read; see MemorySettings.

    Attributes:
        logits: values, own and blended routing are router logits; False: assignments.
        logit_deltas: of these, values are added to the own ones, beside a null neighbour.
        speaks: False: the memory is not read at this layer.

    """

    logits: bool
    logit_deltas: bool
    cosine: bool
    neighbours: int
    gamma: float
    step_size: float
    null_weight: float
    min_lambda: float
    top_k_support: bool
    speaks: bool

    @classmethod
    def of(cls, settings: MemorySettings, layer: int) -> LayerSettings:
        """Those of a layer; every field of `settings` is set."""

        def own(values: list[float]) -> float:
            return values[layer if len(values) > 1 else 0]

        return cls(
            logits=blends_logits(settings.kind),
            logit_deltas=settings.kind == MEMORY_KIND_LOGIT_DELTA,
            cosine=settings.similarity == SIMILARITY_COSINE,
            neighbours=settings.neighbours,
            # beyond f32, inf * 0 would be no number
            gamma=min(max(own(list(settings.gamma)), SMALLEST), _FLOATS.max),
            step_size=own(list(settings.step_size)),
            null_weight=settings.null_weight,
            min_lambda=settings.min_lambda,
            top_k_support=settings.support == SUPPORT_TOP_K,
            speaks=not settings.layers or layer in settings.layers,
        )

    def width(self, top_k: int, num_experts: int) -> int:
        """Experts per token of a blended assignment, or of the family's own where logits are blended."""
        if self.logits or self.top_k_support:
            return top_k
        return min(num_experts, (self.neighbours + 1) * top_k)


def similarities(squared_distances: Tensor, settings: LayerSettings) -> Tensor:
    """S [...] of squared distances f32 [...] to stored keys; +inf gives 0. Cosine: of two vectors of length 1."""
    if settings.cosine:
        return (1.0 - squared_distances / 2.0).clamp_(0.0, 1.0)
    return (squared_distances * -settings.gamma).exp_()


def weights_of_memory(near: Tensor, settings: LayerSettings) -> tuple[Tensor, Tensor]:
    """(lambda [T], shares [T, K]) of similarities [T, K].

    Assignments: the mean similarity, and s_j / sum s. Logits: the mean, and s_j / K, which is lambda s_j / sum s. Logit
    deltas: sum s / (sum s + s0), and s_j / (sum s + s0).
    """
    total = near.sum(1, keepdim=True)
    if settings.logit_deltas:
        beside_null = (total + settings.null_weight).clamp_min_(SMALLEST)
        return total.div_(beside_null).squeeze(1), near / beside_null
    lambdas = total.squeeze(1) / near.shape[1]
    if settings.logits:
        return lambdas, near / near.shape[1]
    return lambdas, near / total.clamp_min_(SMALLEST)


def weights_of_token(
    squared_distances: list[float], settings: LayerSettings
) -> tuple[float, list[float], int]:
    """(lambda, shares [K], neighbours that count as hits) of one token's ascending distances [K]; RBF.

    `similarities` and `weights_of_memory` in numbers of Python, for where reading one is free.
    """
    near = [math.exp(-settings.gamma * each) for each in squared_distances]
    near = [each if each >= SMALLEST else 0.0 for each in near]  # as in f32
    total, count = sum(near), len(near)
    hits = sum(each >= MIN_SIMILARITY for each in near)
    if settings.logit_deltas:
        beside_null = max(total + settings.null_weight, SMALLEST)
        return total / beside_null, [each / beside_null for each in near], hits
    whole = count if settings.logits else max(total, SMALLEST)
    return total / count, [each / whole for each in near], hits


def blended_logits(
    own: Tensor, values: Tensor, shares: Tensor, lambdas: Tensor, settings: LayerSettings
) -> Tensor:
    """R + eta sum_j shares_j u_j of logit deltas, (1 - lambda) r + sum_j shares_j v_j of logits, f32 [T, N].

    own [T, N]; values f32 [T, K, N]; shares f32 [T, K]; lambdas f32 [T].
    """
    tokens, neighbours, _ = values.shape
    own, eta = own.float(), settings.step_size
    if not settings.logit_deltas:
        own, eta = own * (1.0 - lambdas).unsqueeze(1), 1.0
    if neighbours == 1:
        return torch.addcmul(own, values.squeeze(1), shares, value=eta)
    if tokens == 1:  # in half the time of the batched product
        return torch.addmm(own, shares, values.squeeze(0), alpha=eta)
    return torch.baddbmm(own.unsqueeze(1), shares.unsqueeze(1), values, alpha=eta).squeeze(1)


def blended_assignment(
    own: Assignment,
    values: Tensor,
    shares: Tensor,
    lambdas: Tensor,
    num_experts: int,
    settings: LayerSettings,
) -> Assignment:
    """(1 - lambda) a_own + lambda sum_j shares_j v_j; f32 weights and int64 experts [T, width].

    own [T, k]; values f32 [T, K, 2k'], experts and then weights; shares [T, K]; lambdas [T].
    """
    tokens, neighbours, columns = values.shape
    top_k, wide = columns // 2, own.experts.shape[1]
    lambda_column = lambdas.unsqueeze(1)
    memory_weights = values[:, :, top_k:] * (lambda_column * shares).unsqueeze(2)
    own_weights = own.weights.float()
    kept_weights = (1.0 - lambda_column) * own_weights
    weights = torch.cat((kept_weights, memory_weights.reshape(tokens, -1)), 1)
    own_experts = own.experts.long()
    memory_experts = values[:, :, :top_k].reshape(tokens, neighbours * top_k).long()
    experts = torch.cat((own_experts, memory_experts), 1)
    if not settings.top_k_support and experts.shape[1] <= num_experts:
        return Assignment(weights, experts)
    dense = weights.new_zeros(tokens, num_experts).scatter_add_(1, experts, weights)
    if not settings.top_k_support:
        every = torch.arange(num_experts, device=dense.device).expand(tokens, num_experts)
        return Assignment(dense, every.contiguous())
    heaviest = _top_k(dense, wide)
    stands = lambda_column == 0
    return Assignment(
        torch.where(stands, own_weights, heaviest.weights),
        torch.where(stands, own_experts, heaviest.experts),
    )


def _top_k(dense: Tensor, top_k: int) -> Assignment:
    """The k heaviest experts of each token, the smaller id first in a tie, scaled to the token's total weight."""
    ordered, experts = dense.sort(dim=1, descending=True, stable=True)
    weights = ordered[:, :top_k]
    total, kept = dense.sum(1, keepdim=True), weights.sum(1, keepdim=True)
    scale = torch.where(kept > 0, total / kept, 1.0)
    return Assignment(weights * scale, experts[:, :top_k])

"""Memories in this process, searched exactly: a setting costs seconds, and a sidecar answers the same.

Traces of a reference are taken once; memories are functions of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from model_runner.architectures import Assignment
from model_runner.lookup_lock import LookupLock
from model_runner.memory_builder.builder import collect_router_inputs
from model_runner.memory_builder.objective import LayerTrace
from model_runner.memory_builder.recipes import Kind, Recipe, entry_values, step_sizes
from model_runner.memory_builder.traces import (
    GradientSettings,
    TokenLoss,
    TracedWindows,
    descended,
    traced_windows,
)
from model_runner.models import LoadedModel
from model_runner.progress import Progress
from model_runner.replica.bounded import BoundedScan
from model_runner.replica.layer import LayerReplica
from model_runner.router_hooks import Logits, RouterCall
from model_runner.texts import Window, batched, make_batch, token_nll

# Distances that are held at once: 16 MB, which the allocator gives again without new pages.
_DISTANCES_AT_ONCE = 1 << 22
_QUERIES_AT_ONCE = 1 << 12
_TINY = 1e-30
# Of keys that several memories are made of; by identity, for tensors compare by number.
_scans: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Similarity(StrEnum):
    """Of a router input x and a key k."""

    RBF = "rbf"  # exp(-gamma |x - k|^2)
    LAPLACIAN = "laplacian"  # exp(-c |x - k|), c so that it equals the RBF's where that is lambda0
    COSINE = "cosine"  # max(0, cos(x, k)); neighbours by cosine


@dataclass(frozen=True, slots=True)
class Setting:
    """How a memory is made and read.

    Attributes:
        lambda0: similarity at the median distance of dev inputs to the nearest key.
        step_size: eta of logit deltas, scaled per layer by recipes.step_sizes; 1 otherwise.
        null_weight: s0 of logit deltas.
        layers: those that are read; None: all.
        top_k_only: an assignment memory's union is cut back to the model's own k experts.

    """

    recipe: Recipe
    neighbours: int
    lambda0: float
    step_size: float = 1.0
    null_weight: float = 0.5
    similarity: Similarity = Similarity.RBF
    layers: tuple[int, ...] | None = None
    top_k_only: bool = False

    def label(self) -> str:
        """Short name of what varies."""
        return (
            f"{self.recipe.kind} {self.recipe.norm} eta={self.recipe.step_size * self.step_size:g} "
            f"K={self.neighbours} lambda0={self.lambda0:g} s0={self.null_weight:g}"
        )


@dataclass(slots=True)
class Traces:
    """What a reference gave.

    Attributes:
        windows: in the order of the rows: longest first.
        keys: per layer [n, d], router inputs of the tokens with a loss.
        batches: the batches' traces at the logits that the last step starts from, and the rows that count.
        nll: [n] nats of each of these tokens' successors, on the CPU.
        window_of: [n] number of each row's window, on the CPU.

    """

    windows: list[Window]
    keys: list[Tensor]
    batches: list[tuple[Sequence[LayerTrace], Tensor]]
    nll: Tensor
    window_of: Tensor

    def norms(self, rows: Tensor | None = None) -> list[float]:
        """Median length of the gradient per layer, of all rows or of these."""
        found = []
        for layer in range(len(self.keys)):
            lengths = self.gradients(layer).norm(dim=1)
            found.append(float((lengths if rows is None else lengths[rows]).median()))
        return found

    def gradients(self, layer: int) -> Tensor:
        """[n, N] in f32."""
        return torch.cat(
            [t[layer].gradient.flatten(0, 1)[kept] for t, kept in self.batches]
        ).float()

    def rows_of(self, windows: Sequence[int]) -> Tensor:
        """Row numbers of the windows of these numbers."""
        return torch.isin(self.window_of, torch.tensor(list(windows))).nonzero().flatten()


def collect(
    loaded: LoadedModel,
    windows: Sequence[Window],
    progress: Progress,
    gradient: GradientSettings | None = None,
    *,
    recipe: Recipe | None = None,
    loss: TokenLoss = token_nll,
    batch_size: int = 32,
) -> Traces:
    """Traces of windows, kept in RAM.

    recipe: whose steps come before the last, where the gradient's settings ask for several.
    loss: of each token, of logits [B, S, V]: nats [B, S].
    """
    gradient = gradient or GradientSettings()
    batches, keys, losses, ordered = [], list[list[Tensor]](), list[Tensor](), list[Window]()
    for group in progress.track(list(batched(windows, batch_size)), "reference", unit="batches"):
        traced = traced_windows(loaded.model, make_batch(group, loaded.device), gradient, loss)
        kept = traced.kept
        keys.append([t.router_input.flatten(0, 1)[kept].float() for t in traced.traces])
        last = traced.traces
        if gradient.steps > 1 and recipe is not None:
            last = descended(loaded.model, traced, recipe, _norms(traced), gradient)
        batches.append((last, kept))
        losses.append(traced.nll.flatten()[kept].cpu())
        ordered += group
    counts = torch.tensor([w.targets for w in ordered])
    return Traces(
        ordered,
        [torch.cat(parts) for parts in zip(*keys, strict=True)],
        batches,
        torch.cat(losses),
        torch.arange(len(ordered)).repeat_interleave(counts),
    )


def _norms(traced: TracedWindows) -> list[float]:
    return [float(traced.gradient_norms(trace).median()) for trace in traced.traces]


def values_of(traces: Traces, recipe: Recipe, norms: Sequence[float] | None = None) -> list[Tensor]:
    """Dense values [n, N] per layer, f32. norms: median |g| per layer; None: of all rows."""
    norms = norms or traces.norms()
    found = []
    for layer, norm in enumerate(norms):
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + layer)
        parts = [
            _dense(entry_values(batch[layer], recipe, norm, kept, generator), batch[layer])
            for batch, kept in traces.batches
        ]
        found.append(torch.cat(parts))
    return found


def _dense(value: Assignment | Logits | Tensor, trace: LayerTrace) -> Tensor:
    if isinstance(value, Assignment):
        dense = value.weights.new_zeros(len(value.experts), trace.site.num_experts)
        return dense.scatter_add(1, value.experts, value.weights)
    return value.router_logits if isinstance(value, Logits) else value


def gammas_at(medians: Sequence[float], lambda0: float) -> list[float]:
    """Gamma per layer at which a median squared distance has similarity lambda0."""
    return [-math.log(lambda0) / max(median, 1e-12) for median in medians]


def median_distances(
    loaded: LoadedModel, keys: Sequence[Tensor], windows: Sequence[Window]
) -> list[float]:
    """Median squared distance of the windows' router inputs to the nearest key, per layer."""
    return distances_to(collect_router_inputs(loaded.model, windows, most=1000), keys)


def distances_to(inputs: Mapping[int, Tensor], keys: Sequence[Tensor]) -> list[float]:
    """Median squared distance of router inputs [m, d] by layer to the nearest key [n, d]."""
    medians = []
    for layer, of_layer in enumerate(keys):
        queries = inputs[layer].float().to(of_layer.device)
        distances, _ = squared_distances(queries, of_layer, of_layer.square().sum(1), 1)
        medians.append(float(distances.median()))
    return medians


class LocalMemory:
    """A policy over a memory in RAM, searched exactly.

    Args:
        keys: per layer [n, d].
        values: per layer [n, N], of the setting's kind.
        gammas: per layer.
        owners: [n] number of each row's window or example, for `excluding`.

    """

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        gammas: Sequence[float],
        setting: Setting,
        owners: Tensor | None = None,
    ) -> None:
        self.keys, self.values, self.gammas, self.setting = keys, values, gammas, setting
        self.owners = owners
        cosine = setting.similarity is Similarity.COSINE
        self._searched = [F.normalize(k, dim=1) for k in keys] if cosine else list(keys)
        self._square_norms = [k.square().sum(1) for k in self._searched]
        self._steps = step_sizes(len(keys), setting.step_size)
        self._excluded: Tensor | None = None
        self._lambdas: list[list[float]] = [[] for _ in keys]

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    @property
    def lambda_means(self) -> list[float]:
        """Mean lambda per layer of what was looked up; padding counts."""
        return [sum(each) / len(each) if each else 0.0 for each in self._lambdas]

    @contextmanager
    def excluding(self, owners: Sequence[int]) -> Iterator[None]:
        """Within it, row b of a batch reads no entry of owners[b] (leave one out)."""
        self._excluded = torch.tensor(list(owners), device=self.keys[0].device)
        try:
            yield
        finally:
            self._excluded = None

    def __call__(self, call: RouterCall) -> Assignment | Logits | None:
        """The blended routing of one layer."""
        layer = call.site.layer
        if self.setting.layers is not None and layer not in self.setting.layers:
            return None
        if not len(self.keys[layer]):  # an empty memory is the plain model
            return None
        similarity, nearest = self.neighbours(layer, call.router_input.float(), self._without(call))
        return self.blended(call, similarity, self.values[layer][nearest])

    def neighbours(
        self, layer: int, queries: Tensor, excluded: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Similarities [T, K] and rows [T, K] of the nearest entries.

        excluded: [T] an owner whose entries are not read.
        """
        if self.setting.similarity is Similarity.COSINE:
            queries = F.normalize(queries, dim=1)
        keys, count = self._searched[layer], min(self.setting.neighbours, len(self.keys[layer]))
        if excluded is None and keys.device.type == "cpu":
            scan = scan_of(keys)
            if scan.serves(len(queries), count):
                nearest, distances = scan.nearest(queries, count)
                return self._similarity(layer, distances), nearest
        own = None if excluded is None else (self.owners, excluded)
        distances, nearest = squared_distances(queries, keys, self._square_norms[layer], count, own)
        return self._similarity(layer, distances), nearest

    def blended(self, call: RouterCall, similarity: Tensor, values: Tensor) -> Assignment | Logits:
        """The routing of T tokens with similarities [T, K] and values [T, K, N] of neighbours."""
        layer, setting = call.site.layer, self.setting
        total = similarity.sum(1, keepdim=True)
        if setting.recipe.kind is Kind.LOGIT_DELTA:
            weight = (total + setting.null_weight).clamp_min(_TINY)
            self._lambdas[layer].append(float((total / weight).mean()))
            return Logits(call.router_logits + self._delta(layer, similarity, values))
        lambdas = similarity.mean(1, keepdim=True)
        self._lambdas[layer].append(float(lambdas.mean()))
        memory = torch.einsum("tk,tkn->tn", similarity / total.clamp_min(_TINY), values)
        if setting.recipe.kind is Kind.LOGITS:
            return Logits((1 - lambdas) * call.router_logits + lambdas * memory)
        own = torch.zeros_like(memory).scatter_add(1, call.experts, call.weights.float())
        blended = (1 - lambdas) * own + lambdas * memory
        if setting.top_k_only:
            kept = blended.topk(call.site.top_k, dim=1)
            scale = blended.sum(1, keepdim=True) / kept.values.sum(1, keepdim=True).clamp_min(_TINY)
            return Assignment(kept.values * scale, kept.indices)
        width = min(memory.shape[1], (setting.neighbours + 1) * call.site.top_k)
        heaviest = blended.topk(width, dim=1)
        return Assignment(heaviest.values, heaviest.indices)

    def change(self, layer: int, queries: Tensor) -> Tensor:
        """How far it would move the logits of router inputs [m, d]: Euclidean length [m]. Of logit deltas only."""
        found = []
        for part in torch.split(queries, _QUERIES_AT_ONCE):
            similarity, nearest = self.neighbours(layer, part)
            found.append(self._delta(layer, similarity, self.values[layer][nearest]).norm(dim=1))
        return torch.cat(found)

    def _delta(self, layer: int, similarity: Tensor, values: Tensor) -> Tensor:
        """Of the logits [T, N]."""
        weight = similarity.sum(1, keepdim=True) + self.setting.null_weight
        average = torch.einsum("tk,tkn->tn", similarity, values) / weight.clamp_min(_TINY)
        return self._steps[layer] * average

    def _without(self, call: RouterCall) -> Tensor | None:
        if self._excluded is None or call.batch_shape is None:
            return None
        return self._excluded.repeat_interleave(call.batch_shape[1])

    def _similarity(self, layer: int, distances: Tensor) -> Tensor:
        """Of squared distances; those of unit vectors are 2 - 2 cos."""
        if self.setting.similarity is Similarity.COSINE:
            return (1 - distances / 2).clamp(0, 1)
        gamma = self.gammas[layer]
        if self.setting.similarity is Similarity.LAPLACIAN:
            # exp(-c r) with c r = -ln(lambda0) at the median distance r: c = sqrt(gamma * -ln lambda0).
            return torch.exp(-math.sqrt(gamma * -math.log(self.setting.lambda0)) * distances.sqrt())
        return torch.exp(-gamma * distances)


def scan_of(keys: Tensor) -> BoundedScan:
    """The replicas' exact search of keys [n, d], where it serves; about five times as fast as a scan by torch."""
    found: BoundedScan | None = _scans.get(keys)  # type: ignore[no-untyped-call]
    if found is None:
        layer = LayerReplica(keys.shape[1], 1, device=keys.device, lock=LookupLock())
        ids = np.arange(len(keys), dtype=np.uint64)
        nothing = torch.zeros(len(keys), 1, device=keys.device)
        layer.stage(ids, keys, None, nothing, np.zeros(len(keys), np.int64), ids)
        layer.commit()
        found = _scans[keys] = BoundedScan(layer)
    return found


def squared_distances(
    queries: Tensor,
    keys: Tensor,
    square_norms: Tensor,
    k: int,
    exclude: tuple[Tensor | None, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The k least squared distances [T, k] and their rows.

    exclude: owners [n] of the keys, and [T] the owner whose keys a query does not see; their distance is infinite.
    """
    parts, rows = [], max(1, _DISTANCES_AT_ONCE // len(keys))
    for start in range(0, len(queries), rows):
        part = queries[start : start + rows]
        scores = torch.addmm(square_norms, part, keys.T, alpha=-2.0)
        if exclude is not None and exclude[0] is not None:
            own = exclude[0] == exclude[1][start : start + rows, None]
            scores.masked_fill_(own, math.inf)
        least = scores.topk(k, dim=1, largest=False)
        distances = least.values + part.square().sum(1, keepdim=True)
        parts.append((distances.clamp_min(0), least.indices))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

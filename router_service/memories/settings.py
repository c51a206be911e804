"""How a memory is read: its kind, kernel, K, bandwidths and step sizes. Stored with the memory."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from router_service import kernels
from router_service.arrays import F32
from router_service.backends.base import Metric, SearchOptions
from router_service.blending import Support
from router_service.errors import InvalidField

MAX_NEIGHBOURS = 1024
# A graph walk that keeps fewer candidates misses 2 in 100 of the K nearest where a third of its entries is outdated
# (docs/recall.md).
_EF_PER_NEIGHBOUR = 4
# Misses no nearest key in benchmarks.route, and 512 tokens take no longer than FAISS flat.
_HNSW_EF = 100
# Of another one of these nobody knows what a search finds.
_MEASURED_FOR = ("neighbours", "hnsw_ef", "oversampling")
# Blended logits stay finite in f32: the norm of a stored delta is below 2e19.
MAX_STEP_SIZE = 1e6
# Of gamma and null_weight: beyond f32 the kernel of an equal key is NaN, and a sum infinite.
MOST = 1e30


class Kind(StrEnum):
    """What the values are."""

    ASSIGNMENT = "assignment"
    LOGIT_DELTA = "logit_delta"
    LOGITS = "logits"

    @property
    def blends_logits(self) -> bool:
        """Values have a number for each expert, and routing is given and answered as logits; else as assignments."""
        return self is not Kind.ASSIGNMENT

    @property
    def plural(self) -> str:
        """What a memory holds, in words and as the field of messages with entries."""
        return "logits" if self is Kind.LOGITS else f"{self}s"

    def value_width(self, num_experts: int, top_k: int) -> int:
        """Numbers in a value row: N logits or logit deltas, or k experts and k weights."""
        return num_experts if self.blends_logits else 2 * top_k


class Similarity(StrEnum):
    """The kernel."""

    RBF = "rbf"
    COSINE = "cosine"

    @property
    def metric(self) -> Metric:
        """The distance that the kernel reads."""
        return Metric.EUCLID if self is Similarity.RBF else Metric.COSINE


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """Every field of knnmoe.v1.MemorySettings, resolved. Lists hold one number for all layers, or one per layer."""

    preset: str = "recommended"
    kind: Kind = Kind.LOGIT_DELTA
    similarity: Similarity = Similarity.RBF
    neighbours: int = 32
    gamma: tuple[float, ...] = (1.0,)
    step_size: tuple[float, ...] = (1.0,)
    null_weight: float = 0.5
    min_lambda: float = 0.0
    support: Support = Support.UNION
    layers: tuple[int, ...] = ()
    hnsw_ef: int = _HNSW_EF
    oversampling: float = 2.0
    # What the two were measured to find of the K = neighbours nearest (0: they were not), and where they find less.
    search_recall: float = 0.0
    exact_layers: tuple[int, ...] = ()
    # Boosting rounds behind the deltas, and the NLL of the reference: plain, then leave-one-out after 0, 1, ... rounds.
    rounds: int = 0
    round_nll: tuple[float, ...] = ()

    def gamma_of(self, layer: int) -> float:
        """RBF bandwidth of a layer."""
        return self.gamma[layer if len(self.gamma) > 1 else 0]

    def step_size_of(self, layer: int) -> float:
        """Step size eta of a layer."""
        return self.step_size[layer if len(self.step_size) > 1 else 0]

    def lambdas(self, similarities: F32) -> F32:
        """Lambda [T] of similarities [T, K]: beside a null neighbour for logit deltas, else their mean."""
        if self.kind is Kind.LOGIT_DELTA:
            return kernels.shrunk_lambda(similarities, self.null_weight)
        return kernels.mean_lambda(similarities)

    def speaks_for(self, layer: int) -> bool:
        """Whether the memory is read at this layer."""
        return not self.layers or layer in self.layers

    def search(self, neighbours: int, layer: int | None = None) -> SearchOptions:
        """How collections, or that of a layer, are searched for that many neighbours."""
        if self.search_recall and neighbours == self.neighbours:
            return SearchOptions(self.hnsw_ef, self.oversampling, exact=layer in self.exact_layers)
        usual = _HNSW_EF if self.search_recall else 0  # what was measured was for another K
        least = max(usual, _EF_PER_NEIGHBOUR * neighbours)
        return SearchOptions(max(self.hnsw_ef, least), self.oversampling)

    def fields(self) -> dict[str, Any]:
        """Name -> value of every field; plain JSON values but for tuples, which JSON turns into lists."""
        return asdict(self)


PRESETS: dict[str, MemorySettings] = {
    # arXiv 2601.02144: assignments, K = 1, lambda = mean similarity.
    "paper": MemorySettings(preset="paper", kind=Kind.ASSIGNMENT, neighbours=1, null_weight=0.0),
    # Its version 2: optimised logits, blended in logit space, so that k experts run.
    "paper-v2": MemorySettings(preset="paper-v2", kind=Kind.LOGITS, neighbours=1, null_weight=0.0),
    # One-pass logit deltas, 32 neighbours, a null neighbour of weight 0.5 (docs/experiments.md).
    "recommended": MemorySettings(),
    # The same deltas after boosting rounds, which make them longer: a heavier null neighbour holds them back.
    "boosted": MemorySettings(preset="boosted", null_weight=4.0),
}


def preset(name: str) -> MemorySettings:
    """Settings of a preset. Raises InvalidField on an unknown name."""
    if name not in PRESETS:
        raise InvalidField("settings.preset", name, "one of " + ", ".join(sorted(PRESETS)))
    return PRESETS[name]


def settings_from_json(values: dict[str, Any]) -> MemorySettings:
    """Inverse of `fields`, from JSON; unknown keys are an error (TypeError), missing ones take their defaults."""
    known = dict(values)
    for name, convert in (("kind", Kind), ("similarity", Similarity), ("support", Support)):
        if name in known:
            known[name] = convert(known[name])
    for name in ("gamma", "step_size", "layers", "exact_layers", "round_nll"):
        if name in known:
            known[name] = tuple(known[name])
    return MemorySettings(**known)


def changed(settings: MemorySettings, changes: dict[str, Any]) -> MemorySettings:
    """A copy with `changes` applied. Raises InvalidField for fields that are fixed at creation."""
    now = settings.fields()
    for name in ("kind", "similarity", "preset"):
        if name in changes and changes[name] != getattr(settings, name):
            raise InvalidField(
                f"settings.{name}",
                str(changes[name]),
                f"{getattr(settings, name)!s} (fixed at creation; create another memory instead)",
            )
    others = any(changes.get(name, now[name]) != now[name] for name in _MEASURED_FOR)
    if settings.search_recall and others and "search_recall" not in changes:
        changes = {"hnsw_ef": _HNSW_EF, "search_recall": 0.0, "exact_layers": ()} | changes
    return replace(settings, **changes)


def validate(settings: MemorySettings, num_layers: int) -> None:
    """Raises InvalidField on the first field out of range for a model of `num_layers` MoE layers."""
    _require(
        "neighbours",
        settings.neighbours,
        1 <= settings.neighbours <= MAX_NEIGHBOURS,
        f"1 to {MAX_NEIGHBOURS}",
    )
    for name in ("gamma", "step_size"):
        _check_per_layer(name, getattr(settings, name), num_layers)
    for number, gamma in enumerate(settings.gamma):
        _require(f"gamma[{number}]", gamma, gamma > 0, "a number above 0")
        _require(f"gamma[{number}]", gamma, gamma <= MOST, f"at most {MOST:g}")
    for number, step_size in enumerate(settings.step_size):
        within = abs(step_size) <= MAX_STEP_SIZE
        _require(f"step_size[{number}]", step_size, within, f"at most {MAX_STEP_SIZE:g} in size")
    within = 0 <= settings.null_weight <= MOST
    _require("null_weight", settings.null_weight, within, f"0 or more, and at most {MOST:g}")
    _require("min_lambda", settings.min_lambda, 0 <= settings.min_lambda < 1, "in [0, 1)")
    for name in ("layers", "exact_layers"):
        numbers = getattr(settings, name)
        within = all(0 <= number < num_layers for number in numbers)
        _require(name, numbers, within, f"layer numbers from 0 to {num_layers - 1}")
    _require("search_recall", settings.search_recall, 0 <= settings.search_recall <= 1, "0 to 1")
    _require("hnsw_ef", settings.hnsw_ef, 1 <= settings.hnsw_ef <= 65_536, "1 to 65536")
    _require("oversampling", settings.oversampling, 1 <= settings.oversampling <= 100, "1 to 100")
    finite = all(math.isfinite(nll) for nll in settings.round_nll)
    _require("round_nll", list(settings.round_nll), finite, "finite numbers")


def _check_per_layer(name: str, values: tuple[float, ...], num_layers: int) -> None:
    _require(
        name,
        list(values),
        len(values) in (1, num_layers),
        f"1 number, or {num_layers} (one per MoE layer)",
    )
    _require(name, list(values), all(math.isfinite(v) for v in values), "finite numbers")


def _require(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise InvalidField(f"settings.{name}", value, expected)

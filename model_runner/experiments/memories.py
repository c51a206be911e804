"""What is in a memory: compressed keys and values, labels without ground truth, and where the gain comes from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from model_runner.architectures import Assignment
from model_runner.experiments.arms import fitted_memory, preset_setting
from model_runner.experiments.local import LocalMemory, Traces, collect, gammas_at, values_of
from model_runner.experiments.registry import Experiment
from model_runner.experiments.results import Row
from model_runner.experiments.study import Study
from model_runner.experiments.sweeps import BOTH, changes
from model_runner.logit_tap import family_assignment
from model_runner.router_hooks import Logits, RouterCall
from model_runner.texts import Batch

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Codec:
    """Keys as a compressed memory has them.

    Attributes:
        fitted: of keys [n, d]: what makes of rows [m, d] the floats that their codes stand for.
        bytes_per_key: of d numbers.
        both: queries are encoded too; False: they are compared as they are.

    """

    fitted: Callable[[Tensor], Encode]
    bytes_per_key: Callable[[int], float]
    both: bool = False


def _scalar(bits: int) -> Codec:
    def fitted(keys: Tensor) -> Encode:
        low, high = keys.quantile(0.005, dim=0), keys.quantile(0.995, dim=0)
        step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
        return lambda rows: low + step * ((rows - low) / step).round().clamp(0, 2**bits - 1)

    return Codec(fitted, lambda d: d * bits / 8)


def _signs(keys: Tensor) -> Encode:
    """One bit per number: which half of the keys it is in, at the mean of that half."""
    middle = keys.median(dim=0).values
    above = keys > middle
    upper = (keys * above).sum(0) / above.sum(0).clamp_min(1)
    lower = (keys * ~above).sum(0) / (~above).sum(0).clamp_min(1)
    return lambda rows: torch.where(rows > middle, upper, lower)


def _pca(share: int) -> Codec:
    def fitted(keys: Tensor) -> Encode:
        mean = keys.mean(0)
        axes = torch.linalg.eigh(torch.cov(keys.T)).eigenvectors[:, -(keys.shape[1] // share) :]
        return lambda rows: (rows - mean) @ axes

    return Codec(fitted, lambda d: 4 * (d // share), both=True)


def _random(share: int) -> Codec:
    def fitted(keys: Tensor) -> Encode:
        width = keys.shape[1] // share
        axes = torch.randn(keys.shape[1], width, generator=torch.Generator().manual_seed(0))
        return lambda rows: rows @ axes.to(rows.device) / width**0.5

    return Codec(fitted, lambda d: 4 * (d // share), both=True)


CODECS = {
    "f32": Codec(lambda _: lambda rows: rows, lambda d: 4 * d),
    "f16": Codec(lambda _: lambda rows: rows.half().float(), lambda d: 2 * d),
    "int8": _scalar(8),
    "int4": _scalar(4),
    "int2": _scalar(2),
    "1 bit": Codec(_signs, lambda d: d / 8),
    "PCA d/2": _pca(2),
    "PCA d/4": _pca(4),
    "PCA d/8": _pca(8),
    "random d/4": _random(4),
}


class EncodedMemory(LocalMemory):
    """A memory whose keys, and queries where they are rotated, go through a codec."""

    def __init__(self, memory: LocalMemory, codec: Codec) -> None:
        encoders = [codec.fitted(keys) for keys in memory.keys]
        encoded = [encode(keys) for encode, keys in zip(encoders, memory.keys, strict=True)]
        super().__init__(encoded, memory.values, memory.gammas, memory.setting)
        self._encoders = encoders if codec.both else None
        self.elapsed_s, self.looked_up = 0.0, 0

    @override
    def neighbours(
        self, layer: int, queries: Tensor, excluded: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        started = time.perf_counter()
        if self._encoders is not None:
            queries = self._encoders[layer](queries)
        found = super().neighbours(layer, queries, excluded)
        self.elapsed_s += time.perf_counter() - started
        self.looked_up += len(queries)
        return found


def compression_rows(study: Study, _part: str) -> Iterator[Row]:
    """Codes of keys, compared by their own distances (nothing is rescored), and of values."""
    for method in BOTH:
        exact = fitted_memory(study, preset_setting(method))
        width = exact.keys[0].shape[1]
        for name, codec in CODECS.items():
            memory = EncodedMemory(exact, codec)
            row = changes(study, memory, "test", f"{method} {name}")
            cost = {
                "bytes_per_key": codec.bytes_per_key(width),
                "us_per_lookup": 1e6 * memory.elapsed_s / memory.looked_up,
            }
            yield {"method": method, "keys": name, "values": "f32", **cost, **row}
        for bits in (8, 4, 2):
            values = [_scalar(bits).fitted(v)(v) for v in exact.values]
            coded = LocalMemory(exact.keys, values, exact.gammas, exact.setting)
            row = changes(study, coded, "test", f"{method} values int{bits}")
            yield {"method": method, "keys": "f32", "values": f"int{bits}", **row}


Judge = Callable[[Tensor, Batch], Tensor]
"""Which proposed labels [B, S] to keep, as [B, S] bool; e.g. a reward model, a test, a person."""


@dataclass(frozen=True, slots=True)
class Labels:
    """Makes labels of the model's own logits.

    Attributes:
        proposed: of logits [B, S, V]: labels [B, S], and which are kept.

    """

    proposed: Callable[[Tensor, Batch], tuple[Tensor, Tensor]]

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Nats [B, S] of the labels, as model_runner.texts.token_nll of the truth; 0 where nothing is kept."""
        labels, kept = self.proposed(logits.detach(), batch)
        nll = F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), reduction="none"
        ).view_as(labels)
        return nll.where(kept & batch.predicts, 0.0)


def argmax_above(confidence: float) -> Labels:
    """The likeliest token, where its probability is at least this."""

    def proposed(logits: Tensor, _batch: Batch) -> tuple[Tensor, Tensor]:
        best = logits.softmax(-1).max(-1)
        return best.indices, best.values >= confidence

    return Labels(proposed)


def self_consistent(draws: int, agreeing: int) -> Labels:
    """The token that most of several draws give, where so many agree."""

    def proposed(logits: Tensor, _batch: Batch) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        flat = logits.softmax(-1).flatten(0, 1).cpu()
        drawn = torch.multinomial(flat, draws, replacement=True, generator=generator)
        most = drawn.mode(dim=1).values
        votes = (drawn == most[:, None]).sum(1)
        shape = logits.shape[:2]
        both = most.view(shape), (votes >= agreeing).view(shape)
        return both[0].to(logits.device), both[1].to(logits.device)

    return Labels(proposed)


def judged(judge: Judge) -> Labels:
    """The likeliest token, where a judge accepts it."""

    def proposed(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        best = logits.argmax(-1)
        return best, judge(best, batch)

    return Labels(proposed)


def knows_the_truth(labels: Tensor, batch: Batch) -> Tensor:
    """The judge that cannot be beaten: it accepts what the text says."""
    return labels == F.pad(batch.input_ids[:, 1:], (0, 1))


LABELS: dict[str, Labels | None] = {
    "truth": None,
    "argmax": argmax_above(0.0),
    "argmax, p >= 0.5": argmax_above(0.5),
    "argmax, p >= 0.9": argmax_above(0.9),
    "4 of 5 draws agree": self_consistent(5, 4),
    "argmax, perfect judge": judged(knows_the_truth),
}


def pseudo_label_rows(study: Study, _part: str) -> Iterator[Row]:
    """Memories whose gradients are of labels that the model proposes itself."""
    for name, labels in LABELS.items():
        traces = study.traces()
        if labels is not None:
            traces = collect(study.loaded, study.texts.reference, study.progress, loss=labels.loss)
        kept = _labelled(traces)
        for method in BOTH:
            setting = preset_setting(method)
            values = values_of(traces, setting.recipe, traces.norms(kept))
            memory = LocalMemory(
                [k[kept] for k in traces.keys],
                [v[kept] for v in values],
                gammas_at(study.medians(), setting.lambda0),
                setting,
            )
            names = {"method": method, "labels": name, "entries": len(kept)}
            yield {**names, **changes(study, memory, "test", f"{method}, {name}")}


def _labelled(traces: Traces) -> Tensor:
    """Rows with a label: others have no loss of their own, so that nothing is stored of them."""
    return (traces.nll > 0).nonzero().flatten()


class PartOfTheChange:
    """A policy that lets through a part of what a logit-delta memory changes in the assignment.

    Parts: `choice`: the memory's experts and proportions, with the total weight of the model's own; `weights`: the
    model's own experts, weighed as the memory would; `total`: the model's own experts and proportions at the memory's
    total weight.
    """

    def __init__(self, memory: LocalMemory, part: str) -> None:
        self._memory, self._part = memory, part

    def __call__(self, call: RouterCall) -> Assignment | Logits | None:
        """The model's own routing, with that part changed."""
        reply = self._memory(call)
        if not isinstance(reply, Logits) or self._part == "all":
            return reply
        found = family_assignment(call.site, reply.router_logits, (call.router_input,))
        own, weights = call.weights.float(), found.weights.float()
        own_total, total = own.sum(1, keepdim=True), weights.sum(1, keepdim=True)
        if self._part == "total":
            return Assignment(own * total / own_total, call.experts)
        if self._part == "choice":
            return Assignment(weights * own_total / total, found.experts)
        return Assignment(self._weighed(call, reply.router_logits) * own_total, call.experts)

    def _weighed(self, call: RouterCall, logits: Tensor) -> Tensor:
        """Shares [T, k] of the model's own experts: its own, times exp of the change of their logits."""
        moved = (logits - call.router_logits).gather(1, call.experts).float()
        shares = call.weights.float() * torch.exp(moved - moved.amax(1, keepdim=True))
        return shares / shares.sum(1, keepdim=True)


PARTS = ("all", "choice", "weights", "total")


def source_rows(study: Study, _part: str) -> Iterator[Row]:
    """Expert choice, weights among the chosen, or total mass: each let through alone."""
    memory = fitted_memory(study, preset_setting("recommended"))
    for part in PARTS:
        policy = PartOfTheChange(memory, part)
        yield {"changed": part, **changes(study, policy, "test", f"only {part}")}
    for control in ("mean delta", "shuffled"):
        values = [_without_content(v, control) for v in memory.values]
        other = LocalMemory(memory.keys, values, memory.gammas, memory.setting)
        yield {"changed": control, **changes(study, other, "test", control)}


def _without_content(values: Tensor, control: str) -> Tensor:
    if control == "shuffled":
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
        return values[order]
    return values.mean(0, keepdim=True).expand_as(values)


EXPERIMENTS = (
    Experiment(
        "source",
        "Where does the gain come from: which experts run, how they are weighed, or their total weight?",
        source_rows,
    ),
    Experiment(
        "compression",
        "How much can keys and values be quantized or reduced before the routing suffers?",
        compression_rows,
    ),
    Experiment(
        "pseudo-labels",
        "Can a memory be built without ground truth, from what the model itself would say?",
        pseudo_label_rows,
    ),
)

"""A learned key metric: a linear map per layer in which near means that the same step helps.

Gradient descent on what a memory does (metric learning for kernel regression, Weinberger and Tesauro, 2007): of the
reference's tokens, the step that the others' entries would give, leaving out the own example, is to be its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from model_runner.experiments.arms import Fitted, Timed, fitted_memory, preset_setting
from model_runner.experiments.local import LocalMemory, Setting, Traces
from model_runner.experiments.study import Study


@dataclass(frozen=True, slots=True)
class Learning:
    """How a map [d, dimension] is learnt: Adam, on `queries` tokens against `keys` others per step."""

    dimension: int = 64
    steps: int = 120
    queries: int = 512
    keys: int = 4096
    rate: float = 0.02

    def learnt(
        self, inputs: Tensor, steps: Tensor, owners: Tensor, seed: int
    ) -> tuple[Tensor, float]:
        """The map, by which the bandwidth is 1, and s0 among all n entries.

        inputs [n, d], centred; steps [n, N] of length 1; owners [n]: the example of each.
        """
        generator = torch.Generator().manual_seed(seed)
        at_once = min(self.queries + self.keys, len(inputs))
        queries = min(self.queries, at_once // 2)
        start = _principal(inputs, self.dimension)
        few = inputs[:: max(1, len(inputs) // 2048)] @ start
        reach = torch.cdist(few[: len(few) // 8 + 1], few[len(few) // 8 + 1 :]).square()
        start = start * math.sqrt(2.5 / float(reach.amin(1).median().clamp_min(1e-9)))
        with torch.enable_grad():
            axes = start.clone().requires_grad_()
            null = torch.tensor(math.log(0.3), requires_grad=True)
            rate = self.rate * float(start.square().mean().sqrt())
            groups = [{"params": [axes], "lr": rate}, {"params": [null], "lr": 0.05}]
            optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
            for _ in range(self.steps):
                picked = torch.randperm(len(inputs), generator=generator)[:at_once]
                asked, there = picked[:queries], picked[queries:]
                distances = torch.cdist(inputs[asked] @ axes, inputs[there] @ axes).square()
                other = owners[asked][:, None] != owners[there][None]
                near = torch.exp(-distances) * other
                guess = near @ steps[there] / (near.sum(1, keepdim=True) + null.exp())
                loss = (guess - steps[asked]).square().sum(1).mean()
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
        share = len(inputs) / (at_once - queries)
        return axes.detach(), float(null.detach().exp()) * share


def _principal(inputs: Tensor, dimension: int) -> Tensor:
    """Axes [d, dimension] of the largest variance, scaled half way to the same variance."""
    values, vectors = torch.linalg.eigh(inputs.T @ inputs / len(inputs))
    values, vectors = values.flip(0)[:dimension], vectors.flip(1)[:, :dimension]
    scaled: Tensor = vectors / (values + 0.05 * values.mean()).pow(0.25)
    return scaled


class MetricMemory(LocalMemory):
    """A logit-delta memory whose keys and queries go through a map, each layer with its own null weight."""

    def __init__(self, memory: LocalMemory, maps: list[tuple[Tensor, Tensor, float]]) -> None:
        """maps: per layer the centre [d], the map [d, m] and s0."""
        keys = [(k - centre) @ axes for k, (centre, axes, _) in zip(memory.keys, maps, strict=True)]
        super().__init__(keys, memory.values, [1.0] * len(keys), memory.setting)
        self._maps, self._plain = maps, memory.setting

    @override
    def neighbours(
        self, layer: int, queries: Tensor, excluded: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        centre, axes, null = self._maps[layer]
        self.setting = replace(self._plain, null_weight=null)  # what the blend of this layer reads
        return super().neighbours(layer, (queries - centre) @ axes, excluded)


def metric_memory(study: Study, setting: Setting, how: Learning) -> MetricMemory:
    """The study's memory in learned metrics."""
    traces, memory = study.traces(), fitted_memory(study, setting)
    owners, maps = _owners(traces), list[tuple[Tensor, Tensor, float]]()
    for layer, (keys, values) in enumerate(zip(memory.keys, memory.values, strict=True)):
        centre = keys.mean(0)
        scale = (keys - centre).square().sum(1).mean().sqrt()
        inputs = (keys - centre) / scale
        axes, null = how.learnt(inputs, F.normalize(values, dim=1), owners, study.seed + layer)
        maps.append((centre, axes / scale, null))
    return MetricMemory(memory, maps)


def _owners(traces: Traces) -> Tensor:
    """[n] number of each row's example."""
    numbers = {ref: n for n, ref in enumerate(dict.fromkeys(w.ref for w in traces.windows))}
    return torch.tensor([numbers[w.ref] for w in traces.windows])[traces.window_of]


# Chosen on dev with the maps of two models (not this report's).
SETTING = replace(preset_setting("recommended"), neighbours=48, step_size=3.2)


@dataclass(frozen=True, slots=True)
class MetricArm:
    """An Arm: the recommended memory, with more neighbours, in a learned metric."""

    name: str = "learned-metric"
    setting: Setting = SETTING
    how: Learning = Learning()

    @contextmanager
    def fit(self, study: Study) -> Iterator[Fitted]:
        """As of Arm."""
        memory = study.once((self.name, self), lambda: metric_memory(study, self.setting, self.how))
        fit_s = study.made_s("traces", "medians", (self.name, self))
        yield Timed(partial(study.score, policy=memory, what=self.name), fit_s, memory.nbytes)


METRIC = MetricArm()

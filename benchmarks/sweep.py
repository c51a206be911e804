"""Chooses the presets' settings on the dev split: `python -m benchmarks.sweep --json FILE`.

Memories are held in this process and searched exactly with torch, so that a setting costs seconds; the demo then runs
the chosen ones through the real sidecar. Nothing here reads the test split.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from model_runner.architectures import Assignment
from model_runner.evaluation.demo import DemoSettings, draw_texts
from model_runner.evaluation.nll import Scores, difference, score
from model_runner.memory_builder.builder import collect_router_inputs
from model_runner.memory_builder.objective import LayerTrace, router_gradients
from model_runner.memory_builder.recipes import (
    PAPER,
    PAPER_V2,
    RECOMMENDED,
    Kind,
    Norm,
    Recipe,
    entry_values,
    step_sizes,
)
from model_runner.models import LoadedModel, load_model
from model_runner.progress import Progress
from model_runner.router_hooks import Logits, RouterCall
from model_runner.small_moe import MODEL_DIR, data_file
from model_runner.texts import Window, batched, make_batch, read_windows, token_nll


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table."""

    recipe: Recipe
    neighbours: int
    lambda0: float
    step_size: float = 1.0
    null_weight: float = 0.5

    def label(self) -> str:
        """Short name of what varies."""
        return (
            f"{self.recipe.kind} {self.recipe.norm} eta={self.recipe.step_size * self.step_size:g} "
            f"K={self.neighbours} lambda0={self.lambda0:g} s0={self.null_weight:g}"
        )


@dataclass(slots=True)
class Traces:
    """What the reference gave: per layer keys [n, d], and the batches' traces."""

    keys: list[Tensor]
    batches: list[tuple[list[LayerTrace], Tensor]]
    norms: list[float]


class LocalMemory:
    """A policy over a memory in RAM, searched exactly."""

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        gammas: Sequence[float],
        setting: Setting,
    ) -> None:
        self._keys, self._values, self._gammas, self._setting = keys, values, gammas, setting
        self._square_norms = [k.square().sum(1) for k in keys]
        self._steps = step_sizes(len(keys), setting.step_size)

    def __call__(self, call: RouterCall) -> Assignment | Logits:
        """The blended routing of one layer."""
        layer, setting = call.site.layer, self._setting
        distances, nearest = squared_distances(
            call.router_input, self._keys[layer], self._square_norms[layer], setting.neighbours
        )
        similarity = torch.exp(-self._gammas[layer] * distances)
        values = self._values[layer][nearest]  # [T, K, N]
        total = similarity.sum(1, keepdim=True)
        if setting.recipe.kind is Kind.LOGIT_DELTA:
            average = torch.einsum("tk,tkn->tn", similarity, values) / (total + setting.null_weight)
            return Logits(call.router_logits + self._steps[layer] * average)
        lambdas = similarity.mean(1, keepdim=True)
        memory = torch.einsum("tk,tkn->tn", similarity / total.clamp_min(1e-30), values)
        if setting.recipe.kind is Kind.LOGITS:
            return Logits((1 - lambdas) * call.router_logits + lambdas * memory)
        own = torch.zeros_like(memory).scatter_add(1, call.experts, call.weights.float())
        blended = (1 - lambdas) * own + lambdas * memory
        width = min(memory.shape[1], (setting.neighbours + 1) * call.site.top_k)
        heaviest = blended.topk(width, dim=1)
        return Assignment(heaviest.values, heaviest.indices)


def squared_distances(
    queries: Tensor, keys: Tensor, square_norms: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k least squared distances [T, k] and their rows."""
    parts = []
    for start in range(0, len(queries), 512):
        part = queries[start : start + 512]
        scores = square_norms - 2 * part @ keys.T + part.square().sum(1, keepdim=True)
        parts.append(scores.topk(k, dim=1, largest=False))
    return torch.cat([p.values for p in parts]).clamp_min(0), torch.cat([p.indices for p in parts])


def collect(loaded: LoadedModel, windows: Sequence[Window], progress: Progress) -> Traces:
    """Traces of the reference, kept in RAM."""
    batches = []
    for group in progress.track(list(batched(windows, 32)), "reference", unit="batches"):
        batch = make_batch(group, loaded.device)

        def loss(logits: Tensor, batch: object = batch) -> Tensor:
            return token_nll(logits, batch).sum()  # type: ignore[arg-type]

        traces = router_gradients(
            loaded.model, batch.input_ids, loss, attention_mask=batch.attention_mask
        )
        batches.append((traces, batch.predicts.flatten().nonzero().flatten()))
    layers = range(loaded.fingerprint.num_layers)
    keys = [
        torch.cat([t[layer].router_input.flatten(0, 1)[kept] for t, kept in batches])
        for layer in layers
    ]
    norms = [
        float(
            torch.cat(
                [t[i].gradient.flatten(0, 1)[kept].norm(dim=1) for t, kept in batches]
            ).median()
        )
        for i in layers
    ]
    return Traces(keys, batches, norms)


def values_of(traces: Traces, recipe: Recipe, num_experts: int) -> list[Tensor]:
    """Dense values [n, N] per layer."""
    found = []
    for layer in range(len(traces.keys)):
        parts = []
        for batch, kept in traces.batches:
            value = entry_values(
                batch[layer], recipe, traces.norms[layer], kept, torch.Generator().manual_seed(0)
            )
            if isinstance(value, Assignment):
                dense = torch.zeros(len(kept), num_experts)
                value = dense.scatter_add(1, value.experts, value.weights)
            parts.append(value.router_logits if isinstance(value, Logits) else value)
        found.append(torch.cat(parts))
    return found


def settings_to_try() -> Iterator[Setting]:
    """The grid: raw and unit assignments, logits, logit deltas."""
    for recipe in (PAPER, PAPER_V2):
        for eta, lambda0 in itertools.product((1.0, 2.0, 3.0, 5.0), (0.8, 0.9)):
            yield Setting(replace(recipe, step_size=eta), 1, lambda0)
    yield Setting(PAPER_V2, 3, 0.9)
    yield Setting(replace(PAPER, norm=Norm.UNIT, step_size=1.0), 1, 0.9)
    for step, lambda0 in itertools.product((1.5, 2.25, 3.0), (0.3, 0.5, 0.7)):
        yield Setting(RECOMMENDED, 32, lambda0, step)
    for k, null_weight in ((8, 0.5), (64, 0.5), (32, 0.25), (32, 1.0)):
        yield Setting(RECOMMENDED, k, 0.5, 2.25, null_weight)


def main() -> None:
    """Runs the grid and prints it, best first by kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(MODEL_DIR))
    parser.add_argument("--seed", type=int, default=0, help="draws the reference windows")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    progress = Progress()
    loaded = load_model(arguments.model)
    texts = draw_texts(loaded.tokenizer, DemoSettings(seed=arguments.seed))
    traces = collect(loaded, texts.reference, progress)
    general = read_windows(data_file("general", "dev"), loaded.tokenizer, 128)
    domains = {"shifted": texts.dev, "in_domain": general[:: max(1, len(general) // 48)][:48]}
    rows = _run(loaded, traces, texts.dev, domains, progress)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    _print(rows)


def _run(
    loaded: LoadedModel,
    traces: Traces,
    calibration: Sequence[Window],
    domains: dict[str, list[Window]],
    progress: Progress,
) -> list[dict[str, object]]:
    medians = median_distances(loaded, traces, calibration)
    plain = {
        name: score(loaded.model, windows, None, progress, what=name, batch_size=32)
        for name, windows in domains.items()
    }
    cache: dict[Recipe, list[Tensor]] = {}
    rows: list[dict[str, object]] = []
    for setting in settings_to_try():
        if setting.recipe not in cache:
            cache[setting.recipe] = values_of(
                traces, setting.recipe, loaded.fingerprint.num_experts
            )
        gammas = [-math.log(setting.lambda0) / m for m in medians]
        memory = LocalMemory(traces.keys, cache[setting.recipe], gammas, setting)
        rows.append(_row(loaded, memory, setting, domains, plain))
        progress.say(f"{setting.label()}: {rows[-1]['shifted']} | {rows[-1]['in_domain']}")
    return rows


def _row(
    loaded: LoadedModel,
    memory: LocalMemory,
    setting: Setting,
    domains: dict[str, list[Window]],
    plain: dict[str, Scores],
) -> dict[str, object]:
    row: dict[str, object] = {"setting": setting.label(), "kind": setting.recipe.kind.value}
    for name, windows in domains.items():
        scores = score(
            loaded.model, windows, memory, Progress(quiet=True), what=name, batch_size=32
        )
        row[name] = asdict(difference(scores, plain[name]))
    return row


def median_distances(loaded: LoadedModel, traces: Traces, windows: Sequence[Window]) -> list[float]:
    """Median squared distance of the windows' router inputs to the nearest key, per layer."""
    inputs = collect_router_inputs(loaded.model, windows, most=1000)
    medians = []
    for layer, keys in enumerate(traces.keys):
        distances, _ = squared_distances(inputs[layer], keys, keys.square().sum(1), 1)
        medians.append(float(distances.median()))
    return medians


def _print(rows: Sequence[dict[str, object]]) -> None:
    table = Table("setting", "shifted dev", "general dev")
    for row in sorted(rows, key=lambda r: (r["kind"], r["shifted"]["delta"])):  # type: ignore[index]
        table.add_row(str(row["setting"]), _change(row["shifted"]), _change(row["in_domain"]))
    Console(width=140).print(table)


def _change(change: object) -> str:
    assert isinstance(change, dict)
    return f"{change['delta']:+.4f} ± {change['se']:.4f}"


if __name__ == "__main__":
    main()

"""Chooses the presets' settings on the dev split: `python -m benchmarks.sweep --json FILE`.

Memories are held in this process and searched exactly with torch, so that a setting costs seconds; the demo then runs
the chosen ones through the real sidecar. Nothing here reads the test split.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from model_runner.evaluation.demo import DemoSettings, draw_texts
from model_runner.evaluation.nll import difference
from model_runner.experiments.local import (
    LocalMemory,
    Setting,
    Traces,
    collect,
    gammas_at,
    median_distances,
    values_of,
)
from model_runner.memory_builder.recipes import PAPER, PAPER_V2, RECOMMENDED, Norm, Recipe
from model_runner.models import LoadedModel, load_model
from model_runner.progress import Progress
from model_runner.scoring import Scores, score
from model_runner.small_moe import MODEL_DIR, data_file
from model_runner.texts import Window, read_windows


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
    medians = median_distances(loaded, traces.keys, calibration)
    plain = {
        name: score(loaded.model, windows, None, progress, what=name, batch_size=32)
        for name, windows in domains.items()
    }
    cache: dict[Recipe, list[Tensor]] = {}
    rows: list[dict[str, object]] = []
    for setting in settings_to_try():
        if setting.recipe not in cache:
            cache[setting.recipe] = values_of(traces, setting.recipe)
        gammas = gammas_at(medians, setting.lambda0)
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

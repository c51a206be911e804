"""What pruning costs the shipped model: `python -m benchmarks.pruning --json FILE [--seed N] [--plot FILE.png]`.

Builds a preset's memory once, as `model-runner demo` does, through a real sidecar, and takes a snapshot of it. Every
policy prunes a fresh copy, which is indexed again and scored: on shifted text for the gain, on general text for
the harm. Gamma stays as it was calibrated on the full memory, or is calibrated anew on the dev text.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from benchmarks.demo_memory import RECOMMENDED, Bench, Inputs, running_bench
from benchmarks.pruning_arms import POLICIES, SHARES, Arm, Pruner, arms
from benchmarks.pruning_report import FULL, Trial, plot, rows_of, table_of
from benchmarks.report import load_average, machine
from model_runner.evaluation.demo import DemoSettings, Texts, draw_texts
from model_runner.memory_builder.recipes import PRESETS
from model_runner.models import load_model
from model_runner.progress import Progress
from model_runner.scoring import Scores
from model_runner.small_moe import MODEL_DIR, data_file
from model_runner.texts import Window, read_windows

SCHEMA = 1
INDEX = "int8"
COPY = "copy"
LENGTH = 128
Split = Literal["dev", "test"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is built, pruned and scored; windows of 128 tokens."""

    seed: int = 0
    split: Split = "test"
    preset: str = RECOMMENDED
    reference_windows: int = 240
    dev_windows: int = 48
    shifted_windows: int = 48
    general_windows: int = 24
    calibration_inputs: int = 1000
    policies: tuple[str, ...] = tuple(POLICIES)
    shares: tuple[float, ...] = SHARES


class Run:
    """The full memory and its pruned copies in one sidecar."""

    def __init__(self, bench: Bench, settings: Settings, texts: Texts, scored: Texts) -> None:
        """`scored`: texts whose `shifted` and `in_domain` windows are scored."""
        self._bench, self._settings, self._texts, self._scored = bench, settings, texts, scored

    def plain(self) -> dict[str, Scores]:
        """Scores of the model alone, by domain."""
        return {
            domain: self._bench.plain(self._scored.of(domain))
            for domain in ("shifted", "in_domain")
        }

    def trials(self) -> Iterator[Trial]:
        """The full memory, then every arm."""
        bench, texts = self._bench, self._texts
        bench.build(FULL, texts.reference, INDEX)
        inputs = bench.inputs(texts.dev, self._settings.calibration_inputs)
        bench.calibrate(FULL, inputs)
        with Pruner(bench.target, FULL, COPY) as pruner:
            size = pruner.size_of(FULL)
            yield Trial(FULL, 1.0, "kept", size, 0.0, self._routed(FULL))
            chosen = arms(self._settings.policies, self._settings.shares)
            for arm in bench.progress.track(chosen, "pruning", "memories"):
                with pruner.copied():
                    yield from self._of_arm(pruner, arm, inputs)

    def _of_arm(self, pruner: Pruner, arm: Arm, inputs: Inputs) -> Iterator[Trial]:
        if arm.by_use:  # what serving the dev text retrieves is what the policy goes by
            self._bench.routed(COPY, self._texts.dev)
        started = time.monotonic()
        pruner.prune(arm)
        elapsed_s, size = time.monotonic() - started, pruner.size_of(COPY)
        yield Trial(arm.policy, arm.share, "kept", size, elapsed_s, self._routed(COPY))
        if arm.recalibrate:
            self._bench.calibrate(COPY, inputs)
            yield Trial(arm.policy, arm.share, "new", size, elapsed_s, self._routed(COPY))

    def _routed(self, memory: str) -> dict[str, Scores]:
        return {
            domain: self._bench.routed(memory, self._scored.of(domain))
            for domain in ("shifted", "in_domain")
        }


def texts_of(tokenizer: Any, settings: Settings) -> tuple[Texts, Texts]:
    """What is built and calibrated with, and what is scored: test windows, or (split "dev") dev windows."""
    sizes = DemoSettings(
        seed=settings.seed,
        length=LENGTH,
        reference_windows=settings.reference_windows,
        dev_windows=settings.dev_windows,
        shifted_test_windows=settings.shifted_windows,
        general_test_windows=settings.general_windows,
    )
    texts = draw_texts(tokenizer, sizes)
    if settings.split == "test":
        return texts, texts
    general = _general_dev(tokenizer, settings)
    return texts, Texts([], [], texts.dev[: settings.shifted_windows], general)


def _general_dev(tokenizer: Any, settings: Settings) -> list[Window]:
    windows = read_windows(data_file("general", "dev"), tokenizer, LENGTH)
    full = [window for window in windows if len(window.token_ids) == LENGTH]
    return random.Random(settings.seed).sample(full, min(settings.general_windows, len(full)))


def run(settings: Settings) -> dict[str, Any]:
    """Everything that the JSON file holds."""
    started = time.monotonic()
    loaded = load_model(str(MODEL_DIR), device="cpu")
    with running_bench(loaded, Progress(), settings.preset) as bench:
        made = Run(bench, settings, *texts_of(loaded.tokenizer, settings))
        plain, trials = made.plain(), []
        for trial in made.trials():
            trials.append(trial)
            bench.progress.say(f"{trial.label()}: NLL of B {trial.scores['shifted'].nll:.4f}")
    return {
        "schema": SCHEMA,
        "settings": asdict(settings),
        "rows": rows_of(trials, plain),
        "machine": machine(),
        "load_average": load_average(),
        "elapsed_s": round(time.monotonic() - started, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table, writes the JSON file and, when asked, a plot."""
    sizes = Settings()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="the numbers go here")
    parser.add_argument("--plot", type=Path, help="a picture of the shares goes here, e.g. a.png")
    parser.add_argument("--seed", type=int, default=0, help="draws the windows")
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="scored windows")
    parser.add_argument("--preset", choices=PRESETS, default=sizes.preset)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=sizes.policies)
    parser.add_argument("--shares", nargs="+", type=float, default=sizes.shares)
    for name in ("reference", "shifted", "general"):
        default = getattr(sizes, f"{name}_windows")
        parser.add_argument(f"--{name}-windows", type=int, default=default)
    given = vars(parser.parse_args(arguments))
    path, picture = given.pop("json"), given.pop("plot")
    torch.set_num_threads(1)
    for name in ("policies", "shares"):
        given[name] = tuple(given[name])
    results = run(Settings(**given))
    path.write_text(json.dumps(results, indent=1) + "\n")
    Console(width=170).print(table_of(results["rows"]))
    if picture is not None:
        plot(results["rows"], picture)


if __name__ == "__main__":
    main()

"""Learning online on the shipped model: `python -m benchmarks.prequential --json FILE`.

The shifted test text comes in example by example. Each is scored with the plain model and with the memory as it is, and
only then learnt, through a real sidecar: no score has seen its own example. The memory starts empty; its bandwidths are
calibrated inside it (leave-one-example-out) each time the number of examples has doubled.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from knnmoe.client import AdminClient
from rich.console import Console
from rich.table import Table

from model_runner.evaluation.nll import difference
from model_runner.memory_builder.learner import KnownTokens, OnlineLearner
from model_runner.memory_builder.recipes import PRESETS
from model_runner.models import LoadedModel, load_model
from model_runner.progress import Progress
from model_runner.router_client import OnError, RouterClient
from model_runner.routing_policy import RetrievalPolicy
from model_runner.scoring import Scores, score
from model_runner.sidecar import running_sidecar
from model_runner.small_moe import MODEL_DIR, data_file
from model_runner.texts import Window, read_windows

SCHEMA = 1
MEMORY = "stream"
QUIET = Progress(quiet=True)


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """What comes in: the first `length` tokens of each of `examples` chapters, in an order drawn by the seed."""

    preset: str = "recommended"
    seed: int = 0
    examples: int = 160
    length: int = 128
    skip_known: float | None = None


@dataclass(frozen=True, slots=True)
class Stream:
    """Scores of every example, in the order of the stream, and the entries that were written."""

    plain: Scores
    routed: Scores
    entries: int
    elapsed_s: float


def draw_stream(tokenizer: Any, settings: StreamSettings) -> list[Window]:
    """The first full window of each chapter of the shifted test split."""
    windows = read_windows(data_file("shifted", "test"), tokenizer, settings.length)
    first = [w for w in windows if w.offset == 0 and len(w.token_ids) == settings.length]
    most = min(settings.examples, len(first))
    return random.Random(f"{settings.seed}/stream").sample(first, most)


def run_stream(loaded: LoadedModel, settings: StreamSettings, progress: Progress) -> Stream:
    """One pass over the stream, through a sidecar of its own."""
    windows = draw_stream(loaded.tokenizer, settings)
    preset, started = PRESETS[settings.preset], time.monotonic()
    plain, routed, entries = [], [], 0
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        target = stack.enter_context(running_sidecar(directory / "data", directory / "log"))
        client = stack.enter_context(AdminClient(target))
        layers = loaded.fingerprint.num_layers
        client.find_or_create(MEMORY, loaded.fingerprint.message(), preset.settings(layers))
        router = stack.enter_context(
            RouterClient(target, MEMORY, loaded.fingerprint, timeout_s=60, on_error=OnError.RAISE)
        )
        policy, keep = RetrievalPolicy(router), None
        if settings.skip_known is not None:
            keep = KnownTokens(router, settings.skip_known).keep
        learner = stack.enter_context(
            OnlineLearner(loaded.model, loaded.fingerprint, client, MEMORY, keep=keep)
        )
        for number, window in enumerate(progress.track(windows, "learning", "examples"), 1):
            plain.append(score(loaded.model, [window], None, QUIET, what=""))
            routed.append(score(loaded.model, [window], policy, QUIET, what=""))
            entries += learner.learn([window]).entries
            if number >= 2 and number & (number - 1) == 0:
                client.calibrate(MEMORY, preset.lambda0)
    return Stream(_joined(plain), _joined(routed), entries, time.monotonic() - started)


def _joined(scores: Sequence[Scores]) -> Scores:
    return Scores(
        np.concatenate([s.nll_sums for s in scores]),
        np.concatenate([s.targets for s in scores]),
        tuple(ref for s in scores for ref in s.examples),
    )


def third(scores: Scores, number: int) -> Scores:
    """The first, second or last third (0, 1, 2) of the examples."""
    every = len(scores.examples)
    rows = slice(number * every // 3, (number + 1) * every // 3)
    return Scores(scores.nll_sums[rows], scores.targets[rows], scores.examples[rows])


def results_of(stream: Stream, settings: StreamSettings) -> dict[str, Any]:
    """What the JSON file holds: changes of NLL per token against the plain model, negative is better."""
    parts = []
    for number in range(3):
        plain, routed = third(stream.plain, number), third(stream.routed, number)
        parts.append({"nll_plain": plain.nll, **asdict(difference(routed, plain))})
    return {
        "schema": SCHEMA,
        "settings": asdict(settings),
        "thirds": parts,
        "all": asdict(difference(stream.routed, stream.plain)),
        "entries": stream.entries,
        "elapsed_s": round(stream.elapsed_s, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the stream, prints a table, writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="the numbers go here")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="recommended")
    parser.add_argument("--seed", type=int, default=0, help="draws the order")
    parser.add_argument("--examples", type=int, default=160, help="at most 160")
    parser.add_argument("--skip-known", type=float, help="as in model-runner learn")
    given = parser.parse_args(arguments)
    settings = StreamSettings(given.preset, given.seed, given.examples, skip_known=given.skip_known)
    loaded = load_model(str(MODEL_DIR), device="cpu")
    results = results_of(run_stream(loaded, settings, Progress()), settings)
    given.json.write_text(json.dumps(results, indent=2) + "\n")
    table = Table("third", "NLL, plain", "change")
    for number, part in enumerate(results["thirds"], 1):
        change = f"{part['delta']:+.4f} ± {part['se']:.4f}"
        table.add_row(str(number), f"{part['nll_plain']:.4f}", change)
    console = Console()
    console.print(table)
    console.print(f"{results['entries']} entries, {results['elapsed_s']} s", highlight=False)


if __name__ == "__main__":
    main()

"""What a memory costs to make next to training: `python -m benchmarks.build --json FILE`.

The shipped small model and the same windows for all: building a memory of each preset through a real sidecar (with what
of it is upload), indexing it, and one epoch of full fine-tuning with AdamW on a copy of the model. They take turns.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from knnmoe.client import AdminClient
from rich import box
from rich.table import Table

from benchmarks import report
from benchmarks.demo_memory import BATCH_SIZE, running_bench
from model_runner.evaluation.demo import DemoSettings, draw_texts
from model_runner.memory_builder.builder import MemoryBuilder, Target
from model_runner.memory_builder.recipes import PRESETS
from model_runner.models import LoadedModel, load_model
from model_runner.progress import Progress
from model_runner.small_moe import MODEL_DIR
from model_runner.texts import Window, batched, make_batch, token_nll

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FINE_TUNING = "one epoch of full fine-tuning"
LEARNING_RATE = 1e-4
Row = dict[str, Any]
Seconds = dict[str, float]  # by what was done


@dataclass(slots=True)
class Work:
    """The same windows for every way to learn from them."""

    loaded: LoadedModel
    windows: Sequence[Window]
    target: str
    progress: Progress
    presets: Sequence[str] = tuple(sorted(PRESETS))

    def ways(self) -> list[Callable[[int], Seconds]]:
        """Each takes the number of the round."""
        built = [self._builder(name) for name in self.presets]
        return [*built, lambda _: self.fine_tuned()]

    def _builder(self, preset: str) -> Callable[[int], Seconds]:
        return lambda number: self.built(preset, number)

    def built(self, preset: str, number: int) -> Seconds:
        """A new memory, filled, indexed, and gone."""
        model, chosen, name = self.loaded.fingerprint, PRESETS[preset], f"{preset}-{number}"
        with AdminClient(self.target) as client:
            client.find_or_create(name, model.message(), chosen.settings(model.num_layers))
            builder = MemoryBuilder(self.loaded.model, model, client, batch_size=BATCH_SIZE)
            done = builder.build(self.windows, [Target(name, chosen.recipe)], self.progress)
            started = time.monotonic()
            client.optimize(name)
            indexed_s = time.monotonic() - started
            client.delete(name)
        return {
            f"build ({preset})": done.elapsed_s,
            f"of which upload ({preset})": done.upload_s,
            f"index ({preset})": indexed_s,
        }

    def fine_tuned(self) -> Seconds:
        """Forward, backward and a step of AdamW for every batch, on a copy of the model."""
        model = copy.deepcopy(self.loaded.model).train().requires_grad_()
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
        started = time.monotonic()
        for group in batched(self.windows, BATCH_SIZE):
            batch = make_batch(group, self.loaded.device)
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            loss = token_nll(logits, batch).sum() / batch.predicts.sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {FINE_TUNING: time.monotonic() - started}


def rows_of(found: dict[str, list[float]], tokens: int) -> list[Row]:
    """A row per piece of work: median seconds, tokens a second, and its share of an epoch in the same round."""
    epochs = np.array(found[FINE_TUNING])
    return [
        {
            "work": work,
            "p50_s": round(float(np.median(seconds)), 3),
            "tokens_per_s": round(tokens / float(np.median(seconds)), 1),
            "of_an_epoch": round(float(np.median(np.array(seconds) / epochs)), 4),
            "n": len(seconds),
        }
        for work, seconds in found.items()
    ]


def run(
    windows: int,
    rounds: int,
    seed: int,
    progress: Progress,
    presets: Sequence[str] = tuple(sorted(PRESETS)),
) -> dict[str, Any]:
    """Every way in every round, in a shuffled order; the document of a run."""
    load = report.load_average()
    loaded = load_model(str(MODEL_DIR), device="cpu")
    drawn = draw_texts(loaded.tokenizer, DemoSettings(seed=seed, reference_windows=windows))
    tokens = sum(len(window.token_ids) for window in drawn.reference)
    found: dict[str, list[float]] = {}
    rng = np.random.default_rng(seed)
    with running_bench(loaded, progress) as bench:
        work = Work(loaded, drawn.reference, bench.target, progress, presets)
        work.fine_tuned()  # warms up
        for number in range(rounds):
            for way in rng.permutation(np.array(work.ways(), object)):
                for name, seconds in way(number).items():
                    found.setdefault(name, []).append(seconds)
    rows = rows_of(dict(sorted(found.items())), tokens)
    settings = {"windows": windows, "rounds": rounds, "tokens": tokens, "seed": seed}
    ratios = {row["work"]: row["of_an_epoch"] for row in rows if row["work"] != FINE_TUNING}
    return report.document("build", settings, rows, ratios, load)


def table(rows: Sequence[Row]) -> Table:
    """A row per piece of work."""
    made = Table(title="Learning from the same windows", box=box.SIMPLE)
    made.add_column("work", no_wrap=True)
    columns = ("p50_s", "tokens_per_s", "of_an_epoch", "n")
    for column in columns:
        made.add_column(column, justify="right")
    for row in rows:
        made.add_row(row["work"], *(str(row[column]) for column in columns))
    return made


def plot(rows: Sequence[Row]) -> Figure:
    """Tokens a second of each piece of work."""
    figure = report.new_figure(7, 0.8 + 0.35 * len(rows))
    axes = figure.add_subplot()
    bars = axes.barh([row["work"] for row in rows], [row["tokens_per_s"] for row in rows])
    axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    axes.set(xlabel="tokens a second", xscale="log")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    return figure


def main(
    json_file: report.JsonFile,
    windows: Annotated[int, typer.Option(min=1, help="Reference windows.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every way.")] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="The short set: 128 windows, two rounds.")
    ] = False,
    plot_file: report.PlotFile = None,
    seed: report.Seed = 0,
    quiet: report.Quiet = False,
) -> None:
    """Measure building and uploading a memory next to an epoch of full fine-tuning."""
    size = (128, 2) if quick else (windows, rounds)
    made = run(*size, seed, Progress(quiet=quiet))
    report.publish(made, report.Files(json_file, plot_file, quiet), table, plot)


if __name__ == "__main__":
    typer.run(main)

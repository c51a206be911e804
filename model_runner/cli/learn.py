"""`model-runner learn`: from options to calls."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from knnmoe.client import AdminClient, require_same_model
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1.routing_pb2 import MemoryDescription
from knnmoe.v1.types_pb2 import SIMILARITY_RBF

from model_runner.cli.evaluate import require_writable
from model_runner.evaluation.nll import score
from model_runner.memory_builder.builder import Keep
from model_runner.memory_builder.learner import KnownTokens, Learnt, OnlineLearner, recipe_of
from model_runner.memory_builder.recipes import Norm, Recipe
from model_runner.models import LoadedModel, load_model, window_length
from model_runner.presets import PRESETS
from model_runner.progress import Progress
from model_runner.router_client import OnError, RouterClient
from model_runner.routing_policy import RetrievalPolicy
from model_runner.texts import Window, read_windows

LOOKUP_TIMEOUT_S = 60.0
DURABILITIES = {"process": pb.DURABILITY_PROCESS, "fsync": pb.DURABILITY_FSYNC}
QUIET = Progress(quiet=True)


@dataclass(frozen=True, slots=True)
class LearnOptions:
    """Options of `model-runner learn`, as given."""

    file: Path
    memory: str
    model: str
    target: str
    preset: str | None
    step_size: float | None
    norm: str | None
    window: int | None
    batch_size: int
    durability: str
    skip_known: float | None
    again: bool
    evaluate: bool
    json_file: Path | None
    device: str
    dtype: str


@dataclass(frozen=True, slots=True)
class NllSums:
    """Nats over an example's tokens: without retrieval, with it before and after learning the example."""

    off: float
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class ExampleReport:
    """One learnt example; `nll_sums` only with --evaluate."""

    example: str
    tokens: int
    entries: int
    known: int
    was_there: bool
    nll_sums: NllSums | None


def run_learn(options: LearnOptions, progress: Progress) -> None:
    """Learns a file example by example; a line on stdout for each."""
    require_writable("--json", options.json_file)
    started = time.monotonic()
    with ExitStack() as stack:
        client = stack.enter_context(AdminClient(options.target))
        # What is not there is noticed before the model is loaded, bad text before anything is written.
        description = client.describe(options.memory)
        loaded = load_model(options.model, device=options.device, dtype=options.dtype)
        require_same_model(description, loaded.fingerprint.message())
        length = window_length(loaded.model, options.window)
        windows = read_windows(options.file, loaded.tokenizer, length)
        reader = stack.enter_context(_raising_client(loaded, options))
        learner = stack.enter_context(
            OnlineLearner(
                loaded.model,
                loaded.fingerprint,
                client,
                options.memory,
                recipe=_recipe(options, description),
                reference=windows,
                keep=_keep(options, reader),
                durability=DURABILITIES[options.durability],
                batch_size=options.batch_size,
            )
        )
        run = _Run(loaded, learner, RetrievalPolicy(reader), options)
        examples = list(_by_example(windows))
        reports = [run.one(group) for group in progress.track(examples, "learning", "examples")]
    _finish(reports, options, progress, time.monotonic() - started)
    if _never_calibrated(description):
        progress.say(
            f"{options.memory} was never calibrated, so it hardly speaks: "
            f"model-runner calibrate --memory {options.memory}"
        )


@dataclass(frozen=True, slots=True)
class _Run:
    loaded: LoadedModel
    learner: OnlineLearner
    policy: RetrievalPolicy
    options: LearnOptions

    def one(self, windows: Sequence[Window]) -> ExampleReport:
        """Learns one example and says so."""
        was_there = not self.options.again and self.learner.is_there(windows)
        evaluate = self.options.evaluate
        off = self._nll_sum(windows, None) if evaluate else 0.0
        before = self._nll_sum(windows, self.policy) if evaluate else 0.0
        learnt = Learnt(0, 0) if was_there else self.learner.learn(windows)
        after = self._nll_sum(windows, self.policy) if evaluate else 0.0
        report = ExampleReport(
            windows[0].ref.example,
            sum(window.targets for window in windows),
            learnt.entries,
            learnt.known,
            was_there,
            NllSums(off, before, after) if evaluate else None,
        )
        sys.stdout.write(_line(report) + "\n")
        sys.stdout.flush()
        return report

    def _nll_sum(self, windows: Sequence[Window], policy: RetrievalPolicy | None) -> float:
        scores = score(
            self.loaded.model,
            windows,
            policy,
            QUIET,
            what="",
            batch_size=self.options.batch_size,
        )
        return float(scores.nll_sums.sum())


def _raising_client(loaded: LoadedModel, options: LearnOptions) -> RouterClient:
    return RouterClient(
        options.target,
        options.memory,
        loaded.fingerprint,
        timeout_s=LOOKUP_TIMEOUT_S,
        on_error=OnError.RAISE,
    )


def _recipe(options: LearnOptions, memory: MemoryDescription) -> Recipe:
    recipe = recipe_of(options.memory, memory.settings)
    if options.preset is not None:
        recipe = PRESETS[options.preset].recipe
    if options.norm is not None:
        recipe = replace(recipe, norm=Norm(options.norm))
    if options.step_size is not None:
        recipe = replace(recipe, step_size=options.step_size)
    return recipe


def _keep(options: LearnOptions, reader: RouterClient) -> Keep | None:
    if options.skip_known is None:
        return None
    return KnownTokens(reader, options.skip_known).keep


def _by_example(windows: Sequence[Window]) -> Iterator[list[Window]]:
    groups: dict[Any, list[Window]] = {}
    for window in windows:
        groups.setdefault(window.ref, []).append(window)
    yield from groups.values()


def _never_calibrated(memory: MemoryDescription) -> bool:
    """A new memory's gamma is 1 for every layer: nothing in hundreds of dimensions is that close."""
    settings = memory.settings
    return settings.similarity == SIMILARITY_RBF and all(gamma == 1 for gamma in settings.gamma)


def _line(report: ExampleReport) -> str:
    done = f"wrote {report.entries} entries"
    if report.known:
        done += f", left out {report.known} that are known"
    if report.was_there:
        done = "was there already"
    line = f"{report.example}: {done}"
    if report.nll_sums is not None:
        line += f"; NLL {_means(report.nll_sums, report.tokens)}"
    return line


def _means(sums: NllSums, tokens: int) -> str:
    off, before, after = (total / tokens for total in (sums.off, sums.before, sums.after))
    return f"{off:.4f} off, {before:.4f} before, {after:.4f} after"


def _finish(
    reports: Sequence[ExampleReport], options: LearnOptions, progress: Progress, elapsed_s: float
) -> None:
    entries = sum(report.entries for report in reports)
    there = sum(report.was_there for report in reports)
    progress.say(
        f"{options.memory}: wrote {entries} entries in {elapsed_s:.0f} s; "
        f"{there} of {len(reports)} examples were there already"
    )
    sums = [report.nll_sums for report in reports if report.nll_sums is not None]
    if sums:
        total = NllSums(*(sum(column) for column in zip(*map(_columns, sums), strict=True)))
        tokens = sum(report.tokens for report in reports)
        sys.stdout.write(f"all: {tokens} tokens; NLL {_means(total, tokens)}\n")
    if options.json_file is not None:
        rows = {"memory": options.memory, "examples": [asdict(report) for report in reports]}
        options.json_file.write_text(json.dumps(rows, indent=2) + "\n")


def _columns(sums: NllSums) -> tuple[float, float, float]:
    return sums.off, sums.before, sums.after

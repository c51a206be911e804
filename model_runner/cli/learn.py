"""`model-runner learn`: text into a memory that is serving, example by example.

Imports of torch and gRPC stand inside functions: --help does not wait for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from model_runner.cli import options
from model_runner.progress import Progress

if TYPE_CHECKING:
    from knnmoe.v1.routing_pb2 import MemoryDescription

    from model_runner.memory_builder.builder import Keep
    from model_runner.memory_builder.learner import ExampleReport, NllSums, OnlineLearner
    from model_runner.retrieval import OpenMemory
    from model_runner.texts import Window


def learn(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help=f"Text to learn: {options.TEXT_FILE}",
            dir_okay=False,
            callback=options.existing,
            show_default=False,
        ),
    ],
    memory: options.Memory,
    model: options.Model = options.DEFAULT_MODEL,
    target: options.Target = options.DEFAULT_TARGET,
    preset: Annotated[
        options.Preset | None,
        typer.Option(help="Recipe of the values. Default: that of the memory, which you want."),
    ] = None,
    step_size: Annotated[
        float | None,
        typer.Option(min=0, help="eta of the stored step, when the memory was built with another."),
    ] = None,
    norm: Annotated[
        options.Norm | None,
        typer.Option(help="Length of a step, when the memory was built with another."),
    ] = None,
    window: options.Window = None,
    batch_size: options.BatchSize = 8,
    durability: options.Durability = "process",
    skip_known: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Leave out tokens whose nearest key in the memory has a similarity of at least this, layer by "
            "layer, to keep the memory small. Default: write all.",
        ),
    ] = None,
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help="Write examples that are there already once more, e.g. with another --step-size.",
        ),
    ] = False,
    snippets: options.Snippets = True,
    replace_source: options.ReplaceSource = False,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="Score each example without the memory, and with it before and after learning the example. "
            "The last reads the example's own entries (no leave-one-out): it shows that it was learnt, "
            "not that other text gains.",
        ),
    ] = False,
    retrieval: options.RetrievalOption = "auto",
    replica_memory: options.ReplicaMemory = None,
    replica_keys: options.ReplicaKeysOption = "f32",
    first_pass: options.FirstPassOption = "auto",
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", help=f"Also write a report per example to this file; {options.JSON_FILE}"
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Add text to a memory that is serving, example by example, each in the answer to the next lookup.

    Values are made as the memory's preset makes them, from the frozen model. Examples that are there already (same file
    name and text) are skipped, so that a run that was cut off goes on where it stopped; an `id` that is there with
    other text is refused unless the new file takes the old one's place. For example:

        model-runner learn new-cases.jsonl --memory law

        model-runner learn new-cases.jsonl --memory law --evaluate --json report.json
    """
    from knnmoe.client import AdminClient, require_same_model

    from model_runner.memory_builder.entries import forget_other_texts, windows_as_known
    from model_runner.memory_builder.learner import DURABILITIES, OnlineLearner
    from model_runner.memory_builder.recipes import PRESETS, recipe_of
    from model_runner.models import window_length
    from model_runner.retrieval import open_retriever
    from model_runner.router_client import OnError
    from model_runner.routing_policy import RetrievalPolicy
    from model_runner.scoring import score
    from model_runner.texts import distinct, read_windows

    options.require_writable("--json", json_file)
    how = options.retrieval(retrieval, replica_memory, replica_keys, first_pass)
    out = options.words_beside(json_file)
    progress, started = Progress(quiet=quiet), time.monotonic()
    with ExitStack() as stack:
        client = stack.enter_context(AdminClient(target))
        # What is not there is noticed before the model is loaded, bad text before anything is written.
        description = client.describe(memory)
        loaded = options.load(model, device, dtype)
        require_same_model(description, loaded.fingerprint.message())
        read = read_windows(file, loaded.tokenizer, window_length(loaded.model, window))
        windows = distinct(read)
        if not replace_source:
            windows = windows_as_known(client, memory, windows)
        opened: OpenMemory | None = None
        if evaluate or skip_known is not None:  # else nothing is looked up
            where = (target, memory, loaded.fingerprint, loaded.device, how, progress)
            reading = open_retriever(
                *where, timeout_s=options.LOOKUP_TIMEOUT_S, on_error=OnError.RAISE
            )
            opened = stack.enter_context(reading)
        recipe = (
            recipe_of(memory, description.settings) if preset is None else PRESETS[preset].recipe
        )
        learner = stack.enter_context(
            OnlineLearner(
                loaded.model,
                loaded.fingerprint,
                client,
                memory,
                recipe=recipe.altered(norm, step_size),
                reference=windows,
                keep=_keep(opened, skip_known),
                catch_up=None if opened is None else opened.catch_up,
                durability=DURABILITIES[durability],
                batch_size=batch_size,
                tokenizer=loaded.tokenizer if snippets else None,
            )
        )
        policy = None if opened is None else RetrievalPolicy(opened.retriever)

        def nll_sum(windows: Sequence[Window], retrieving: bool) -> float:
            given, unseen = policy if retrieving else None, Progress(quiet=True)
            scores = score(loaded.model, windows, given, unseen, what="", batch_size=batch_size)
            return float(scores.nll_sums.sum())

        examples = [list(group) for _, group in groupby(windows, key=lambda w: w.ref)]
        reports = [
            _learn_example(group, learner, again, nll_sum if evaluate else None, out)
            for group in progress.track(examples, "learning", "examples")
        ]
        if replace_source:
            gone = forget_other_texts(client, memory, windows, DURABILITIES[durability])
            progress.say(f"{gone} entries of other text of {windows[0].ref.source} were deleted")
    entries = sum(report.entries for report in reports)
    there = sum(report.was_there for report in reports)
    progress.say(
        f"{memory}: wrote {entries} entries in {time.monotonic() - started:.0f} s; "
        f"{there} of {len(reports)} examples were there already"
    )
    if len(read) > len(windows):
        progress.say(f"{len(read) - len(windows)} windows repeat others of the file")
    _print_all(reports, out)
    rows = {"memory": memory, "examples": [asdict(report) for report in reports]}
    options.write_json(json_file, rows)
    if _never_calibrated(description):
        progress.say(
            f"{memory} was never calibrated, so it hardly speaks: "
            f"model-runner calibrate --memory {memory}"
        )


def _keep(opened: OpenMemory | None, skip_known: float | None) -> Keep | None:
    """Which entries are written; None: all."""
    from model_runner.memory_builder.learner import KnownTokens

    if opened is None or skip_known is None:
        return None
    return KnownTokens(opened.retriever, skip_known).keep


def _learn_example(
    windows: Sequence[Window],
    learner: OnlineLearner,
    again: bool,
    nll_sum: Callable[[Sequence[Window], bool], float] | None,
    out: TextIO,
) -> ExampleReport:
    """Learns one example and says so. nll_sum: nats of windows, without or with retrieval."""
    from model_runner.memory_builder.learner import NllSums

    before = None if nll_sum is None else (nll_sum(windows, False), nll_sum(windows, True))
    report = learner.learn_example(windows, again=again)
    if nll_sum is not None and before is not None:
        report = replace(report, nll_sums=NllSums(*before, nll_sum(windows, True)))
    out.write(_line(report) + "\n")
    out.flush()
    return report


def _line(report: ExampleReport) -> str:
    done = f"wrote {report.entries} entries"
    if report.known:
        done += f", left out {report.known} that are known"
    if report.was_there:
        done = "was there already"
    line = f"{report.name}: {done}"
    if report.nll_sums is not None:
        line += f"; NLL {_means(report.nll_sums, report.tokens)}"
    return line


def _means(sums: NllSums, tokens: int) -> str:
    off, before, after = (total / tokens for total in (sums.off, sums.before, sums.after))
    return f"{off:.4f} off, {before:.4f} before, {after:.4f} after"


def _print_all(reports: Sequence[ExampleReport], out: TextIO) -> None:
    """The NLL over all examples, where they were scored."""
    from model_runner.memory_builder.learner import NllSums

    sums = [astuple(report.nll_sums) for report in reports if report.nll_sums is not None]
    if sums:
        total = NllSums(*(sum(column) for column in zip(*sums, strict=True)))
        tokens = sum(report.tokens for report in reports)
        out.write(f"all: {tokens} tokens; NLL {_means(total, tokens)}\n")


def _never_calibrated(memory: MemoryDescription) -> bool:
    """A new memory's gamma is 1 for every layer: nothing in hundreds of dimensions is that close."""
    from knnmoe.v1.types_pb2 import SIMILARITY_RBF

    settings = memory.settings
    return settings.similarity == SIMILARITY_RBF and all(gamma == 1 for gamma in settings.gamma)

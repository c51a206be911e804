"""`model-runner evaluate` and `demo`: what a memory does to the loss on text.

Imports of torch and gRPC stand inside functions: --help does not wait for them.
"""

from __future__ import annotations

import logging
import math
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table

from model_runner.cli import options
from model_runner.progress import Progress

if TYPE_CHECKING:
    from knnmoe.client import AdminClient

    from model_runner.scoring import Scores
    from model_runner.texts import Window

log = logging.getLogger(__name__)

# Enough to notice that a memory was built from the scored text; one count of some thousand ids.
WINDOWS_LOOKED_UP = 32


def evaluate(
    text: Annotated[Path, options.file_option(f"Text to score: {options.TEXT_FILE}")],
    memory: options.Memory,
    model: options.Model = options.DEFAULT_MODEL,
    target: options.Target = options.DEFAULT_TARGET,
    window: options.Window = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help=f"Score {options.DRAWN}")] = None,
    batch_size: options.BatchSize = 8,
    leave_one_out: options.LeaveOneOut = False,
    timeout_s: options.ScoringTimeout = 60.0,
    retrieval: options.RetrievalOption = "auto",
    replica_memory: options.ReplicaMemory = None,
    replica_keys: options.ReplicaKeysOption = "f32",
    first_pass: options.FirstPassOption = "auto",
    max_staleness_s: options.MaxStaleness = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help=f"Also write the numbers to this file; {options.JSON_FILE}"),
    ] = None,
    per_token: Annotated[
        Path | None,
        typer.Option(
            "--per-token",
            help="Also write a row per token, with its text, class and losses, to this file: e.g. tokens.parquet, "
            "tokens.jsonl.",
        ),
    ] = None,
    per_document: Annotated[
        Path | None,
        typer.Option(
            "--per-document",
            help="Also write a row per example, with its mean losses, to this file: e.g. documents.parquet, "
            "documents.jsonl.",
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Score text with and without the memory: the paired change of NLL per token, in all and by class of token.

    Stops with an error when the sidecar fails, or a replica of the memory may be out of date; scores never mix. For
    example:

        model-runner evaluate --memory law --text held-out.jsonl --json scores.json

        model-runner evaluate --memory law --text held-out.jsonl --per-token tokens.parquet
    """
    import numpy as np
    from knnmoe.client import AdminClient

    from model_runner.evaluation import per_token as tables
    from model_runner.memory_builder.entries import known_text
    from model_runner.models import window_length
    from model_runner.retrieval import open_retriever
    from model_runner.router_client import OnError
    from model_runner.routing_policy import RetrievalPolicy
    from model_runner.scoring import score
    from model_runner.texts import drawn, read_windows

    options.require_writable("--json", json_file)
    for option, file in (("--per-token", per_token), ("--per-document", per_document)):
        options.require_writable(option, file)
        tables.require_table_file(option, file)
    how = options.retrieval(retrieval, replica_memory, replica_keys, first_pass, max_staleness_s)
    with AdminClient(target) as admin:
        admin.describe(memory)  # what is not there is noticed before the model is loaded
        loaded = options.load(model, device, dtype)
        length = window_length(loaded.model, window)
        windows = drawn(read_windows(text, loaded.tokenizer, length), max_windows)
        # What a memory of version 0.1 holds of this text has other names; they are what is left out.
        windows = known_text(admin, memory, windows).windows
        if not leave_one_out:
            _warn_of_own_entries(admin, memory, windows)
    progress = Progress(quiet=quiet)
    where = (target, memory, loaded.fingerprint, loaded.device, how, progress)
    # Another model's memory is noticed before anything is scored.
    with open_retriever(*where, timeout_s=timeout_s, on_error=OnError.RAISE) as opened:
        policy = RetrievalPolicy(opened.retriever)
        scored = partial(score, loaded.model, windows, progress=progress, batch_size=batch_size)
        plain = scored(policy=None, what="plain model")
        routed = scored(policy=policy, what=f"with memory {memory}", leave_one_out=leave_one_out)
    lambdas = [policy.use[layer].lambda_mean for layer in sorted(policy.use)]
    result: dict[str, Any] = {"model": model, "memory": memory, "text": windows[0].ref.source}
    result["retrieval"] = opened.where.value
    result |= _comparison(plain, routed, lambdas)
    classes = tables.classes_of(plain.windows, loaded.tokenizer)
    losses = (np.concatenate(each.token_nll) for each in (plain, routed))
    result["classes"] = tables.class_table(tables.by_class(classes, *losses))
    _print_scores(result, options.words_beside(json_file))
    if policy.lookups.fell_back:  # not for a sidecar's sake: that is an error here
        sys.stderr.write(f"lookups that fell back: {policy.lookups}\n")
    options.write_json(json_file, _finite(result))
    if per_token is not None:
        rows = tables.token_rows(windows, plain, routed, loaded.tokenizer)
        tables.write_table(per_token, rows, tables.TOKEN_COLUMNS)
    if per_document is not None:
        rows = tables.document_rows(windows, plain, routed)
        tables.write_table(per_document, rows, tables.DOCUMENT_COLUMNS)


def _comparison(plain: Scores, routed: Scores, lambdas: list[float]) -> dict[str, Any]:
    """The numbers of the table; lambdas: the mean per layer."""
    from model_runner.evaluation.nll import bootstrap_interval, difference

    change = difference(routed, plain)
    return {
        "windows": change.windows,
        "zero_shot": {"nll": plain.nll, "perplexity": plain.perplexity},
        "knn_moe": {
            "nll": routed.nll,
            "perplexity": routed.perplexity,
            "delta": change.delta,
            "se": change.se,
            "bootstrap_95": list(bootstrap_interval(routed, plain, seed=0)),
            "lambda_mean": lambdas,
        },
    }


def _warn_of_own_entries(client: AdminClient, memory: str, windows: list[Window]) -> None:
    """A memory that holds the very tokens that are scored knows the answers."""
    from model_runner.memory_builder.entries import entry_ids

    ids = entry_ids(windows[:WINDOWS_LOOKED_UP])
    found = client.count(memory, 0, ids)
    if found:
        log.warning(
            "memory %r holds %d of the first %d scored tokens (entries of a file named %s): "
            "use --leave-one-out, or text that it was not built from",
            *(memory, found, len(ids), windows[0].ref.source),
        )


def _print_scores(result: dict[str, Any], out: TextIO) -> None:
    """Two tables: all tokens, and by class."""
    table = Table("", "NLL", "perplexity", "change in NLL", "95 % interval")
    plain, with_memory = result["zero_shot"], result["knn_moe"]
    table.add_row("plain model", f"{plain['nll']:.4f}", f"{plain['perplexity']:.2f}", "", "")
    low, high = with_memory["bootstrap_95"]
    one_example = math.isnan(with_memory["se"])
    table.add_row(
        "with memory",
        f"{with_memory['nll']:.4f}",
        f"{with_memory['perplexity']:.2f}",
        f"{with_memory['delta']:+.4f}" + ("" if one_example else f" ± {with_memory['se']:.4f}"),
        "needs two examples" if one_example else f"{low:+.4f} to {high:+.4f}",
    )
    console = Console(file=out)
    console.print(table)
    # Short heads: at 80 columns no cell breaks.
    classes = Table("tokens", "share", "plain", "memory", "change", "share of change")
    for name, row in result["classes"].items():
        share = row["share_of_change"]
        classes.add_row(
            f"{row['tokens']} {name}",
            f"{row['share_of_tokens']:.1%}",
            f"{row['nll_plain']:.4f}",
            f"{row['nll_memory']:.4f}",
            f"{row['change']:+.4f}",
            "" if share is None else f"{share:z.1%}",
        )
    console.print(classes)
    lambdas = " ".join(f"{value:.2f}" for value in with_memory["lambda_mean"])
    console.print(
        f"{result['windows']} windows; mean lambda per layer: {lambdas}",
        highlight=False,
        soft_wrap=True,
    )


def _finite(value: Any) -> Any:
    """The same numbers for JSON, which has no NaN: null in its place."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def demo(
    out: Annotated[
        Path,
        typer.Option(
            help="Directory of results.json, the plots and the memories.", file_okay=False
        ),
    ],
    seed: Annotated[
        int, typer.Option(help="Draws reference and test windows, and the controls.")
    ] = 0,
    backend: Annotated[
        str,
        typer.Option(
            envvar="KNNMOE_BACKEND",
            help="Where the sidecar keeps the memories: edge (embedded), or the URL of a Qdrant server, where they are "
            "removed at the end; its API key comes from ROUTER_SERVICE_QDRANT_API_KEY.",
        ),
    ] = "edge",
    model: options.Model = options.DEFAULT_MODEL,
    retrieval: options.RetrievalOption = "auto",
    replica_memory: options.ReplicaMemory = None,
    replica_keys: options.ReplicaKeysOption = "f32",
    first_pass: options.FirstPassOption = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Watch a frozen model get better on text that it was not trained for (a few minutes on 2 cores).

    Starts a sidecar, builds memories of shifted text through it, scores shifted and general test text, and writes
    results.json, delta_nll.png and lambda.png into OUT. With --retrieval remote lookups go to the sidecar, which
    indexes the memories first: it takes longer, and the table is the same. For example:

        model-runner demo --out demo-results --seed 0
    """
    from model_runner.evaluation.demo import Demo, DemoSettings, table_rows
    from model_runner.models import load_model

    how = options.retrieval(retrieval, replica_memory, replica_keys, first_pass)
    loaded = load_model(model, device="cpu")
    demo = Demo(loaded, DemoSettings(seed=seed), out, Progress(quiet=quiet), backend, how)
    results = demo.run()
    table = Table()
    for heading in ("arm", "text", "NLL", "perplexity", "change in NLL", "lambda per layer"):
        table.add_column(heading, no_wrap=True)
    for row in table_rows(results):
        table.add_row(*row)
    # Off a terminal the width is a guess, and a cut-off table is of no use in a log.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        f"{results['timings']['total']:.0f} s; see {out / 'results.json'}, {out / 'delta_nll.png'}, "
        f"{out / 'lambda.png'}",
        highlight=False,
    )

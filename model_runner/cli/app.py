"""`model-runner`: build, calibrate and evaluate a routing memory, generate with it, teach it, watch the demo."""

from __future__ import annotations

import logging
import os
import sys
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from model_runner.cli import options, session_commands
from model_runner.cli.options import PresetName, StepNorm
from model_runner.errors import BadInput, RunnerError
from model_runner.progress import Progress

_INTERRUPTED = "interrupted; what the sidecar acknowledged is kept, so a build or `learn` goes on where it stopped"
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_UNAVAILABLE, EXIT_INTERRUPTED = 1, 2, 3, 130

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Make a frozen Mixture-of-Experts model better on your text, without touching a weight.\n\n"
    "Start a sidecar, build a memory from reference text, then generate with it:\n\n"
    "    router-service serve --data ./memories &\n\n"
    "    model-runner build --model allenai/OLMoE-1B-7B-0924 --memory law --reference law.jsonl\n\n"
    "    model-runner evaluate --model allenai/OLMoE-1B-7B-0924 --memory law --text held-out.jsonl\n\n"
    "    model-runner generate --model allenai/OLMoE-1B-7B-0924 --memory law --prompt 'The tenant'\n\n"
    "It learns while it serves:\n\n"
    "    model-runner learn new-cases.jsonl --model allenai/OLMoE-1B-7B-0924 --memory law\n\n"
    "Exit codes: 0 done, 1 failed, 2 bad input, 3 the sidecar cannot be reached, 130 Ctrl-C.",
)


class GradientScope(StrEnum):
    """Whether a gradient passes later routers."""

    LEAF = "leaf"
    LIVE = "live"


@app.command()
def build(
    reference: Annotated[Path, options.text_file("Text to remember")],
    memory: options.Memory,
    model: options.Model = options.DEFAULT_MODEL,
    target: options.Target = options.DEFAULT_TARGET,
    preset: Annotated[
        PresetName,
        typer.Option(help="recommended: logit deltas, K = 32. paper: assignments, K = 1."),
    ] = PresetName.RECOMMENDED,
    window: options.Window = None,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many windows. Default: all.")
    ] = None,
    batch_size: options.BatchSize = 8,
    step_size: Annotated[
        float | None,
        typer.Option(min=0, help="eta of the stored step; the preset's by default (paper: 2)."),
    ] = None,
    norm: Annotated[
        StepNorm | None,
        typer.Option(help="Length of a step: raw (paper), unit, or soft (recommended)."),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(min=1, help="Gradient steps S; more than 1 gains little. Assignments only."),
    ] = 1,
    gradient_scope: Annotated[
        GradientScope,
        typer.Option(help="leaf: later routers held fixed. live: gradient passes them."),
    ] = GradientScope.LEAF,
    own_token: Annotated[
        bool,
        typer.Option(help="Use (nearly) each token's own loss only, not its effect on later ones."),
    ] = False,
    straight_through: Annotated[
        bool, typer.Option(help="Give experts that were not chosen a gradient too.")
    ] = False,
    calibrate_on: Annotated[
        Path | None,
        typer.Option(
            help="Held-out text for the bandwidths. Default: leave-one-example-out in the memory.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    lambda0: Annotated[
        float | None,
        typer.Option(
            help="Similarity at the median distance; the preset's by default (0.9 paper, 0.3 ours).",
            callback=options.fraction,
        ),
    ] = None,
    gain: Annotated[
        bool,
        typer.Option("--gain/--no-gain", help="Measure what each entry saves (one more pass)."),
    ] = True,
    optimize: Annotated[
        bool, typer.Option("--optimize/--no-optimize", help="Index the keys when they are written.")
    ] = True,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Build a memory from reference text, or go on with a build that was cut off.

    Running it again with the same text skips what is there. Entries are told apart by file name, `id` and token: for
    text or settings that changed, delete the memory first or choose another name. For example:

        model-runner build --memory law --reference law.jsonl --calibrate-on held-out.jsonl
    """
    from model_runner.cli.build import BuildOptions, run_build

    run_build(
        BuildOptions(
            reference=reference,
            memory=memory,
            model=model,
            target=target,
            preset=preset.value,
            window=window,
            max_windows=max_windows,
            batch_size=batch_size,
            step_size=step_size,
            norm=None if norm is None else norm.value,
            steps=steps,
            scope=gradient_scope.value,
            own_token=own_token,
            straight_through=straight_through,
            calibrate_on=calibrate_on,
            lambda0=lambda0,
            gain=gain,
            optimize=optimize,
            device=device,
            dtype=dtype,
        ),
        Progress(quiet=quiet),
    )


@app.command()
def calibrate(
    memory: options.Memory,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Held-out text. Default: leave-one-example-out in the memory.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    model: options.Model = options.DEFAULT_MODEL,
    target: options.Target = options.DEFAULT_TARGET,
    lambda0: Annotated[
        float,
        typer.Option(help="Similarity at the quantile of the distance.", callback=options.fraction),
    ] = 0.5,
    quantile: Annotated[
        float,
        typer.Option(help="Of the distance to the nearest key.", callback=options.fraction),
    ] = 0.5,
    window: options.Window = None,
    batch_size: options.BatchSize = 8,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show, store nothing.")] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Set each layer's bandwidth gamma so that the similarity at the median nearest distance is lambda0.

    A larger lambda0 lets the memory speak more, also where nothing in it is close. For example:

        model-runner calibrate --memory law --text held-out.jsonl --lambda0 0.5
    """
    from model_runner.cli.build import run_calibrate

    response = run_calibrate(
        memory, text, model, target, lambda0, quantile, window, batch_size, dry_run, device, dtype
    )
    table = Table("layer", "squared distance", "gamma", "queries")
    for layer in response.layers:
        table.add_row(
            str(layer.layer),
            f"{layer.squared_distance:.4g}",
            f"{layer.gamma:.4g}",
            str(layer.queries),
        )
    Console().print(table)


@app.command()
def evaluate(
    text: Annotated[Path, options.text_file("Text to score")],
    memory: options.Memory,
    model: options.Model = options.DEFAULT_MODEL,
    target: options.Target = options.DEFAULT_TARGET,
    window: options.Window = None,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Score so many windows, drawn evenly. Default: all.")
    ] = None,
    batch_size: options.BatchSize = 8,
    leave_one_out: Annotated[
        bool,
        typer.Option(
            "--leave-one-out", help="Never read entries of the scored example: for reference text."
        ),
    ] = False,
    timeout_s: Annotated[
        float, typer.Option(min=0.001, help="Longest wait for one lookup.")
    ] = 60.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the numbers to this file.")
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Score text with and without the memory: the paired change of NLL per token.

    Stops with an error when the sidecar fails; scores never mix. For example:

        model-runner evaluate --memory law --text held-out.jsonl --json scores.json
    """
    from model_runner.cli.evaluate import (
        print_scores,
        require_writable,
        run_evaluate,
        write_scores,
    )

    require_writable("--json", json_file)
    result = run_evaluate(
        text,
        memory,
        model,
        target,
        window,
        max_windows,
        batch_size,
        leave_one_out,
        timeout_s,
        device,
        dtype,
        Progress(quiet=quiet),
    )
    print_scores(result)
    if json_file is not None:
        write_scores(result, json_file)


app.command()(session_commands.generate)
app.command()(session_commands.learn)


@app.command()
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
    quiet: options.Quiet = False,
) -> None:
    """Watch a frozen model get better on text that it was not trained for (about four minutes on 2 cores).

    Starts a sidecar, builds memories of shifted text through it, scores shifted and general test text, and writes
    results.json, delta_nll.png and lambda.png into OUT. For example:

        model-runner demo --out demo-results --seed 0
    """
    from model_runner.evaluation.demo import Demo, DemoSettings, table_rows
    from model_runner.models import load_model

    loaded = load_model(model, device="cpu")
    results = Demo(loaded, DemoSettings(seed=seed), out, Progress(quiet=quiet), backend).run()
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


def main() -> None:
    """Entry point of the console script: errors become one line and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Torch's idle threads would spin on the cores that the sidecar needs; read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():  # the libraries' bars would fill a log file
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except KeyboardInterrupt:
        _fail(_INTERRUPTED, EXIT_INTERRUPTED)
    except SystemExit as ended:
        if ended.code == EXIT_INTERRUPTED:  # Ctrl-C within a command: typer ends it without a word
            _fail(_INTERRUPTED, EXIT_INTERRUPTED)
        raise
    except (BadInput, _client().KindMismatch) as error:
        _fail(error, EXIT_BAD_INPUT)
    except _client().ServiceUnavailable as error:
        _fail(
            f"{error}\nIs a sidecar running there? Start one with: router-service serve --data DIR",
            EXIT_UNAVAILABLE,
        )
    except (RunnerError, _client().ServiceError, OSError) as error:
        _fail(error, EXIT_FAILED)


def _client() -> ModuleType:
    """Its errors, imported when there is one: --help does not wait for gRPC."""
    from knnmoe import client

    return client


def _fail(what: object, code: int) -> None:
    sys.stderr.write(f"model-runner: {what}\n")
    sys.exit(code)

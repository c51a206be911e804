"""The commands that use a memory while it grows: `generate` and `learn`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from model_runner.cli import options
from model_runner.cli.options import PresetName, StepNorm
from model_runner.progress import Progress


class DurabilityName(StrEnum):
    """What an acknowledged entry survives."""

    PROCESS = "process"
    FSYNC = "fsync"


Durability = Annotated[
    DurabilityName,
    typer.Option(
        help="What a learnt entry survives: process (SIGKILL of the sidecar), fsync (loss of power)."
    ),
]


def generate(
    prompt: Annotated[
        str | None, typer.Option(help="Text to go on from; - reads it from stdin.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Memory to route with; none = the plain model.")
    ] = None,
    learn: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --prompt: a .jsonl or .parquet file of `prompt` and `answer`. Each prompt is "
            "generated from, then its answer is learnt into the memory, before the next.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive",
            help="Instead of --prompt: a prompt per line of stdin, until it ends. A line "
            "`/learn ANSWER` teaches the memory the right answer to the last prompt.",
        ),
    ] = False,
    model: options.Model = options.DEFAULT_MODEL,
    target: options.Target = options.DEFAULT_TARGET,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Stop after so many tokens, or at the model's end of text.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 = greedy; else the sampling temperature.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    timeout_s: Annotated[
        float,
        typer.Option(
            min=0.001,
            help="Longest wait for one token's lookup (a prompt's: 2 ms more for each further token); "
            "then the own router stands.",
        ),
    ] = 0.05,
    durability: Durability = DurabilityName.PROCESS,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Generate text with a memory, and teach it the right answers meanwhile.

    When the sidecar is slow or gone, the model's own router goes on; only learning needs it. Says on stderr how much
    the memory spoke, and how often it could not be asked. For example:

        model-runner generate --memory law --prompt 'The tenant shall' --max-new-tokens 40

        model-runner generate --memory law --learn answers.jsonl

        model-runner generate --memory law --interactive
    """
    from model_runner.cli.generate import GenerateOptions, run_generate

    run_generate(
        GenerateOptions(
            prompt=sys.stdin.read() if prompt == "-" else prompt,
            learn=learn,
            interactive=interactive,
            memory=memory,
            model=model,
            target=target,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            timeout_s=timeout_s,
            durability=durability.value,
            device=device,
            dtype=dtype,
        )
    )


def learn(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help=f"Text to learn: {options.TEXT_FILE}",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ],
    memory: options.Memory,
    model: options.Model = options.DEFAULT_MODEL,
    target: options.Target = options.DEFAULT_TARGET,
    preset: Annotated[
        PresetName | None,
        typer.Option(help="Recipe of the values. Default: that of the memory, which you want."),
    ] = None,
    step_size: Annotated[
        float | None,
        typer.Option(min=0, help="eta of the stored step, when the memory was built with another."),
    ] = None,
    norm: Annotated[
        StepNorm | None,
        typer.Option(help="Length of a step, when the memory was built with another."),
    ] = None,
    window: options.Window = None,
    batch_size: options.BatchSize = 8,
    durability: Durability = DurabilityName.PROCESS,
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
            help="Write examples that are there already once more: their text has changed.",
        ),
    ] = False,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="Score each example without the memory, and with it before and after learning the example. "
            "The last reads the example's own entries (no leave-one-out): it shows that it was learnt, "
            "not that other text gains.",
        ),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write a report per example to this file.")
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Add text to a memory that is serving, example by example, each in the answer to the next lookup.

    Values are made as the memory's preset makes them, from the frozen model. Examples that are there already (same file
    name, `id` and tokens' places) are skipped, so that a run that was cut off goes on where it stopped. For example:

        model-runner learn new-cases.jsonl --memory law

        model-runner learn new-cases.jsonl --memory law --evaluate --json report.json
    """
    from model_runner.cli.learn import LearnOptions, run_learn

    run_learn(
        LearnOptions(
            file=file,
            memory=memory,
            model=model,
            target=target,
            preset=None if preset is None else preset.value,
            step_size=step_size,
            norm=None if norm is None else norm.value,
            window=window,
            batch_size=batch_size,
            durability=durability.value,
            skip_known=skip_known,
            again=again,
            evaluate=evaluate,
            json_file=json_file,
            device=device,
            dtype=dtype,
        ),
        Progress(quiet=quiet),
    )

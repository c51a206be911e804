"""`model-runner experiment`: run an experiment on a model and texts of one's choice, and report what is there."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from model_runner.cli import options
from model_runner.errors import BadInput
from model_runner.progress import Progress

REPORT = "report"


def experiment(
    name: Annotated[
        str,
        typer.Argument(
            help="One of --list, `all` of them, or `report`: tables and plots of what is in --out.",
            show_default=False,
        ),
    ] = "",
    model: options.Model = options.DEFAULT_MODEL,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Directory of texts: DOMAIN_reference.jsonl, DOMAIN_dev.jsonl and DOMAIN_test.jsonl for each domain, "
            'the same three of `general`; a row is {"text": ..., "id": ...}. '
            "Default: the texts that ship with this package, whose domain is `bible`.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(help="Only this one of the data's domains; may be given again. Default: all."),
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Draws of the windows, e.g. 0,1,2; each is a study of its own.")
    ] = "0",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the results; what is there is not run again. "
            "Default: experiment-results/DATE.",
            file_okay=False,
            show_default=False,
        ),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="Of experiments with several arms (main, choice) only this one; may be given again."
        ),
    ] = None,
    reference: Annotated[
        int | None,
        typer.Option(min=4, help="Windows of the reference. Default: 240.", show_default=False),
    ] = None,
    largest: Annotated[
        int | None,
        typer.Option(
            min=20,
            help="Windows of the largest reference of `size`. Default: all.",
            show_default=False,
        ),
    ] = None,
    test: Annotated[
        int | None,
        typer.Option(min=4, help="Windows of each test text. Default: 64.", show_default=False),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Few and small windows: what an experiment looks like, not what is true.",
        ),
    ] = False,
    list_only: Annotated[
        bool, typer.Option("--list", help="Print the experiments and what each answers, and stop.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Reproduce the experiments on routing memories: JSON, Markdown and plots in a directory, by default a dated one.

    Each result is written as soon as it is there, so that a run that was cut off goes on when it is given again.
    Memories are in this process and searched exactly: no sidecar is needed. For example:

        model-runner experiment --list

        model-runner experiment main --seeds 0,1

        model-runner experiment all --quick --out quick-results

        model-runner experiment transfer --model allenai/OLMoE-1B-7B-0924 --data texts
    """
    from model_runner.experiments import registry, report
    from model_runner.experiments.study import QUICK, Sizes, domains

    if list_only:
        for each in registry.experiments().values():
            sys.stdout.write(f"{each.name:14} {each.answers}\n")
        return
    if not name:
        raise BadInput("which experiment? See: model-runner experiment --list")
    out = out or Path("experiment-results") / date.today().isoformat()
    if name != REPORT:
        sizes, options_given = QUICK if quick else Sizes(), " --quick" if quick else ""
        for field, value in (("reference", reference), ("largest", largest), ("test", test)):
            if value is not None:
                sizes = replace(sizes, **{field: value})
                options_given += f" --{field} {value}"
        if test is not None:
            sizes = replace(sizes, general_test=test)
        plan = registry.Plan(
            registry.named(name),
            model,
            domain or domains(data),
            _numbers(seeds),
            out,
            data,
            sizes,
            options_given,
            part or (),
        )
        written = registry.run(plan, Progress(quiet=quiet))
        sys.stdout.write(f"{written} new results in {out}\n")
    path = report.write_report(out, out / "results.md", out)
    sys.stdout.write(f"{path}\n")


def _numbers(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError as error:
        raise BadInput(f"--seeds: got {text!r}, expected numbers such as 0,1,2") from error

"""`model-runner explain`: what a memory did to each token of a text, to look at.

Imports of torch and gRPC stand inside functions: --help does not wait for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from model_runner.cli import options
from model_runner.errors import BadInput
from model_runner.progress import Progress


def explain(
    memory: options.Memory,
    text: Annotated[
        Path | None, options.file_option(f"Text to explain: {options.TEXT_FILE}")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Instead of --text: the text itself.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            help="Also write a page for a browser to this file: tokens coloured by what changed, and a click shows the "
            "stored cases that did it. It needs no network; windows beyond 8 MiB are left out, and it says so. "
            "- is standard output.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help=f"Also write all of it to this file; {options.JSON_FILE}"),
    ] = None,
    neighbours: Annotated[
        int,
        typer.Option(
            min=0,
            help="Nearest stored cases to show of each token and layer, at most those that it reads.",
        ),
    ] = 5,
    model: options.Model = options.DEFAULT_MODEL,
    target: options.Target = options.DEFAULT_TARGET,
    window: options.Window = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help=f"Explain {options.DRAWN}")] = None,
    batch_size: options.BatchSize = 8,
    leave_one_out: options.LeaveOneOut = False,
    timeout_s: options.ScoringTimeout = 60.0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Show what the memory did to each token of a text: loss, lambda and experts per layer, and the cases that did it.

    Prints the ten tokens that were helped and harmed most. The loss and the windows are those of `evaluate`; lookups go
    to the sidecar, which knows where its entries came from. Their words are kept by `build` and `learn` unless
    --no-snippets is given. For example:

        model-runner explain --memory law --text held-out.jsonl --html explained.html

        model-runner explain --memory law --prompt 'The tenant shall pay the rent'
    """
    from knnmoe.client import AdminClient

    from model_runner.evaluation import explain as explaining
    from model_runner.evaluation.explain_views import Summary, to_html
    from model_runner.memory_builder.entries import known_text
    from model_runner.models import window_length
    from model_runner.router_client import OnError, RouterClient
    from model_runner.texts import drawn, read_windows

    if (text is None) == (prompt is None):
        got = "neither" if text is None else "both"
        raise BadInput(f"--text, --prompt: got {got} of them, expected one: what to explain")
    if json_file == html == options.STANDARD_OUTPUT:
        raise BadInput("--json, --html: got - twice, expected one of them on standard output")
    options.require_writable("--json", json_file)
    options.require_writable("--html", html)
    with AdminClient(target) as admin:
        admin.describe(memory)  # what is not there is noticed before the model is loaded
        loaded = options.load(model, device, dtype)
        length = window_length(loaded.model, window)
        if text is None:
            windows = explaining.prompt_windows(prompt or "", loaded.tokenizer, length)
        else:
            windows = drawn(read_windows(text, loaded.tokenizer, length), max_windows)
            windows = known_text(admin, memory, windows).windows
    with RouterClient(
        *(target, memory, loaded.fingerprint), timeout_s=timeout_s, on_error=OnError.RAISE
    ) as client:
        client.describe()  # another model's memory is noticed before anything is scored
        found = explaining.explain(
            *(loaded.model, loaded.tokenizer, client, windows),
            Progress(quiet=quiet),
            batch_size=batch_size,
            leave_one_out=leave_one_out,
            neighbours=neighbours,
        )
    Console(file=options.words_beside(json_file, html)).print(Summary(found))
    options.write_json(json_file, found.to_json() if json_file else None)
    options.write_text(html, to_html(found) if html else None)
